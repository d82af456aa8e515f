"""How far the distillation term from a teacher's cache is from that of the teacher itself."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from clinkd.config import DistillConfig
from clinkd.data.collate import collate
from clinkd.ops.reference.kd_loss import kd_loss_rows
from clinkd.ops.reference.topk_kd_loss import topk_kd_loss_rows
from clinkd.train.teachers import CachedRows, CachedTeacher, LiveTeacher, answer_rows


def cache_error(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: CachedRows,
    drawn: Sequence[int],
    settings: DistillConfig,
    vocabulary: int | None = None,
) -> dict[str, Any]:
    """Figures over the answer tokens of some records, at the settings' temperature and divergence.

    Args:
        rows: records with their rows of the cache.
        drawn: places of the records to look at.
        vocabulary: tokens that teacher and student both have; default: all of the student's.

    Returns:
        `tokens`, `kd_exact` and `kd_cached` (means), `kd_error_mean` and `kd_error_max` (of single
        tokens), `gradient_error` (length of the difference over length of the exact gradient of
        the student's logits), and for top-k `mass` and `mass_least`, the teacher's probability
        inside the kept logits.
    """
    options: dict[str, Any] = {
        "temperature": settings.temperature,
        "divergence": settings.divergence,
    }
    tokenizer = rows.dataset.processor.tokenizer
    vocabulary = len(tokenizer) if vocabulary is None else vocabulary
    live, cached = LiveTeacher(teacher, vocabulary), CachedTeacher(rows.cache)
    pad = partial(collate, pad_token_id=tokenizer.pad_token_id)
    exact, kept, masses = [], [], []
    gradient = difference = 0.0
    for place in drawn:
        batch = {name: t.to(student.device) for name, t in pad([rows[place]]).items()}
        said, truth = cached(batch), live(batch)
        z, targets = _student_logits(student, batch, len(tokenizer))
        kd, grad = _with_gradient(z, targets, truth, options)
        kd_kept, grad_kept = _with_gradient(z, targets, said, options)
        exact.append(kd)
        kept.append(kd_kept)
        gradient += float(grad.square().sum())
        difference += float((grad - grad_kept).square().sum())
        if "logits" in said:
            inside = said["logits"] / settings.temperature - said["lse"][:, None]
            masses.append(inside.exp().sum(dim=1))
    a, b = torch.cat(exact), torch.cat(kept)
    found = {
        "tokens": len(a),
        "kd_exact": a.mean().item(),
        "kd_cached": b.mean().item(),
        "kd_error_mean": (a - b).abs().mean().item(),
        "kd_error_max": (a - b).abs().max().item(),
        "gradient_error": (difference / gradient) ** 0.5 if gradient else 0.0,
    }
    if masses:
        mass = torch.cat(masses)
        found |= {"mass": mass.mean().item(), "mass_least": mass.min().item()}
    return found


@torch.no_grad()
def _student_logits(
    student: Any, batch: dict[str, Tensor], vocabulary: int
) -> tuple[Tensor, Tensor]:
    """Logits [n, V] and labels [n] of the answer tokens."""
    labels = batch["labels"]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    rows = answer_rows(labels)
    hidden = student.model(**inputs, use_cache=False).last_hidden_state
    logits = student.lm_head(hidden[:, :-1].flatten(0, 1)[rows])[:, :vocabulary]
    return logits.float(), labels[:, 1:].flatten()[rows]


def _with_gradient(
    z: Tensor, targets: Tensor, said: dict[str, Tensor], options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """KD of each token [n], and its gradient by the logits."""
    z = z.detach().requires_grad_()
    if "hidden" in said:
        t = F.linear(said["hidden"], said["weight"]).float()
        _, kd = kd_loss_rows(z, t, targets, **options)
    else:
        top = (said["logits"], said["ids"], said["lse"])
        _, kd = topk_kd_loss_rows(z, *top, targets, **options)
    return kd.detach(), torch.autograd.grad(kd.sum(), z)[0]
