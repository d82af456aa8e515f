"""Bytes on one device at the peak of a training step, by part.

The formulas count what each layer of these architectures keeps for its backward pass, tensor by
tensor; `tests/plan` compares their sum with measured peaks.
"""

from dataclasses import dataclass, replace
from typing import Any

from clinkd.config import DistillConfig, RunConfig, TrainConfig
from clinkd.ops._row_chunks import auto_rows
from clinkd.plan.sizes import ModelSize, RecordSize

BUCKET = 500_000_000  # numbers of gradients that DeepSpeed reduces at a time, its default
LIVE = 1_000_000_000  # stage3_max_live_parameters in configs/deepspeed/zero3.json
PARTS = ("weights", "gradients", "optimiser", "activations", "loss", "teacher")


@dataclass(frozen=True)
class Numbers:
    """Bytes of a number, by where it stands.

    Attributes:
        weight: of a weight and its gradient.
        stream: of the residual stream.
        linear: of what goes into and comes out of a matrix product.
        norm: of all that a norm keeps, a channel.
    """

    weight: int
    stream: int
    linear: int
    norm: int


FLOAT32 = Numbers(weight=4, stream=4, linear=4, norm=8)
AUTOCAST = Numbers(weight=4, stream=4, linear=2, norm=6)  # bfloat16 products of float32 weights
BFLOAT16 = Numbers(weight=2, stream=2, linear=2, norm=8)  # DeepSpeed's, float32 copies apart


def numbers(config: RunConfig) -> Numbers:
    """Of training on a GPU as the config asks for it."""
    if config.model.dtype == "float32":
        return FLOAT32
    return AUTOCAST if config.parallel.strategy == "ddp" else BFLOAT16


def device_memory(
    size: ModelSize,
    teacher: ModelSize | None,
    records: RecordSize,
    settings: TrainConfig,
    config: RunConfig,
    world: int = 1,
    *,
    cached: ModelSize | None = None,
    kind: Numbers | None = None,
    cuda: bool = True,
) -> dict[str, int]:
    """Bytes of each of `PARTS` at the peak of a step, on one of `world` devices.

    Args:
        teacher: one that is asked live; None for another stage, or a cache.
        records: each of a batch is taken to be the longest.
        settings: of the stage.
        cached: a teacher whose hidden states come from a file: its head makes logits of them.
        kind: default: as on a GPU.
    """
    kind = kind or numbers(config)
    if settings.packing:
        records = _in_rows(records, settings.max_length)
    strategy, adapter = config.parallel.strategy, config.model.adapter
    stage = {"ddp": 0, "zero1": 1, "zero2": 2, "zero3": 3}[strategy]

    def share(number: float, since: int) -> int:
        return int(number / (world if stage >= since else 1))

    # 4 bits of each layer's matrices; embedding and head stay as they are
    quantised = size.linear - size.head if adapter.kind == "qlora" else 0
    weights = share(quantised * 0.5 + (size.total - quantised) * kind.weight, 3)
    if stage == 3 and world > 1:
        weights += min(size.total, LIVE) * kind.weight  # gathered for the layers at work
    if kind is AUTOCAST:
        weights += 2 * (size.linear - quantised)  # autocast's copies
    gradients = share(size.trained * kind.weight, 2)
    if strategy == "ddp" and world > 1:
        gradients *= 2  # and the buckets that are sent
    elif strategy in ("zero1", "zero2"):
        gradients += 2 * min(size.trained, BUCKET) * kind.weight  # one is sent, one is filled
    states = 8 + (4 if kind is BFLOAT16 else 0)  # Adam's two, and float32 weights beside bfloat16
    optimiser = 0 if config.parallel.offload else share(size.trained * states, 1)
    kept = activations(size, records, settings, config, kind)
    loss = loss_workspace(size, teacher or cached, records, settings, kind, cuda)
    told = _teacher(teacher, config, world) if teacher else 0
    told += cached.head * _teacher_bytes(config) if cached else 0
    # gradients come as activations go: with one micro-batch the two are never whole together
    if settings.gradient_accumulation == 1 and strategy == "ddp" and world == 1:
        head = size.head * kind.weight if not size.adapters else 0
        after = max(0, gradients - head)  # those that the backward pass is still to make
        if kept + loss >= after:
            gradients = head
        else:
            kept, loss = 0, 0
    return {
        "weights": weights,
        "gradients": gradients,
        "optimiser": optimiser,
        "activations": kept,
        "loss": loss,
        "teacher": told,
    }


