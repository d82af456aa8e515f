"""What several stages need: a model, its processor, records, the teacher's cache."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor, PreTrainedModel

from clinkd import models
from clinkd.config import DEMO, RunConfig
from clinkd.data.collate import AnswerDataset
from clinkd.data.files import read_jsonl
from clinkd.data.lengths import FitCheck
from clinkd.data.records import Record, read_records
from clinkd.data.select import limit_records
from clinkd.data.teacher_cache import TeacherCache
from clinkd.errors import ConfigError, SetupError
from clinkd.pipeline.folder import RunFolder
from clinkd.pipeline.paths import data_root
from clinkd.rotary import PositionConfig
from clinkd.train.adapter import quantisation
from clinkd.train.parallel import is_first
from clinkd.train.sharded import cut_while_loading
from clinkd.train.teachers import cache_spec

PATCHES = ("patch_size", "temporal_patch_size", "spatial_merge_size")  # of a vision tower


def start_of(folder: RunFolder) -> str:
    """The untrained student: a name or folder."""
    student = folder.config.model.student
    return str(folder.student("base")) if student == DEMO else student


def positions_of(config: RunConfig) -> PositionConfig:
    return PositionConfig(
        preset=config.model.positions.preset, pos_scale=config.model.positions.pos_scale
    )


def why_unread(name: str, error: Exception) -> str:
    """Why no model can be read by that name: of a folder in our words, else transformers'."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        return f"the folder holds no model{_holders(path, '*', '*/*')}"
    if not path.exists() and (name.count("/") > 1 or ("/" in name and path.parent.is_dir())):
        return f"there is no such folder{_holders(path.parent, '*')}"
    return str(error).splitlines()[0]


def _holders(folder: Path, *patterns: str) -> str:
    """The folders within one that hold a model, as the end of a sentence."""
    found = [p.parent for each in patterns for p in sorted(folder.glob(f"{each}/config.json"))]
    return f"; models are in {', '.join(map(str, found[:8]))}" if found else ""


def load_processor(config: RunConfig, path: str) -> Any:
    """A checkpoint's processor with the configured image sizes.

    Raises:
        SetupError: it cannot be read.
    """
    least, most = config.model.min_pixels, config.model.max_pixels
    size = {"shortest_edge": least, "longest_edge": most}
    try:
        # files of the hub have the same numbers by other names, which would come first
        processor = AutoProcessor.from_pretrained(
            path, size=size, min_pixels=least, max_pixels=most
        )
    except (OSError, ValueError) as error:
        raise SetupError(
            f"{path}: no processor can be read ({why_unread(path, error)}); give a checkpoint's "
            "folder, or a hub name"
        ) from None
    for name in ("size", "min_pixels", "max_pixels"):  # the tokenizer takes them for its own, and
        processor.tokenizer.init_kwargs.pop(name, None)  # has each call warn of them, and files
    taken = processor.image_processor.size
    if (taken["shortest_edge"], taken["longest_edge"]) != (least, most):
        raise SetupError(
            f"{path}: its image processor takes {taken}, not the run's model.min_pixels {least} "
            f"and model.max_pixels {most}"
        )
    return processor


def read_config(name: str) -> Any:
    """A checkpoint's model config.

    Raises:
        SetupError: it cannot be read.
    """
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise SetupError(
            f"{name}: no model config can be read ({why_unread(name, error)}); give a folder "
            "with config.json, or a hub name (HF_HUB_OFFLINE=1: of what was fetched before)"
        ) from None


def require_same_images(student: Any, teacher: Any, student_name: str, teacher_name: str) -> None:
    """Make sure that two models, given their configs, take one batch's images alike.

    Raises:
        ConfigError: they cut images otherwise, mark their places by another token, or are of two
            families, which write boxes each in their own form.
    """
    ours, theirs = (
        {name: getattr(c.vision_config, name) for name in PATCHES}
        | {"image_token_id": c.image_token_id, "model_type": c.model_type}
        for c in (student, teacher)
    )
    for name, value in ours.items():
        if theirs[name] != value:
            raise ConfigError(
                f"the teacher ({teacher_name}) has {name} {theirs[name]}, the student "
                f"({student_name}) {value}: they cannot learn from one batch; take two models of "
                "one family"
            )


def load_model(
    config: RunConfig, path: str, *, training: bool = False
) -> tuple[PreTrainedModel, Any]:
    """A model with its positions applied, and its processor.

    For training the weights are float32 whatever the arithmetic: bfloat16 would round most steps of
    a small learning rate away. With `model.adapter.kind` qlora they are 4 bits, and frozen. Under
    ZeRO-3 they are as DeepSpeed holds them, which has its own float32 ones, and cut at once.
    """
    if training and config.parallel.strategy == "zero3":
        numbers = config.model.dtype if torch.cuda.is_available() else "float32"
        return _load_cut(config, path, getattr(torch, numbers)), load_processor(config, path)
    dtype = torch.float32 if training else getattr(torch, config.model.dtype)
    extra = quantisation(config.model.adapter) if training else {}
    model = _placed(config, models.load(path, dtype=dtype, **extra))
    if torch.cuda.is_available() and not extra:
        model = model.cuda()
    return model, load_processor(config, path)


def _placed(config: RunConfig, model: PreTrainedModel) -> PreTrainedModel:
    """The model with the run's positions, whatever its checkpoint was trained with.

    The `base` of the ladders, which no run names, stays the checkpoint's.
    """
    found, wanted = models.positions_of(model.config), positions_of(config)
    if found is not None and found.preset == wanted.preset:
        wanted = replace(wanted, base=found.base)
    return model if found == wanted else models.apply(model, wanted)


def _load_cut(
    config: RunConfig, path: str, dtype: torch.dtype, *, offload: bool = False
) -> PreTrainedModel:
    """This process's share of a model."""
    with cut_while_loading(dtype, offload):
        model: Any = _placed(config, models.load(path, dtype=dtype))
    # on this way transformers keeps renamings that loading did not need; a save would apply them
    model._weight_conversions = None
    return model


def load_teacher(config: RunConfig, path: str) -> PreTrainedModel:
    """A frozen teacher to be asked live: whole, or this process's share of it."""
    place = config.parallel.teacher_place
    if place == "whole":
        return load_model(config, path)[0]
    dtype = getattr(torch, config.model.dtype)
    return _load_cut(config, path, dtype, offload=place == "offloaded")


def shared_vocabulary(folder: RunFolder, processor: Any) -> int:
    """Tokens that student and teacher both have; a head may have rows for more, or for padding."""
    theirs = load_processor(folder.config, str(folder.teacher)).tokenizer
    return min(len(processor.tokenizer), len(theirs))


def uses_cache(config: RunConfig) -> bool:
    """Whether distillation reads the teacher from files."""
    settings = config.distill
    return settings.teacher_cache != "none" and settings.pseudo_labels != "hard"


def asks_live(config: RunConfig) -> bool:
    """Whether distillation asks the teacher about each batch."""
    return config.distill.pseudo_labels != "hard" and not uses_cache(config)


def stage_records(folder: RunFolder, stage: str) -> list[Record]:
    """What a training stage learns from."""
    if stage == "teacher":
        return read_records(folder.data("teacher"))
    if stage != "distill":
        return read_records(folder.correction(int(stage.split("-")[1])) / "data.jsonl")
    return _distill_records(folder, folder.config.distill.min_confidence)


def _distill_records(folder: RunFolder, least: float) -> list[Record]:
    records = read_records(folder.data("train"))
    if folder.config.distill.pseudo_labels != "soft":
        records += _hard_labels(folder, records, least)
    return records


def _hard_labels(folder: RunFolder, records: Sequence[Record], least: float) -> list[Record]:
    """Records that carry the teacher's confident answers in place of the truth."""
    by_id = {record.id: record for record in records}
    check = fit_check(folder, start_of(folder), folder.config.distill.max_length)
    out: list[Record] = []
    unfit: list[str] = []
    for row in read_jsonl(folder.path / "pseudo" / "labels.jsonl"):
        if row["confidence"] >= least and row["response"].strip():
            record = by_id[row["id"]].answered(row["response"])
            record = replace(record, id=f"{record.id}#pseudo")
            if why := check.why_not(record):
                unfit.append(why)
            else:
                out.append(record)
    if unfit and is_first():
        first, more = unfit[0], f" (and {len(unfit) - 1} more)" if len(unfit) > 1 else ""
        warnings.warn(f"pseudo-labels left out: {first}{more}", stacklevel=2)
    return out


def fit_check(folder: RunFolder, start: str, max_length: int) -> FitCheck:
    """What tells whether a text that a model wrote can be learned from."""
    config = folder.config
    processor = load_processor(config, start)
    return FitCheck(AnswerDataset([], data_root(config.data), processor, max_length))


def asked_records(folder: RunFolder, name: str) -> list[Record]:
    """What a model answers: `train`, `test`, or `correct-k`: those that round k asks."""
    if name in ("train", "test"):
        return read_records(folder.data(name))
    config = folder.config
    round_ = int(name.split("-")[1])
    records = read_records(folder.data("train"))
    return limit_records(records, config.correct.records_limit, config.seed + round_)


def cached_records(folder: RunFolder) -> list[Record]:
    """What the run's teacher cache is of: what distillation learns from, or more than that."""
    return _distill_records(folder, _cached_confidence(folder))


def _cached_confidence(folder: RunFolder) -> float:
    """The `min_confidence` of the run's cache: a lower one that it was made for does as well."""
    ours = folder.config.distill.min_confidence
    try:
        manifest = json.loads((_cache_folder(folder) / "manifest.json").read_text("utf-8"))
        return min(ours, float(manifest["sources"]["min_confidence"]))
    except (OSError, ValueError, TypeError, KeyError):
        return ours  # none there, or one that is refused as it is opened


def _cache_folder(folder: RunFolder) -> Path:
    settings = folder.config.distill
    top_k = f"top-{settings.teacher_top_k}-at-{settings.temperature:g}"
    name = top_k if settings.teacher_cache == "top-k" else "hidden"
    return folder.path / "teacher-cache" / name


def open_cache(folder: RunFolder, records: Sequence[Record], processor: Any) -> TeacherCache:
    """The run's teacher cache for its settings, whole or not, to be read for `records`.

    Args:
        records: all that distillation learns from, or all of `cached_records`.

    Raises:
        DataError: what is there was made from something else.
    """
    config, least = folder.config, _cached_confidence(folder)
    kept = records if least == config.distill.min_confidence else cached_records(folder)
    made = config.distill.model_copy(update={"min_confidence": least})
    root = data_root(config.data)
    spec = cache_spec(made, config.model, kept, root, processor, folder.teacher)
    place = {record.id: index for index, record in enumerate(kept)}
    return TeacherCache(_cache_folder(folder), spec, [place[record.id] for record in records])
