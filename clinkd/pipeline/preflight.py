"""What a later stage would miss, found before the first one: packages, models, keys."""

from collections.abc import Sequence
from importlib.util import find_spec

from clinkd.config import DEMO, RunConfig
from clinkd.data.records import Record
from clinkd.errors import SetupError
from clinkd.evaluate.text.jars import require_spice
from clinkd.evaluate.text.scene_graph import require_parser
from clinkd.generate import ClipScorer
from clinkd.train.correction.similarity import make_similarity
from clinkd.train.correctors import make_corrector

ADAPTERS = {"lora": "peft", "qlora": "bitsandbytes"}


def require_parts(config: RunConfig, test_records: Sequence[Record]) -> None:
    """Make sure that the parts which the configuration names are there.

    Raises:
        ConfigError, SetupError: one is not; how to get it.
    """
    kind = config.model.adapter.kind
    for adapter, package in ADAPTERS.items():
        if kind == adapter and find_spec(package) is None:
            raise SetupError(
                f"model.adapter.kind={kind} needs {package}: pip install 'clinkd[{kind}]'"
            )
    if config.log.wandb and find_spec("wandb") is None:
        raise SetupError("log.wandb needs its package: pip install 'clinkd[wandb]'")
    if config.correct.rounds:
        make_similarity(config.correct.similarity)
        make_corrector(config.correct.corrector, cache="replies.jsonl", data_root=".")
    if config.generate.scorer != DEMO and config.generate.asks_scorer:
        ClipScorer.load(config.generate.scorer)
    if config.evaluate.spice:
        require_spice()
    elif any(record.task == "RC" for record in test_records):
        require_parser()
