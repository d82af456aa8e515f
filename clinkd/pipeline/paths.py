"""Where the records and images of a configuration lie."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from clinkd.config import DEMO, SAMPLE, DataConfig, RunConfig
from clinkd.data.files import require_lines
from clinkd.errors import DataError
from clinkd.train.correction.similarity import MINILM, TOKEN_F1

SAMPLE_FOLDER = Path(__file__).parent.parent / "data" / "sample"


# keys that may hold a path, and what is none whatever lies there
_PLACES: dict[str, tuple[str, ...]] = {
    "data.train": (SAMPLE,),
    "data.test": (SAMPLE,),
    "data.root": (),
    "model.student": (DEMO,),
    "model.teacher": (DEMO,),
    "correct.similarity": (MINILM, TOKEN_F1),
    "correct.corrector.model": (),
    "correct.corrector.cache": (),
    "generate.scorer": (DEMO,),
}


def with_whole_paths(config: RunConfig) -> RunConfig:
    """The config with whole paths in place of those that are relative to where the run is started.

    Names of the hub, and what is not there, stay as they are; so does the run folder. What is not
    there any more has the path that the run folder's own config gives it.
    """
    tree, before = config.model_dump(), _read_config(Path(config.output))
    for place, names in _PLACES.items():
        *parents, key = place.split(".")
        section = _section(tree, parents)
        if section[key] is None or section[key] in names:
            continue
        if place == "correct.corrector.model" and section["kind"] != "local":
            continue
        is_path = key == "cache"  # which the first start makes
        section[key] = _whole(section[key], _section(before, parents).get(key), is_path)
    return RunConfig.model_validate(tree)


def _read_config(run: Path) -> Any:
    """The tree of the run folder's own config; None where there is none, or it is damaged."""
    try:
        return yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _section(tree: Any, parents: Sequence[str]) -> dict[str, Any]:
    for parent in parents:
        tree = tree.get(parent) if isinstance(tree, dict) else None
    return tree if isinstance(tree, dict) else {}


def _whole(name: str, before: Any, is_path: bool) -> str:
    kind, colon, folder = name.rpartition("local-dir:")  # of a scorer
    path = os.path.abspath(folder)
    if os.path.exists(folder):
        if not (os.path.exists(path) and os.path.samefile(folder, path)):
            path = os.path.realpath(folder)  # a `..` behind a link
    elif not is_path and before != f"{kind}{colon}{path}":
        return name
    return f"{kind}{colon}{path}"


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
