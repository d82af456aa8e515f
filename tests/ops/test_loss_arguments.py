"""What the losses refuse before a kernel reads it."""

import math

import pytest
import torch
import torch.distributed as dist
from conftest_losses import LOSSES, C, N, V, arguments
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from clinkd.ops import kd_loss, linear_kd_loss, linear_topk_kd_loss, topk_kd_loss
from clinkd.ops._impl import why_not_triton
from clinkd.ops.reference.kd_loss import DIVERGENCES


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
def test_a_tensor_cut_over_processes_is_named(loss, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        given = arguments(loss)
        for name in given:
            cut = distribute_tensor(given[name].detach(), mesh, [Shard(0)])
            with pytest.raises(TypeError, match=rf"{name} must be .* give {name}\.full_tensor"):
                loss(**given | {name: cut})
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("softcap", [0.0, -5.0, math.nan, math.inf])
def test_softcap(loss, softcap):
    with pytest.raises(ValueError, match="softcap must be above 0 and finite"):
        loss(**arguments(loss), softcap=softcap)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_label_to_ignore_that_is_not_whole(loss):
    with pytest.raises(TypeError, match=r"ignore_index must be a whole number, got -1\.5"):
        loss(**arguments(loss), ignore_index=-1.5)


@pytest.mark.parametrize("loss", [linear_kd_loss, linear_topk_kd_loss], ids=lambda x: x.__name__)
def test_a_bias_of_another_size(loss):
    with pytest.raises(ValueError, match=r"student_bias must be \[V\] = \[10\]"):
        loss(**arguments(loss), student_bias=torch.ones(1))
    with pytest.raises(ValueError, match=r"student_weight must be .* V above 0"):
        loss(**arguments(loss) | {"student_weight": torch.ones(0, C)})


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_teacher_without_numbers_gives_nan(impl, divergence):
    """Not a KD of 0, with which training would go on from the labels alone."""
    for loss, name in ((topk_kd_loss, "teacher_lse"), (kd_loss, "teacher_logits")):
        given = arguments(loss)
        given[name][1] = math.nan
        given["student_logits"].requires_grad_()
        found = loss(**given, impl=impl, divergence=divergence)
        assert found.kd.isnan()
        (grad,) = torch.autograd.grad(found.loss, given["student_logits"])
        assert grad[1].isnan().any()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_items", 0, "num_items must be a finite number above 0"),
        ("num_items", -3, "num_items must be a finite number above 0"),
        ("num_items", math.nan, "num_items must be a finite number above 0"),
        ("num_items", torch.ones(N), r"num_items must be one number, got a tensor of shape \(4,\)"),
        ("temperature", math.inf, "temperature must be above 0 and finite"),
        ("temperature", math.nan, "temperature must be above 0 and finite"),
        ("kd_weight", math.inf, "kd_weight must be at least 0 and finite"),
        ("kd_weight", -1.0, "kd_weight must be at least 0 and finite"),
    ],
)
def test_numbers_that_are_none(loss, name, value, message):
    with pytest.raises(ValueError, match=message):
        loss(**arguments(loss), **{name: value})


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("name", ["kd_weight", "temperature", "beta", "skew", "softcap"])
def test_a_number_that_learns(loss, name):
    """Kernels read its value: it would get no gradient, or a part of one."""
    with pytest.raises(TypeError, match=rf"{name} must be a number.* give {name}\.item\(\)"):
        loss(**arguments(loss), **{name: torch.tensor(0.5, requires_grad=True)})


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
@pytest.mark.parametrize("label", [-1, V])
def test_a_label_that_is_none_gives_nan(loss, label):
    """In the gradient too, with which training would else go on; other rows have theirs."""
    given = arguments(loss)
    given["labels"][2] = label
    name = next(iter(given))  # the student's
    given[name].requires_grad_()
    found = loss(**given)
    (grad,) = torch.autograd.grad(found.loss, given[name])
    assert found.loss.isnan()
    assert grad.isnan().any(dim=1).tolist() == [row == 2 for row in range(N)]


def test_a_teacher_without_columns():
    given = arguments(kd_loss) | {"teacher_logits": torch.zeros(N, 0)}
    with pytest.raises(ValueError, match=r"teacher_logits must be .* with at least one column"):
        kd_loss(**given)


@pytest.mark.parametrize("loss", [linear_kd_loss, linear_topk_kd_loss], ids=lambda x: x.__name__)
def test_a_weight_that_learns(loss):
    """The losses of logits have its gradient; these have not, and say so."""
    weight = torch.ones(N, requires_grad=True)
    with pytest.raises(ValueError, match=r"weight must need no gradient.*weight.detach\(\)"):
        loss(**arguments(loss), weight=weight)
    loss(**arguments(loss), weight=weight.detach())
    with torch.no_grad():
        loss(**arguments(loss), weight=weight)
    logits = {linear_kd_loss: kd_loss, linear_topk_kd_loss: topk_kd_loss}[loss]
    (grad,) = torch.autograd.grad(logits(**arguments(logits), weight=weight).loss, weight)
    assert grad.isfinite().all()


def test_checking_sees_the_teacher_of_top_k(monkeypatch):
    monkeypatch.setenv("CLINKD_CHECK", "1")
    for loss in (topk_kd_loss, linear_topk_kd_loss):
        for name in ("teacher_logits", "teacher_lse"):
            given = arguments(loss)
            given[name] = given[name].clone()
            given[name][2] = math.nan
            with pytest.raises(ValueError, match=f"{name} must be finite: row 2 breaks it"):
                loss(**given)
            given["labels"] = given["labels"].clone()
            given["labels"][2] = -100
            loss(**given)


def test_heads_of_another_type_without_storage():
    if reason := why_not_triton(torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    given = arguments(linear_kd_loss)
    given["teacher_weight"] = given["teacher_weight"].bfloat16()
    with pytest.raises(TypeError, match=r"teacher_weight must be torch\.float32 as"):
        linear_kd_loss(**given, workspace=0)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_weight_of_few_bits_among_many_tokens(loss):
    """Divided by their number in float16, it would be 0."""
    weight = torch.ones(N, dtype=torch.float16)
    found = loss(**arguments(loss), weight=weight, num_items=10**8).loss
    torch.testing.assert_close(found, loss(**arguments(loss), num_items=10**8).loss)
