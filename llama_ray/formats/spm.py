"""SentencePiece models, of which other programs run those that are like LLaMA's."""

from __future__ import annotations

from typing import Any

from sentencepiece import sentencepiece_model_pb2


def parse_spm(model_bytes: bytes) -> Any:
    """The `ModelProto`."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(model_bytes)
    return proto


def unlike_llama(proto: Any) -> str | None:
    """What it does that LLaMA's does not: BPE of the text as it stands. None: nothing."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != trainer.BPE:
        return "is a SentencePiece model that is not BPE"
    if normalizer.precompiled_charsmap or normalizer.normalization_rule_tsv:
        return "is a SentencePiece model that normalises characters"
    if not normalizer.escape_whitespaces:
        return "is a SentencePiece model that keeps spaces as they are"
    if trainer.treat_whitespace_as_suffix:
        return "is a SentencePiece model that puts spaces after words"
    return None
