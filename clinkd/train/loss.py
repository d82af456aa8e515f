"""A Hugging Face model whose forward returns the loss on answer tokens instead of logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from clinkd.config import DistillConfig
from clinkd.ops import KDLoss, linear_kd_loss, linear_topk_kd_loss
from clinkd.train.adapter import inner_model
from clinkd.train.teachers import answer_rows, last_hidden


@contextmanager
def answer_forward(
    model: PreTrainedModel, vocabulary: int, *, whole_tower: bool = False
) -> Iterator[None]:
    """While open, `model(**batch)` returns a `KDLoss`; no logits outside answers are computed.

    The forward itself is replaced, not called around: data-parallel and ZeRO wrappers reduce and
    gather by hooks on it.

    Args:
        vocabulary: tokens; rows of the head from there on, which pad it, take no part.
        whole_tower: as for `last_hidden`.
    """
    model.forward = MethodType(
        partial(_forward, vocabulary=vocabulary, whole_tower=whole_tower), model
    )
    try:
        yield
    finally:
        del model.forward


def _forward(
    model: Any,
    *,
    labels: Tensor,
    teacher: dict[str, Tensor] | None = None,
    kd: DistillConfig | None = None,
    num_items: Tensor | int | None = None,
    vocabulary: int,
    whole_tower: bool,
    **inputs: Any,
) -> KDLoss:
    """Loss of one batch.

    Args:
        labels: [B, S], not shifted; `IGNORE_INDEX` outside the answers.
        teacher: what it says at the answer tokens, see `clinkd.train.teachers.Teacher`.
        kd: weight, temperature and divergence; None: cross-entropy alone.
        num_items: answer tokens of the whole optimiser step, over all processes.
        vocabulary, whole_tower: as for `answer_forward`.
    """
    model = inner_model(model)
    hidden = last_hidden(model, inputs, whole_tower=whole_tower)
    rows = answer_rows(labels)
    hidden = hidden[:, :-1].flatten(0, 1)[rows]  # [n, C]
    targets = labels[:, 1:].flatten()[rows]  # [n]
    weight = model.lm_head.weight
    if num_items is None:
        num_items = max(1, len(targets))
    if kd is None or teacher is None:
        return _cross_entropy(hidden, weight, targets, num_items, vocabulary)
    options: dict[str, Any] = {
        "kd_weight": kd.kd_weight,
        "temperature": kd.temperature,
        "divergence": kd.divergence,
        "num_items": num_items,
        "vocab_size": min(vocabulary, len(weight)),
    }
    if "hidden" in teacher:
        whole = (teacher["hidden"], teacher["weight"])
        return linear_kd_loss(hidden, weight, *whole, targets, **options)
    top = (teacher["logits"], teacher["ids"], teacher["lse"])
    return linear_topk_kd_loss(hidden, weight, *top, targets, **options)


def _cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, num_items: Tensor | int, vocabulary: int
) -> KDLoss:
    logits = F.linear(hidden, weight)[:, :vocabulary].float()
    loss = F.cross_entropy(logits, targets, reduction="sum") / num_items
    return KDLoss(loss=loss, ce=loss, kd=torch.zeros_like(loss))