def _in_rows(records: RecordSize, limit: int) -> RecordSize:
    """Full rows of the longest records, each row as one record."""
    many = max(1, limit // records.length)
    whole = {"answer": records.answer * many, "patches": records.patches * many}
    return replace(records, length=limit, **whole)


def _teacher(size: ModelSize, config: RunConfig, world: int) -> int:
    """A live teacher: whole; or a share with what is gathered at a time; and its head whole."""
    number = _teacher_bytes(config)
    place = config.parallel.teacher_place
    if place == "whole":
        return size.total * number
    share = 0 if place == "offloaded" else size.total // world
    return (share + min(size.total - size.words, LIVE) + size.head) * number


def _teacher_bytes(config: RunConfig) -> int:
    """Of one of its numbers."""
    return 2 if config.model.dtype == "bfloat16" else 4


def activations(
    size: ModelSize, records: RecordSize, settings: TrainConfig, config: RunConfig, kind: Numbers
) -> int:
    """What the forward pass keeps, and what one recomputed layer adds."""
    text = size.config.text_config
    tokens, patches = records.length * settings.batch_size, records.patches * settings.batch_size
    layer, block = text_layer(text, kind), vision_block(size.config, kind)
    if size.adapters and config.model.adapter.dropout:
        layer += _dropout(text, kind)
    C, V = text.hidden_size, size.config.vision_config
    width = _vision_width(V)
    depth, layers = V.depth, text.num_hidden_layers
    ends = tokens * C * (2 * kind.stream + kind.norm)  # embeddings with images put in; last norm
    trained_vision = not (config.model.freeze_vision or size.adapters)
    seen = patches * (3 * width * kind.linear + _pixels(V) * 4)
    if settings.gradient_checkpointing:
        kept = layers * tokens * C * kind.stream
        kept += depth * patches * width * kind.stream if trained_vision else 0
        passing = max(tokens * layer, patches * block if trained_vision else 0)
    else:
        kept = layers * tokens * layer + (depth * patches * block if trained_vision else 0)
        passing = 0
    if not trained_vision:
        passing = max(passing, patches * block - kept)
    return int(kept + ends + seen + passing)


def text_layer(text: Any, kind: Numbers) -> int:
    """Bytes a token that a language layer keeps."""
    C, F, D = _widths(text)
    q, k = int(text.num_attention_heads) * D, int(text.num_key_value_heads) * D
    norms = 2 * C * kind.norm
    if "qwen3" in text.model_type:  # of queries and keys
        norms += (q + k) * (kind.linear + kind.norm)
    # turned queries and keys, values, what attention gives; gate, its SiLU, up, their product
    return 2 * C * kind.stream + norms + (2 * q + 2 * k + 4 * F) * kind.linear


def vision_block(config: Any, kind: Numbers) -> int:
    """Bytes a patch that a block of the vision tower keeps."""
    vision = config.vision_config
    C = _vision_width(vision)
    if "qwen2_5" in config.model_type:
        F, inner, norm = int(vision.intermediate_size), 4, kind.norm
    elif "qwen3" in config.model_type:
        F, inner, norm = int(vision.intermediate_size), 2, kind.linear
    else:
        F, inner, norm = int(C * vision.mlp_ratio), 3, kind.linear
    # queries, keys and values as they come, the first two turned, attention image by image, joined
    return 2 * C * (kind.stream + norm) + (7 * C + inner * F) * kind.linear


def _dropout(text: Any, kind: Numbers) -> int:
    """Inputs of the adapters of a layer, each with its own dropout and mask."""
    C, F, D = _widths(text)
    return (5 * C + int(text.num_attention_heads) * D + F) * (kind.linear + 1)


def _widths(text: Any) -> tuple[int, int, int]:
    """Channels, those inside the MLP, and of a head."""
    C = int(text.hidden_size)
    D = getattr(text, "head_dim", None) or C // text.num_attention_heads
    return C, int(text.intermediate_size), int(D)


def _vision_width(vision: Any) -> int:
    return int(getattr(vision, "embed_dim", None) or vision.hidden_size)


def _pixels(vision: Any) -> int:
    return int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)


def loss_workspace(
    size: ModelSize,
    teacher: ModelSize | None,
    records: RecordSize,
    settings: TrainConfig,
    kind: Numbers,
    cuda: bool,
) -> int:
    """Logits of a chunk of rows (without a teacher: of all answer tokens), the head's gradient."""
    rows = records.answer * settings.batch_size
    V = int(size.config.text_config.vocab_size)
    head = 0 if size.adapters else size.head
    if not isinstance(settings, DistillConfig) or settings.pseudo_labels == "hard":
        return rows * V * (kind.linear + 3 * 4)
    other = int(teacher.config.text_config.vocab_size) if teacher else V
    both = (V + other) * kind.linear
    chunk = min(rows, auto_rows(both, cuda))
    # the gradient of several chunks is added up in float32
    return int(chunk * both + head * (4 if chunk < rows else kind.weight))
