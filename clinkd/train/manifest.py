"""Which checkpoints are whole: a manifest of the files of each, and LATEST beside them."""

import json
import os
import re
from pathlib import Path
from typing import Any

from clinkd.data.files import sha256_file, sync_folder, sync_tree, write_text
from clinkd.errors import SetupError

MANIFEST = "manifest.json"
LATEST = "LATEST"
_NAME = re.compile(r"checkpoint-[0-9]+")


def seal(folder: Path, made_by: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint, after all else in it is on the disk.

    Args:
        made_by: what a resumption must be alike in.
    """
    sync_tree(folder)
    files = {
        path.relative_to(folder).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": sha256_file(path),
        }
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_text(folder / MANIFEST, json.dumps({"made_by": made_by, "files": files}, indent=1))


def publish(staged: Path, target: Path) -> None:
    """Give a sealed checkpoint its name, then name it in LATEST."""
    os.replace(staged, target)
    sync_folder(target.parent)
    write_text(target.parent / LATEST, target.name + "\n")


def fault_of(checkpoint: Path) -> str | None:
    """Why a checkpoint is not as it was sealed; None where it is."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, sealed in files.items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != sealed["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, not {sealed['bytes']}"
            if sha256_file(path) != sealed["sha256"]:
                return f"the checksum of {name} is wrong"
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} cannot be read"
    return None


def checkpoints(root: Path) -> dict[int, Path]:
    """The checkpoints by step, in order; a copy put aside under another name is none."""
    found = {
        int(path.name.removeprefix("checkpoint-")): path
        for path in root.glob("checkpoint-*")
        if _NAME.fullmatch(path.name) and path.is_dir()
    }
    return dict(sorted(found.items()))


def latest_whole(root: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from: LATEST's, or the newest that is whole; and what is wrong.

    Raises:
        SetupError: there are checkpoints, and none is whole.
    """
    candidates = list(reversed(checkpoints(root).values()))
    if (root / LATEST).is_file():
        name = (root / LATEST).read_text(encoding="utf-8", errors="replace").strip()
        candidates.sort(key=lambda path: path.name != name)
    problems: list[str] = []
    for path in candidates:
        reason = fault_of(path)
        if reason is None:
            return path, problems
        problems.append(f"{path}: damaged, {reason}")
    if problems:
        raise SetupError(
            f"{'; '.join(problems)}; no other checkpoint is whole: delete {root} to train this "
            "stage from its start"
        )
    return None, []


def require_same_run(checkpoint: Path, made_by: dict[str, Any]) -> None:
    """A step is so many records of each process, and optimiser states are cut by the strategy.

    Raises:
        SetupError: the checkpoint was made in another way.
    """
    before = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["made_by"]
    for name, value in made_by.items():
        if before.get(name) != value:
            raise SetupError(
                f"{checkpoint}: made with parallel.{name}={before.get(name)}, this run has "
                f"{value}; set it back, or delete {checkpoint.parent} to train this stage from "
                "its start"
            )
