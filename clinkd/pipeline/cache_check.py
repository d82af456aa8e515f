"""Whether a teacher's cache is whole and fits, and how far its loss is from the exact one."""

import random
from pathlib import Path
from typing import Any

from clinkd.config import load
from clinkd.data.collate import AnswerDataset
from clinkd.errors import ConfigError
from clinkd.pipeline.folder import RunFolder
from clinkd.pipeline.paths import data_root
from clinkd.pipeline.steps import (
    load_model,
    open_cache,
    shared_vocabulary,
    stage_records,
    start_of,
)
from clinkd.train.cache_error import cache_error
from clinkd.train.teachers import CachedRows


def check_cache(run: Path, records: int) -> dict[str, Any]:
    """Read all of a run's cache, and compare the loss of some records with the exact one.

    The student is the distilled one where it is done, else the start of distillation.

    Args:
        records: how many are drawn, by the run's seed.

    Returns:
        What the cache holds (`kind`, `records`, `shards`, `missing`, `bytes`), and where nothing is
        missing what `clinkd.train.cache_error` finds.

    Raises:
        ConfigError: the run uses no cache.
        ClinkdError: no stage has filled one yet.
        DataError: the cache does not fit the run, or is damaged; the message says what.
    """
    config = load(run / "config.yaml", [f"output={run}"])
    if config.distill.teacher_cache == "none":
        raise ConfigError(f"{run}: distill.teacher_cache is 'none', so there is nothing to check")
    folder = RunFolder(run, config)
    folder.require_done("pseudo-label")  # a cache is filled after it
    distilled = folder.student("distilled")
    start = str(distilled) if (distilled / "config.json").exists() else start_of(folder)
    student, processor = load_model(config, start)
    wanted = stage_records(folder, "distill")
    cache = open_cache(folder, wanted, processor)
    found: dict[str, Any] = {
        "kind": cache.spec.kind,
        "records": cache.spec.records,
        "shards": cache.spec.shards,
        "missing": len(cache.missing()),
        "bytes": sum(path.stat().st_size for path in cache.folder.iterdir()),
    }
    if not cache.whole():
        return found
    cache.verify()
    teacher, _ = load_model(config, str(folder.teacher))
    dataset = AnswerDataset(wanted, data_root(config.data), processor, config.distill.max_length)
    drawn = random.Random(config.seed).sample(range(len(wanted)), min(records, len(wanted)))
    rows = CachedRows(dataset, cache)
    tokens = shared_vocabulary(folder, processor)
    return found | cache_error(student.eval(), teacher, rows, drawn, config.distill, tokens)
