"""Triton kernels. Their files live in `kernels/` at the root of the repository."""

from pathlib import Path

_source = Path(__file__).parent.parent.parent / "kernels"
if _source.is_dir():  # run from the source tree; a wheel holds the files in this folder
    __path__.append(str(_source))
