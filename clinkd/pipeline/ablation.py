"""The paper's Table 2 on any data: the parts of the method switched on one by one, and together.

Every cell is a run of its own, in a folder of its own. Stages that two cells have in common, by
their fingerprints, are done once and linked into the other's folder.
"""

import json
import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clinkd.config import RunConfig
from clinkd.data.files import write_json, write_text
from clinkd.data.records import TASKS
from clinkd.errors import ConfigError
from clinkd.evaluate.selected import part_label
from clinkd.evaluate.tables import ablation_table, render
from clinkd.pipeline.folder import OWNED, STAGES, RunFolder, fingerprints
from clinkd.pipeline.inputs import read_inputs
from clinkd.pipeline.paths import records_file, with_whole_paths
from clinkd.pipeline.runner import run
from clinkd.progress import Console, ignore

# name → the parts of the method that are on
CELLS: dict[str, tuple[str, ...]] = {
    "base": (),
    "mcg-rope": ("positions",),
    "kd": ("distill",),
    "correction": ("correct",),
    "sasg": ("generate",),
    "all": ("positions", "distill", "correct", "generate"),
}
# what each part is when it is off
_OFF: dict[str, dict[str, Any]] = {
    "positions": {"preset": "mrope"},
    "distill": {"kd_weight": 0.0},
    "correct": {"rounds": 0},
    "generate": {"selection": "beam"},
}


def cell_labels(selection: str = "clip") -> dict[str, str]:
    """Names of the cells; `selection` is that of the cells whose answers are chosen."""
    chosen = part_label(selection)
    return {
        "base": "Base: fine-tuned, M-RoPE",
        "mcg-rope": "+ MCG-RoPE",
        "kd": "+ KD",
        "correction": "+ correction",
        "sasg": f"+ {chosen}",
        "all": "All four" if chosen == "SASG" else f"All four, with {chosen}",
    }


def cell_config(config: RunConfig, cell: str, seed: int, output: Path) -> RunConfig:
    """The run of one cell: `config` is the cell `all`; the others have parts switched off.

    Raises:
        ConfigError: a part is off in `config` already, so that its cell would be the base again.
    """
    tree = config.model_dump(mode="json")
    sections = {name: tree[name] for name in ("distill", "correct", "generate")}
    sections["positions"] = tree["model"]["positions"]
    for part, off in _OFF.items():
        for key, value in off.items():
            if sections[part][key] == value:
                place = f"model.{part}" if part == "positions" else part
                raise ConfigError(
                    f"{place}.{key} is {value!r}: that part is off; an ablation starts from a "
                    "config with every part on"
                )
        if part not in CELLS[cell]:
            sections[part].update(off)
    if config.distill.pseudo_labels != "soft":
        raise ConfigError("an ablation needs distill.pseudo_labels: soft; without KD none is used")
    tree["seed"], tree["output"] = seed, str(output)
    return RunConfig.model_validate(tree)


def ablate(
    config: RunConfig,
    console: Console,
    output: Path,
    seeds: Sequence[int],
    *,
    update: bool = False,
) -> dict[str, Any]:
    """Run every cell with every seed, and write ablation.json and ablation.md.

    What is done is skipped, so that a run that was cut off goes on where it was.

    Raises:
        ConfigError: see `cell_config`; or no seed, one twice, or one below 0; or, without `update`,
            cells that were done with other settings or from other data.
    """
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(
            f"seeds must be different numbers from 0 on, at least one; got {list(seeds)}"
        )
    for split in ("train", "test"):
        records_file(getattr(config.data, split), split)
    grid = [(seed, cell) for seed in seeds for cell in CELLS]
    runs = {
        (seed, cell): with_whole_paths(
            cell_config(config, cell, seed, output / f"seed-{seed}" / cell)
        )
        for seed, cell in grid
    }
    labels = cell_labels(config.generate.selection)
    scores: dict[str, dict[int, Any]] = {cell: {} for cell in CELLS}
    for number, (seed, cell) in enumerate(grid, start=1):
        console.print(f"cell {number} of {len(grid)}: {labels[cell]}, seed {seed}")
        mine = runs[seed, cell]
        earlier = [runs[seed, name] for name in CELLS if name != cell]
        with RunFolder.open(mine, update=update) as folder:
            folder.write_config()
            inputs = read_inputs(mine, output, ignore)  # each image once for all cells
            inputs.save(output)
            inputs.save(folder.path)
            marks = fingerprints(mine, inputs.hashes)
            _share(folder, marks, [Path(other.output) for other in earlier])
        done = run(mine, console, last="evaluate", update=update)
        metrics = json.loads((done.path / "metrics.json").read_text(encoding="utf-8"))
        scores[cell][seed] = metrics["models"]["sasg"]  # the run's last answers
    result = summarise(scores, config.generate.selection)
    write_json(output / "ablation.json", result)
    write_text(output / "ablation.md", render(ablation_table(result), "markdown") + "\n")
    return result


