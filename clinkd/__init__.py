"""Distil, correct and fine-tune grounded medical vision-language models (ClinKD, arXiv:2502.05928)."""

from clinkd._version import __version__

__all__ = ["__version__"]
