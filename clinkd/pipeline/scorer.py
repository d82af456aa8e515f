"""The CLIP model that chooses among answers: trained on the run's records, or looked for."""

from collections.abc import Callable, Sequence

from clinkd import generate
from clinkd.config import DEMO
from clinkd.data.records import Record
from clinkd.pipeline.folder import RunFolder
from clinkd.pipeline.paths import data_root
from clinkd.progress import Update
from clinkd.train.log import MetricsLog


def ready_scorer(
    folder: RunFolder, records: Callable[[], Sequence[Record]], progress: Update
) -> None:
    """Train the small CLIP, or make sure that another one is there, unless that was done.

    `prepare` does it early; `generate` again where another scorer was chosen since, as nothing that
    learns depends on it.

    Args:
        records: gives the training split.

    Raises:
        ConfigError, SetupError: the scorer cannot be loaded.
        DataError: the records are none to train one on.
    """
    settings = folder.config.generate
    wanted = [settings.scorer, settings.scorer_steps]
    done = folder.book()["stages"].get("prepare", {}).get("scorer")
    if not settings.asks_scorer or done == wanted:
        return
    folder.note("prepare", scorer=None)  # what there was does not last if this one is cut off
    if settings.scorer == DEMO:
        log = MetricsLog(folder.path / "metrics.jsonl")
        log.forget("clip")
        generate.train_clip(
            records(),
            data_root(folder.config.data),
            folder.scorer,
            steps=settings.scorer_steps,
            seed=folder.config.seed,
            log=log.append,
            progress=progress,
        )
    else:
        generate.ClipScorer.load(settings.scorer)
    folder.note("prepare", scorer=wanted)