def _share(folder: RunFolder, marks: Mapping[str, str], others: Sequence[Path]) -> None:
    """Link the stages that another cell has done under the same fingerprint into this folder."""
    for stage in STAGES[: STAGES.index("evaluate")]:
        entry = folder.book()["stages"].get(stage, {})
        if entry.get("fingerprint") == marks[stage]:
            continue  # done here, or under way
        source = next((path for path in others if _has(path, stage, marks[stage])), None)
        if source is None:
            return  # stages build on each other
        folder.clear(stage)
        for pattern in OWNED[stage]:
            for path in source.glob(pattern):
                _link(path, folder.path / path.relative_to(source))
        _share_log(source / "metrics.jsonl", folder.path / "metrics.jsonl", stage)
        folder.note(stage, **_stages(source)[stage])


def _stages(path: Path) -> dict[str, Any]:
    try:
        book = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    stages: dict[str, Any] = book["stages"]
    return stages


def _has(path: Path, stage: str, mark: str) -> bool:
    entry = _stages(path).get(stage, {})
    return bool(entry.get("status") == "done" and entry.get("fingerprint") == mark)


def _link(source: Path, target: Path) -> None:
    """Hard links where the file system has them; no stage changes a file of an earlier one."""
    if source.is_dir():
        shutil.copytree(source, target, copy_function=_link_file)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        _link_file(source, target)


def _link_file(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


_LOGGED = {"prepare": "clip", "teacher": "teacher", "distill": "distill", "correct": "correct-"}


def _share_log(source: Path, target: Path, stage: str) -> None:
    """Take a stage's lines of the training log along, in place of those that are there already.

    A kill before the stage was noted leaves them there, and this is done again.
    """
    mark = _LOGGED.get(stage)
    if mark is None or not source.exists():
        return
    mine = [line for stage, line in _log_lines(source) if stage.startswith(mark)]
    kept = [line for stage, line in _log_lines(target) if not stage.startswith(mark)]
    write_text(target, "".join([*kept, *mine]))


def _log_lines(path: Path) -> list[tuple[str, str]]:
    """Stage and line of what a training log holds; a line that a kill cut in half is left out."""
    if not path.exists():
        return []
    out = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            out.append((str(json.loads(line)["stage"]), line + "\n"))
        except (ValueError, TypeError, KeyError):
            continue
    return out


def summarise(scores: Mapping[str, Mapping[int, Any]], selection: str = "clip") -> dict[str, Any]:
    """Mean and standard deviation (of a sample, n - 1) of each cell over its seeds, in percent.

    Args:
        scores: cell → seed → a model of metrics.json.
        selection: `generate.selection` of the cell `all`.
    """
    labels = cell_labels(selection)
    cells: dict[str, Any] = {}
    for cell, by_seed in scores.items():
        models = list(by_seed.values())
        tasks = [task for task in TASKS if all(task in model["tasks"] for model in models)]
        values = {task: [float(m["tasks"][task]["score"]) for m in models] for task in tasks}
        values["Average"] = [float(model["average"]) for model in models]
        cells[cell] = {
            "label": labels[cell],
            "metrics": {task: models[0]["tasks"][task]["metric"] for task in tasks},
            "seeds": sorted(by_seed),
            "scores": {
                name: {
                    "values": each,
                    "mean": round(statistics.fmean(each), 2),
                    "sd": round(statistics.stdev(each), 2) if len(each) > 1 else None,
                }
                for name, each in values.items()
            },
        }
    return {"cells": cells}
