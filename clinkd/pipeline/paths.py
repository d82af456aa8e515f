"""Where the records and images of a configuration lie."""

from pathlib import Path

from clinkd.config import SAMPLE, DataConfig
from clinkd.data.files import require_lines
from clinkd.errors import DataError

SAMPLE_FOLDER = Path(__file__).parent.parent / "data" / "sample"


def records_file(name: str, split: str) -> Path:
    """The JSON-lines file of a split: a path, or the shipped sample's."""
    path = SAMPLE_FOLDER / f"{split}.jsonl" if name == SAMPLE else Path(name)
    if not path.is_file():
        what = "is a folder, not a file of records" if path.is_dir() else "does not exist"
        raise DataError(f"data.{split}: {path} {what}")
    require_lines(path)
    return path


def data_root(data: DataConfig) -> Path:
    """The folder that image paths are relative to."""
    if data.root is not None:
        return Path(data.root)
    return SAMPLE_FOLDER if data.train == SAMPLE else Path(data.train).parent
