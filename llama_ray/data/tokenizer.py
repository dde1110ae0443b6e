"""The SentencePiece tokenizer of section 2.1 of the paper: BPE, numbers split into digits, bytes
as fallback for characters it has not learned.

As in LLaMA, a space is put before the text when encoding ("dummy prefix": `Hello` and ` Hello` in
mid-sentence share a piece) and taken off again when decoding.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import sentencepiece

from llama_ray.errors import UserError
from llama_ray.storage import Storage


class Tokenizer:
    """Text ↔ token ids. Picklable; equal models have equal `sha256`.

    With a model that `train_tokenizer` made, `decode(encode(text)) == text` for all valid Unicode,
    except that U+2581 (which SentencePiece keeps for the space) comes back as a space.
    """

    def __init__(self, model_bytes: bytes, where: str = "tokenizer.model") -> None:
        """Raises `UserError`, its message starting with `where`, if the bytes are no SentencePiece
        model or it lacks the document marks BOS and EOS."""
        self.model_bytes = model_bytes
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model_bytes)
        except RuntimeError:
            raise UserError(
                f"{where}: is not a SentencePiece model ({len(model_bytes):,} bytes); give the "
                "`tokenizer.model` that SentencePiece writes"
            ) from None
        if self.bos_id < 0 or self.eos_id < 0:
            raise UserError(
                f"{where}: has no BOS or no EOS piece, which mark where documents begin and end; "
                "train it with bos_id=1 and eos_id=2"
            )

    @classmethod
    def load(cls, storage: Storage, relative: str) -> Tokenizer:
        """Read `relative` under `storage.url`. Raises `UserError` where missing or broken."""
        try:
            model_bytes = storage.read(relative)
        except FileNotFoundError:
            raise UserError(f"{storage.url(relative)}: there is no such tokenizer") from None
        return cls(model_bytes, storage.url(relative))

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return Tokenizer, (self.model_bytes,)

    @property
    def vocab_size(self) -> int:
        return int(self._processor.GetPieceSize())

    @property
    def bos_id(self) -> int:
        return int(self._processor.bos_id())

    @property
    def eos_id(self) -> int:
        return int(self._processor.eos_id())

    @cached_property
    def sha256(self) -> str:
        """Of the model's bytes: what the shards' manifest and checkpoints record."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        ids = self._processor.EncodeAsIds(valid_unicode(text))
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, eos: bool = False
    ) -> list[list[int]]:
        """One list of ids per text, on this thread (parallelism is Ray's)."""
        return self._processor.Encode(
            [valid_unicode(text) for text in texts], add_bos=bos, add_eos=eos, num_threads=1
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without the dummy prefix; control pieces (BOS, EOS) have no text, and
        each byte that is no part of a character becomes U+FFFD."""
        return str(self._processor.Decode(list(ids)))


def valid_unicode(text: str) -> str:
    """`text` with lone surrogates, which JSON can smuggle in and UTF-8 cannot express, replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train on whole documents; returns the serialized model: the same bytes for the same texts.

    The settings are those stored in LLaMA's released `tokenizer.model`, with one difference: Meta
    trained on lines, which teaches the pieces for indentation one space too many (each line gets
    the dummy prefix) and none with a newline; documents are what the model will read.

    Raises `UserError` naming `tokenizer.vocab_size` where the texts do not yield that many pieces,
    or hold more distinct characters than fit.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=_no_nul(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            split_digits=True,
            character_coverage=0.99995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            # Longer "sentences" would be left out.
            max_sentence_length=1 << 30,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise _training_error(str(error), vocab_size) from None
    return model.getvalue()


def _no_nul(texts: Iterable[str]) -> Iterator[str]:
    """The trainer refuses texts with a NUL; encoding falls back to its byte."""
    return (text.replace("\0", " ") for text in texts)


def _training_error(message: str, vocab_size: int) -> Exception:
    if too_high := re.search(r"set it to a value <= (\d+)", message):
        return UserError(
            f"tokenizer.vocab_size: {vocab_size} is more than this text yields; set it to "
            f"{too_high[1]} or less, or give more text (corpus.path, tokenizer.sample_bytes)"
        )
    if too_low := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"tokenizer.vocab_size: {vocab_size} has no room for the characters of this text; set "
            f"it to more than {too_low[1]}"
        )
    if "sentences_.empty()" in message:
        return UserError("tokenizer.vocab_size: there is no text to train a tokenizer on")
    return RuntimeError(f"SentencePiece training failed: {message}")
