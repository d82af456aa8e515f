"""Distil, correct and fine-tune grounded medical VLMs: the ClinKD method (arXiv:2502.05928)."""

from clinkd._version import __version__

__all__ = ["__version__"]
