"""`installed-packages`: the text every machine has, the Python source and the documentation of
this environment's own packages and of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

DOCUMENTATION = {".rst", ".md", ".txt"}
# Beyond this, Python files are tables and generated code.
MAX_FILE_BYTES = 1 << 17
# Documentation is scarce beside code: it may take up to this share of `corpus.max_bytes`.
DOCUMENTATION_SHARE = 0.25
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages"}


def package_files(max_bytes: int | None) -> list[tuple[str, str, int]]:
    """(path, source, size in bytes), sorted by path; `max_bytes` chooses by the hash of the path
    within the environment, so that a part of the corpus is a sample of the whole."""
    by_source: dict[str, list[tuple[bytes, str, int]]] = {"docs": [], "github": []}
    for root in _roots():
        for path in _walk(root):
            source = _source(path)
            if source is None:
                continue
            size = path.stat().st_size
            if size <= MAX_FILE_BYTES:
                relative = path.relative_to(root).as_posix()
                order = hashlib.blake2b(relative.encode(), digest_size=16).digest()
                by_source[source].append((order, str(path), size))
    if max_bytes is not None:
        by_source["docs"] = _up_to(by_source["docs"], int(max_bytes * DOCUMENTATION_SHARE))
        used = sum(size for _, _, size in by_source["docs"])
        by_source["github"] = _up_to(by_source["github"], max_bytes - used)
    return sorted(
        (path, source, size) for source, files in by_source.items() for _, path, size in files
    )


def package_text(path: str) -> str | None:
    """None where the file is not UTF-8. Package metadata yields its long description."""
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    if path.endswith("/METADATA"):
        return text.partition("\n\n")[2]
    return text


def _roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return sorted({Path(paths[name]).resolve() for name in ("stdlib", "purelib", "platlib")})


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            continue
        if path.is_dir():
            if path.name not in SKIPPED_FOLDERS:
                yield from _walk(path)
        elif path.is_file():
            yield path


def _source(path: Path) -> str | None:
    if path.suffix == ".py":
        return "github"
    if path.name == "METADATA" and path.parent.suffix == ".dist-info":
        return "docs"
    if path.suffix in DOCUMENTATION and not path.parent.name.endswith(".dist-info"):
        return "docs"
    return None


def _up_to(files: list[tuple[bytes, str, int]], max_bytes: int) -> list[tuple[bytes, str, int]]:
    chosen, total = [], 0
    for file in sorted(files):
        if total + file[2] <= max_bytes:
            chosen.append(file)
            total += file[2]
    return chosen
