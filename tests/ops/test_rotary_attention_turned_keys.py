"""Attention over keys that are rotated already, as a cache holds them."""

import sys

import pytest
import torch

from clinkd.ops import rotary, rotary_attention
from clinkd.rotary import RotarySpec

attention_module = sys.modules["clinkd.ops.rotary_attention"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SPEC = RotarySpec.mrope(32, (4, 6, 6))


def usable(impl):
    if reason := attention_module.why_not(impl, torch.device(DEVICE), torch.float32):
        pytest.skip(reason)


def make(packed, heads=(4, 2), queries=19, keys=19):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, queries, heads[0], 32, generator=g)
    k, v = (torch.randn(2, keys, heads[1], 32, generator=g) for _ in range(2))
    positions = torch.rand(3, 2, max(queries, keys), generator=g) * 100
    options = {}
    if packed:
        q, k, v, positions = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), positions.flatten(1)
        options["cu_seqlens"] = torch.tensor([0, 5, 5, 25, 38], dtype=torch.int32, device=DEVICE)
    return [t.to(DEVICE) for t in (q, k, v)], positions.to(DEVICE), options


def run(tensors, positions, dtype, impl, turn, **options):
    """Output, lse and gradients of q, of the rotated keys and of v."""
    q, k, v = (t.to(dtype).detach() for t in tensors)
    if turn:
        k = rotary(k, positions, SPEC, impl="reference" if dtype == torch.float64 else "auto")
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    positions_q = positions[..., -q.shape[-3] :]
    out, lse = rotary_attention(
        *leaves, positions_q, SPEC, impl=impl, turned_keys=turn, return_lse=True, **options
    )
    weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).reshape(out.shape)
    (out.float() * weight).sum().backward()
    return [out.detach(), lse, *(t.grad for t in leaves)]


@pytest.mark.parametrize(
    ("packed", "more"),
    [(False, {}), (True, {}), (False, {"window": 6}), (False, {"causal": False})],
    ids=["causal", "packed", "window", "full"],
)
@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_equals_the_definition(impl, packed, more):
    usable(impl)
    tensors, positions, options = make(packed)
    found = run(tensors, positions, torch.float32, impl, True, **options, **more)
    exact = run(tensors, positions, torch.float64, "reference", True, **options, **more)
    plain = run(tensors, positions, torch.float64, "reference", False, **options, **more)
    # the gradient of rotated keys, turned back, is that of plain ones
    back = rotary(exact[3], positions, SPEC, inverse=True, impl="reference")
    for name, a, e in zip(("out", "lse", "dq", "dk", "dv"), found, exact, strict=True):
        assert torch.allclose(a.double(), e.double(), rtol=1e-5, atol=1e-5), name
    for name, a, e in zip(
        ("out", "lse", "dq", "dk", "dv"), (*exact[:3], back, exact[4]), plain, strict=True
    ):
        assert torch.allclose(a, e, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_keys_of_a_cache_are_more_than_the_queries(impl):
    usable(impl)
    tensors, positions, _ = make(False, queries=3, keys=19)
    found = run(tensors, positions, torch.float32, impl, True)
    exact = run(tensors, positions, torch.float64, "reference", True)
    for a, e in zip(found, exact, strict=True):
        assert torch.allclose(a.double(), e.double(), rtol=1e-5, atol=1e-5)


def test_triton_sums_parts_of_a_group(monkeypatch):
    """Several programs share a key head's queries; their sum is not turned back either."""
    usable("triton")
    tensors, positions, _ = make(False, heads=(6, 1), queries=7, keys=7)
    backward = pytest.importorskip("clinkd.kernels.rotary_attention_backward")
    monkeypatch.setattr(backward, "count_parts", lambda programs, G, device: G)
    found = run(tensors, positions, torch.float32, "triton", True)
    exact = run(tensors, positions, torch.float64, "reference", True)
    for a, e in zip(found, exact, strict=True):
        assert torch.allclose(a.double(), e.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_strided_keys(impl):
    usable(impl)
    (q, k, v), positions, _ = make(False)
    wide = torch.stack([k, k], dim=-1).flatten(-2)[..., ::2]
    expected = rotary_attention(q, k, v, positions, SPEC, turned_keys=True, impl=impl)
    found = rotary_attention(q, wide, v, positions, SPEC, turned_keys=True, impl=impl)
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_triton_opcheck():
    usable("triton")
    (q, k, v), positions, _ = make(False, heads=(1, 1))
    leaves = [t.requires_grad_() for t in (q, k, v)]
    options = (positions, None, SPEC.key, True, 0.2, None, None, 0, True, "triton")
    torch.library.opcheck(torch.ops.clinkd.rotary_attention.default, (*leaves, *options))


@pytest.mark.slow
def test_compiles_whole():
    (q, k, v), positions, _ = make(False)
    compiled = torch.compile(
        lambda q: rotary_attention(q, k, v, positions, SPEC, turned_keys=True),
        fullgraph=True,
        backend="aot_eager",
    )
    expected = rotary_attention(q, k, v, positions, SPEC, turned_keys=True)
    assert torch.allclose(compiled(q), expected, atol=1e-5)


def test_key_positions_are_refused():
    (q, k, v), positions, _ = make(False)
    with pytest.raises(ValueError, match="key_positions must be None where turned_keys"):
        rotary_attention(q, k, v, positions, SPEC, key_positions=positions, turned_keys=True)
