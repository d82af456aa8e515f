"""The ops inside Hugging Face models."""

from clinkd.models.apply import apply, load

__all__ = ["apply", "load"]
