"""Answers worth choosing from: batched beam search with a shared prefix, and CLIP selection."""

from clinkd.generate.beam import BeamSearcher
from clinkd.generate.results import Candidate, Result

__all__ = ["BeamSearcher", "Candidate", "Result"]
