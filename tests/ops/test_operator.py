"""Operators called directly and through torch's dispatcher: the same, each where it belongs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clinkd.ops import kd_loss, rotary, rotary_append, rotary_attention
from clinkd.rotary import RotarySpec

SPEC = RotarySpec.split(32)


def inputs(**kind):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 32, generator=g).to(**kind)
    return x, torch.rand(2, 2, 5, generator=g) * 100


class Names(TorchDispatchMode):
    """Notes the operators that pass."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def attention(x, positions):
    return rotary_attention(x, x[:, :, :1], x[:, :, :1], positions, SPEC)


def loss(x, positions):
    student, teacher = x.flatten(0, 1).flatten(1), positions.new_ones(10, 96)
    return kd_loss(student, teacher, torch.arange(10), temperature=1.5, impl="cpu").loss


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (lambda x, p: rotary(x, p, SPEC), "clinkd.rotary.default"),
        (attention, "clinkd.rotary_attention.default"),
    ],
    ids=["rotary", "rotary_attention"],
)
def test_both_ways_give_the_same(op, name):
    results = []
    for mode in (None, Names()):
        x, positions = inputs()
        x.requires_grad_()
        with mode or torch.enable_grad():
            out = op(x, positions)
            (grad,) = torch.autograd.grad(out.square().sum(), x)
        results.append((out.detach(), grad))
    assert name in mode.seen
    for direct, dispatched in zip(*results, strict=True):
        assert torch.equal(direct, dispatched)


def test_the_profiler_sees_the_operator():
    x, positions = inputs()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        rotary(x, positions, SPEC)
    assert "clinkd::rotary" in {event.name for event in profile.events()}


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_graphs_hold_the_operator():
    x, positions = inputs()
    traced = torch.jit.trace(lambda x: rotary(x, positions, SPEC), (x,), check_trace=False)
    assert "clinkd::rotary" in str(traced.graph)
    assert torch.equal(traced(2 * x), rotary(2 * x, positions, SPEC))


def test_tensors_without_numbers_and_with_a_sign_to_come():
    x, positions = inputs()
    shape = rotary(x.to("meta"), positions.to("meta"), SPEC)
    assert shape.device.type == "meta"
    assert shape.shape == x.shape
    negative = torch.view_as_complex(x.unflatten(-1, (16, 2))).conj().imag  # stored unnegated
    assert negative.is_neg()
    spec = RotarySpec.split(16)
    expected = rotary(negative.clone().contiguous(), positions, spec)
    assert torch.equal(rotary(negative, positions, spec), expected)


def test_a_graph_that_needs_what_was_written_over_does_not_run():
    x, positions = inputs()
    factor = torch.ones((), requires_grad=True)
    y = x * factor  # its gradient needs x
    rotary(x, positions, SPEC, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    x, _ = inputs()
    keys, values = torch.zeros(2, 5, 3, 32), torch.zeros(2, 5, 3, 32)
    y = values * factor
    rotary_append(x, x, positions, SPEC, keys, values, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_right_or_refused():
    x, positions = inputs(dtype=torch.float64)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(rotary(x, positions, SPEC).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), x)
    turned = rotary(x.detach(), positions, SPEC)
    ones = rotary(torch.ones_like(turned), positions, SPEC)
    assert torch.allclose(second, rotary(6 * turned * ones, positions, SPEC, inverse=True))
    x, positions = inputs()
    x.requires_grad_()
    (grad,) = torch.autograd.grad(loss(x, positions), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.square().sum(), x)
