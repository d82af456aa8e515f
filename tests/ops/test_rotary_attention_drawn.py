"""Attention over drawn shapes, strides and positions, at far positions, and under autocast."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clinkd.ops import rotary_attention
from clinkd.ops.reference import rotary_attention as definition
from clinkd.ops.rotary_attention import why_not
from clinkd.rotary import RotarySpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IMPLS = [
    impl
    for impl in ("reference", "cpu", "triton")
    if impl == "reference" or why_not(impl, DEVICE, torch.float32) is None
]
SPECS = {
    "split": lambda D: RotarySpec.split(D),
    "alternate": lambda D: RotarySpec.alternate(D),
    "rope": lambda D: RotarySpec.rope(D, rotary_dim=D // 2),
    "interleaved": lambda D: RotarySpec.rope(D, layout="interleaved"),
}
LAYOUTS = ("plain", "heads first", "sliced", "components apart")


def tensor(generator, shape, layout):
    """[B, S, H, D] of some strides."""
    B, S, H, D = shape
    x = torch.randn(B, S, H, D + 8, generator=generator).to(DEVICE)
    if layout == "sliced":
        return x[..., :D]
    x = x[..., :D].contiguous()
    if layout == "heads first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    return x.transpose(2, 3).contiguous().transpose(2, 3) if layout != "plain" else x


def reference(*args, **options):
    return definition.rotary_attention(*args, **options)[0]


def run(attend, tensors, *args, autocast=False, **options):
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=autocast):
        out = attend(*leaves, *args, **options)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype)
    (out * weight.reshape(out.shape)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def close(found, exact, rounding=1e-5):
    for a, e in zip(found, exact, strict=True):
        assert a.isfinite().all()
        assert (a - e).abs().max() <= rounding * max(1.0, e.abs().max().item())


@pytest.fixture(autouse=True)
def one_rounding(monkeypatch):
    """The interpreter's fma rounds its product, which no GPU does."""
    if DEVICE.type == "cuda" or "triton" not in IMPLS:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma(_, x, y, z):
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_fma", fma)


@pytest.mark.parametrize("impl", IMPLS)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_drawn(impl, data):
    draw = data.draw
    D = draw(st.sampled_from([32, 48, 64, 80]))
    G, Hkv = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    B, Sq, Sk = draw(st.integers(1, 2)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    spec = SPECS[draw(st.sampled_from(sorted(SPECS)))](D)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    tensors = [
        tensor(generator, (B, S, H, D), draw(st.sampled_from(LAYOUTS)))
        for S, H in ((Sq, G * Hkv), (Sk, Hkv), (Sk, Hkv))
    ]
    positions, keys = (
        (torch.rand(2, B, S, generator=generator) * draw(st.sampled_from([1, 100, 4000]))).to(
            DEVICE
        )
        for S in (Sq, Sk)
    )
    options = {
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, 1, 7])),
        "key_positions": keys,
    }
    exact = run(reference, [t.double() for t in tensors], positions, spec, **options)
    close(run(rotary_attention, tensors, positions, spec, impl=impl, **options), exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("spec", sorted(SPECS))
def test_positions_to_131072(impl, spec):
    spec = SPECS[spec](64)
    generator = torch.Generator().manual_seed(0)
    tensors = [tensor(generator, (1, 33, H, 64), "plain") for H in (4, 2, 2)]
    positions = (torch.randint(0, 2 * 131_072 + 1, (2, 1, 33), generator=generator) / 2).to(DEVICE)
    positions[:, 0, 0], positions[:, 0, 1] = 131_072, -131_072
    exact = run(reference, [t.double() for t in tensors], positions, spec)
    close(run(rotary_attention, tensors, positions, spec, impl=impl), exact, 3e-5)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(impl, dtype):
    if reason := impl != "reference" and why_not(impl, DEVICE, dtype):
        pytest.skip(str(reason))
    spec = RotarySpec.split(32)
    generator = torch.Generator().manual_seed(0)
    tensors = [tensor(generator, (2, 20, H, 32), "plain").to(dtype) for H in (4, 2, 2)]
    positions = torch.rand(2, 2, 20, generator=generator).to(DEVICE) * 50
    expected = run(rotary_attention, tensors, positions, spec, impl=impl)
    found = run(rotary_attention, tensors, positions, spec, impl=impl, autocast=True)
    for a, e in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, e)
