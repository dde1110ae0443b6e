"""A tokenizer inside a GGUF file, so that llama.cpp gives our ids.

Of its kinds two are right for what we have: `llama`, which merges as SentencePiece's BPE does, and
`gpt2`, byte-level BPE, for which it knows by name how some families cut a text into words before
(`pre`). Whatever it would tokenize otherwise is refused.
"""

from __future__ import annotations

import json
import logging
from typing import Any

from gguf import GGUFWriter, TokenType

from llama_ray.data.tokenizer import Tokenizer, tokenizer_file
from llama_ray.errors import UserError
from llama_ray.formats.spm import parse_spm, unlike_llama

_log = logging.getLogger(__name__)

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def add_tokenizer(writer: GGUFWriter, tokenizer: bytes, vocab_size: int, where: str) -> None:
    """vocab_size: the model's; ids that the tokenizer lacks become unused pieces. Raises
    `UserError`, beginning with `where`, for one that cannot be expressed."""
    model = Tokenizer(tokenizer, where)
    if model.vocab_size > vocab_size:
        raise UserError(
            f"{where} has {model.vocab_size:,} pieces, the model {vocab_size:,}; it is of "
            "another model"
        )
    if tokenizer_file(tokenizer) == "tokenizer.model":
        _add_sentencepiece(writer, tokenizer, vocab_size, where)
    else:
        _add_byte_level(writer, json.loads(tokenizer), vocab_size, where)
    writer.add_bos_token_id(model.bos_id)
    writer.add_eos_token_id(model.eos_id)
    writer.add_add_bos_token(True)  # as in training
    writer.add_add_eos_token(False)


def _add_sentencepiece(writer: GGUFWriter, data: bytes, vocab_size: int, where: str) -> None:
    proto = parse_spm(data)
    fault = unlike_llama(proto)
    if fault is None and not proto.trainer_spec.byte_fallback:
        fault = "is a SentencePiece model without bytes for unknown characters"
    if fault is not None:
        raise UserError(f"{where} {fault}; GGUF has no tokenizer that gives the same ids")
    if proto.normalizer_spec.remove_extra_whitespaces:
        _log.warning(
            "%s takes several spaces for one, llama.cpp does not; such texts have other ids there",
            where,
        )
    missing = range(len(proto.pieces), vocab_size)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in proto.pieces] + [_unused(i) for i in missing])
    writer.add_token_scores([piece.score for piece in proto.pieces] + [0.0] * len(missing))
    # The numbers of GGUF's types are SentencePiece's.
    types = [int(piece.type) for piece in proto.pieces]
    writer.add_token_types(types + [int(TokenType.UNUSED)] * len(missing))
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    writer.add_add_space_prefix(proto.normalizer_spec.add_dummy_prefix)
    writer.add_remove_extra_whitespaces(proto.normalizer_spec.remove_extra_whitespaces)


def _add_byte_level(
    writer: GGUFWriter, content: dict[str, Any], vocab_size: int, where: str
) -> None:
    model = content["model"]
    pre = _pre_tokenizer(content)
    if model.get("type") != "BPE" or model.get("byte_fallback") or pre is None:
        kind = json.dumps(content.get("pre_tokenizer"), ensure_ascii=False)
        raise UserError(
            f"{where} is no byte-level BPE that cuts words as GPT-2, SmolLM or Llama 3 does "
            f"({model.get('type')}, {kind:.200}); GGUF has no name for it (is there a "
            "tokenizer.model of the same model?)"
        )
    tokens = [_unused(i) for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, i in model["vocab"].items():
        tokens[i], types[i] = token, int(TokenType.NORMAL)
    for added in content.get("added_tokens") or []:
        number, special = added["id"], added["special"]
        tokens[number] = added["content"]
        types[number] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)


def _pre_tokenizer(content: dict[str, Any]) -> str | None:
    """llama.cpp's name for how this one cuts a text into words."""
    if content.get("normalizer") is not None:
        return None
    ignores_merges = bool(content["model"].get("ignore_merges"))
    steps = [_step(step) for step in _steps(content.get("pre_tokenizer") or {})]
    if steps == [("ByteLevel", True)] and not ignores_merges:
        return "gpt-2"
    if steps == [("Digits", True), ("ByteLevel", True)] and not ignores_merges:
        return "smollm"
    if steps == [("Split", LLAMA3_WORDS), ("ByteLevel", False)] and ignores_merges:
        return "llama-bpe"
    return None


def _steps(pre_tokenizer: dict[str, Any]) -> list[dict[str, Any]]:
    if pre_tokenizer.get("type") == "Sequence":
        return list(pre_tokenizer["pretokenizers"])
    return [pre_tokenizer]


def _step(step: dict[str, Any]) -> tuple[str, Any]:
    """What of a step decides where words are cut."""
    kind = str(step.get("type"))
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return kind, step.get("use_regex", True)
    if kind == "Digits":
        return kind, step.get("individual_digits")
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return kind, step["pattern"].get("Regex")
    return kind, None


def _unused(i: int) -> str:
    return f"[PAD{i}]"
