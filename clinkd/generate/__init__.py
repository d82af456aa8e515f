"""Answers worth choosing from: batched beam search with a shared prefix, and CLIP selection."""

from clinkd.generate.beam import BeamSearcher
from clinkd.generate.clip_train import clip_texts, train_clip
from clinkd.generate.journal import join_parts
from clinkd.generate.results import Candidate, Result
from clinkd.generate.scorer import ClipScorer
from clinkd.generate.select import select
from clinkd.generate.stream import answer_records

__all__ = [
    "BeamSearcher",
    "Candidate",
    "ClipScorer",
    "Result",
    "answer_records",
    "clip_texts",
    "join_parts",
    "select",
    "train_clip",
]
