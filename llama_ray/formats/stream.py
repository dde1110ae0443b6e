"""What libraries that write files want of an upload, which only ever goes forwards."""

from __future__ import annotations

from typing import Any, Protocol


class Out(Protocol):
    def write(self, buffer: Any, /) -> Any: ...


class Counted:
    """Knows where it is. Once `closed`, what is written is dropped."""

    def __init__(self, out: Out) -> None:
        self._out, self._written = out, 0
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if not self.closed:
            self._out.write(view)
        self._written += view.nbytes
        return view.nbytes

    def tell(self) -> int:
        return self._written

    def flush(self) -> None:
        """Nothing: what there is to flush, closing the upload flushes."""
