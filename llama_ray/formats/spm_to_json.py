"""A SentencePiece model as the `tokenizer.json` of the `tokenizers` library, with the same ids.

transformers has a conversion of its own, which of version 5 gives other ids for runs of spaces; so
exports bring this file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llama_ray.data.tokenizer import Tokenizer
from llama_ray.errors import UserError
from llama_ray.formats.spm import parse_spm, unlike_llama

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # ModelProto.SentencePiece.Type


def tokenizer_json(model_bytes: bytes, where: str) -> bytes:
    """Puts BOS before a text, as LLaMA was trained, and no EOS after it. Raises `UserError`
    beginning with `where` unless the model is like LLaMA's: BPE of the text as it stands."""
    proto = parse_spm(model_bytes)
    fault = unlike_llama(proto)
    if fault is None and any(piece.type == _USER_DEFINED for piece in proto.pieces):
        fault = "is a SentencePiece model with pieces defined by a user"
    if fault is not None:
        raise UserError(
            f"{where}: {fault}; no tokenizer.json with the same ids can be made of it, as "
            "Hugging Face's programs need"
        )
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_special(proto.pieces)),
        "normalizer": _normalizer(proto.normalizer_spec),
        "pre_tokenizer": None,
        "post_processor": _template(proto.pieces, Tokenizer(model_bytes, where).bos_id),
        "decoder": _decoder(proto.normalizer_spec),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(p.piece for p in proto.pieces if p.type == _UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": proto.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.piece: number for number, piece in enumerate(proto.pieces)},
            "merges": _merges(proto.pieces),
        },
    }
    return json.dumps(content, ensure_ascii=False).encode()


def _normalizer(spec: Any) -> dict[str, Any]:
    steps = []
    if spec.remove_extra_whitespaces:  # runs become one, at either end none
        steps.append(_replace({"Regex": rf"\A +|[ {_SPACE}]+\z| +(?= )"}, ""))
    if spec.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append(_replace({"String": " "}, _SPACE))
    return {"type": "Sequence", "normalizers": steps}


def _decoder(spec: Any) -> dict[str, Any]:
    steps = [_replace({"String": _SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if spec.add_dummy_prefix:
        # SentencePiece takes off as many spaces as encoding would have.
        most = 1 << 20 if spec.remove_extra_whitespaces else 1
        steps.append({"type": "Strip", "content": " ", "start": most, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _template(pieces: Any, bos_id: int) -> dict[str, Any]:
    bos = pieces[bos_id].piece
    mark = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": id, "type_id": n}} for n, id in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [mark, first],
        "pair": [mark, first, mark, second],
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def _merges(pieces: Any) -> list[list[str]]:
    """SentencePiece merges the neighbours whose union has the highest score. So: each way in which
    a piece is a union of two others, in the order of scores."""
    known = {piece.piece: number for number, piece in enumerate(pieces)}
    found = []
    for number, piece in enumerate(pieces):
        for cut in range(1, len(piece.piece)) if piece.type == _NORMAL else ():
            left, right = piece.piece[:cut], piece.piece[cut:]
            if left in known and right in known:
                found.append((-piece.score, number, known[left], known[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def _special(pieces: Any) -> Iterator[dict[str, Any]]:
    for number, piece in enumerate(pieces):
        if piece.type in (_UNKNOWN, _CONTROL):
            yield {
                "id": number,
                "content": piece.piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}
