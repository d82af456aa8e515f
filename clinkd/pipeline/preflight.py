"""What a later stage would stumble over, found before the first one."""

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec

from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from clinkd.config import DEMO, RunConfig
from clinkd.data.collate import AnswerDataset
from clinkd.data.records import Record
from clinkd.errors import DataError, SetupError
from clinkd.evaluate.text.jars import package_folder, require_spice
from clinkd.evaluate.text.scene_graph import require_parser
from clinkd.generate import ClipScorer
from clinkd.positions import check_grids
from clinkd.rotary import PositionConfig
from clinkd.train.correction.similarity import require_similarity
from clinkd.train.correctors import make_corrector

ADAPTERS = {"lora": ("peft",), "qlora": ("peft", "bitsandbytes")}


def require_parts(config: RunConfig, test_records: Sequence[Record]) -> None:
    """Make sure that the parts which the configuration names are there.

    Raises:
        ConfigError, SetupError: one is not; how to get it.
    """
    kind = config.model.adapter.kind
    for package in ADAPTERS.get(kind, ()):
        if find_spec(package) is None:
            raise SetupError(
                f"model.adapter.kind={kind} needs {package}: pip install 'clinkd[{kind}]'"
            )
    if config.log.wandb and find_spec("wandb") is None:
        raise SetupError("log.wandb needs its package: pip install 'clinkd[wandb]'")
    if config.correct.rounds:
        require_similarity(config.correct.similarity)
        make_corrector(config.correct.corrector, cache="replies.jsonl", data_root=".")
    if config.generate.scorer != DEMO and config.generate.asks_scorer:
        ClipScorer.load(config.generate.scorer)
    if config.evaluate.meteor == "jar":
        package_folder()
    if config.evaluate.spice:
        require_spice()
    elif any(record.task == "RC" for record in test_records):
        require_parser()


def require_places(dataset: AnswerDataset, positions: PositionConfig) -> None:
    """Make sure that every image has a place in the positions, and no text holds image tokens.

    Raises:
        DataError: a record whose image is too long for its width, or whose text stands for patches;
            it is named.
    """
    images = dataset.processor.image_processor
    factor = images.patch_size * images.merge_size

    @lru_cache(maxsize=65536)
    def fault(width: int, height: int) -> str | None:
        sides = smart_resize(
            height, width, factor, images.size["shortest_edge"], images.size["longest_edge"]
        )
        try:
            grid = (sides[0] // factor, sides[1] // factor)
            check_grids([grid], positions.rule, positions.pos_scale)
        except ValueError as error:
            return str(error)
        return None

    for record in dataset.records:
        dataset.require_plain(record)
        for name, size in zip(record.images, dataset.image_sizes(record), strict=True):
            if why := fault(*size):
                raise DataError(
                    f"record {record.id!r}: image {name!r} is too long for its width: {why} "
                    "(model.positions.pos_scale), or leave the record out"
                )
