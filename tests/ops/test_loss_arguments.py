"""What the losses refuse before a kernel reads it."""

import math

import pytest
import torch

from clinkd.ops import kd_loss, linear_kd_loss, linear_topk_kd_loss, topk_kd_loss

N, C, V, K = 4, 6, 10, 3


def arguments(name):
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (N,), generator=g)
    logits = torch.randn(N, V, generator=g)
    hidden, head = torch.randn(N, C, generator=g), torch.randn(V, C, generator=g)
    top = {
        "teacher_logits": torch.randn(N, K, generator=g),
        "teacher_ids": torch.arange(K, dtype=torch.int32).expand(N, K).contiguous(),
        "teacher_lse": torch.full((N,), 4.0),
    }
    student = {"student_hidden": hidden, "student_weight": head}
    return {
        kd_loss: {"student_logits": logits, "teacher_logits": logits.flip(0)},
        linear_kd_loss: student | {"teacher_hidden": hidden.flip(0), "teacher_weight": head},
        topk_kd_loss: {"student_logits": logits} | top,
        linear_topk_kd_loss: student | top,
    }[name] | {"labels": labels}


LOSSES = (kd_loss, linear_kd_loss, topk_kd_loss, linear_topk_kd_loss)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_weight_that_is_not_one_a_row(loss):
    for weight in (torch.ones(1), torch.ones(N, 1), torch.ones(N + 1)):
        with pytest.raises(ValueError, match="weight must be"):
            loss(**arguments(loss), weight=weight)
    with pytest.raises(TypeError, match="weight must be a floating tensor"):
        loss(**arguments(loss), weight=torch.ones(N, dtype=torch.int64))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_tensor_elsewhere_is_named(loss):
    given = arguments(loss)
    for name in given:
        if name != "labels":
            with pytest.raises(ValueError, match=f"{name} must be on cpu as labels are, got meta"):
                loss(**given | {name: given[name].to("meta")})


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("softcap", [0.0, -5.0, math.nan, math.inf])
def test_softcap(loss, softcap):
    with pytest.raises(ValueError, match="softcap must be above 0 and finite"):
        loss(**arguments(loss), softcap=softcap)


@pytest.mark.parametrize("loss", [linear_kd_loss, linear_topk_kd_loss], ids=lambda x: x.__name__)
def test_a_bias_of_another_size(loss):
    with pytest.raises(ValueError, match=r"student_bias must be \[V\] = \[10\]"):
        loss(**arguments(loss), student_bias=torch.ones(1))
    with pytest.raises(ValueError, match=r"student_weight must be .* V above 0"):
        loss(**arguments(loss) | {"student_weight": torch.ones(0, C)})


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_teacher_without_numbers_gives_nan(impl):
    """Not a KD of 0, with which training would go on from the labels alone."""
    given = arguments(topk_kd_loss)
    given["teacher_lse"][1] = math.nan
    assert topk_kd_loss(**given, impl=impl).kd.isnan()
    given = arguments(kd_loss)
    given["teacher_logits"][1, 2] = math.nan
    assert kd_loss(**given, impl=impl).kd.isnan()
