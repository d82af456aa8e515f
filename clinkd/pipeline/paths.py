"""Where the records and images of a configuration lie."""

import os
from pathlib import Path
from typing import Any

from clinkd.config import DEMO, SAMPLE, DataConfig, RunConfig
from clinkd.data.files import require_lines
from clinkd.errors import DataError

SAMPLE_FOLDER = Path(__file__).parent.parent / "data" / "sample"


def with_whole_paths(config: RunConfig) -> RunConfig:
    """The config with whole paths in place of those that are relative to where the run is started.

    Names of the hub, and what is not there, stay as they are; so does the run folder.
    """
    tree = config.model_dump()
    model, correct, generate = tree["model"], tree["correct"], tree["generate"]
    corrector = correct["corrector"]
    places = [(tree["data"], ("train", "test", "root")), (model, ("student", "teacher"))]
    places += [(correct, ("similarity",)), (generate, ("scorer",)), (corrector, ("cache",))]
    if corrector["kind"] == "local":
        places.append((corrector, ("model",)))
    for section, keys in places:
        for key in keys:
            section[key] = _whole(section[key])
    return RunConfig.model_validate(tree)


def _whole(name: Any) -> Any:
    if name in (None, SAMPLE, DEMO):
        return name
    kind, colon, folder = name.rpartition("local-dir:")  # of a scorer
    return f"{kind}{colon}{os.path.abspath(folder)}" if os.path.exists(folder) else name


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
