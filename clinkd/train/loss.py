"""A Hugging Face model whose forward returns the loss on answer tokens instead of logits."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from clinkd.config import DistillConfig
from clinkd.data.collate import IGNORE_INDEX
from clinkd.ops import KDLoss, linear_kd_loss


@contextmanager
def answer_forward(model: PreTrainedModel) -> Iterator[None]:
    """While open, `model(**batch)` returns a `KDLoss`; no logits outside answers are computed.

    The forward itself is replaced, not called around: data-parallel and ZeRO wrappers reduce and
    gather by hooks on it.
    """
    model.forward = MethodType(_forward, model)
    try:
        yield
    finally:
        del model.forward


def _forward(
    model: Any,
    *,
    labels: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher_weight: Tensor | None = None,
    kd: DistillConfig | None = None,
    num_items: Tensor | int | None = None,
    **inputs: Any,
) -> KDLoss:
    """Loss of one batch.

    Args:
        labels: [B, S], not shifted; `IGNORE_INDEX` outside the answers.
        teacher_hidden: [B, S, Ct] last hidden states of the teacher.
        teacher_weight: [Vt, Ct] its output head.
        kd: weight, temperature and divergence; None: cross-entropy alone.
        num_items: answer tokens of the whole optimiser step, over all processes.
    """
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()  # [B * (S - 1)]
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum().clamp(min=1)
    if kd is None:
        return _cross_entropy(hidden, model.lm_head.weight, targets, num_items)
    assert teacher_hidden is not None
    assert teacher_weight is not None
    return linear_kd_loss(
        hidden,
        model.lm_head.weight,
        teacher_hidden[:, :-1].flatten(0, 1),
        teacher_weight,
        targets,
        kd_weight=kd.kd_weight,
        temperature=kd.temperature,
        divergence=kd.divergence,
        num_items=num_items,
    )


def _cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, num_items: Tensor | int
) -> KDLoss:
    rows = (targets != IGNORE_INDEX).nonzero().squeeze(1)
    logits = F.linear(hidden[rows], weight).float()
    loss = F.cross_entropy(logits, targets[rows], reduction="sum") / num_items
    return KDLoss(loss=loss, ce=loss, kd=torch.zeros_like(loss))
