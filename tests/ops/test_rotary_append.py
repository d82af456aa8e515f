"""Keys turned into their cache: equal to `rotary` and a copy, everywhere else untouched."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.ops import rotary, rotary_append
from clinkd.rotary import RotarySpec

append_module = sys.modules["clinkd.ops.rotary_append"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = {
    "paper": RotarySpec.split(128),
    "warm": RotarySpec.alternate(64),
    "mrope": RotarySpec.mrope(128),
    "partial": RotarySpec.rope(48, rotary_dim=22),
    "neighbours": RotarySpec.rope(18, layout="interleaved"),
}


@pytest.fixture(params=["reference", DEVICE])
def impl(request):
    return usable(request.param)


def usable(impl):
    if reason := append_module.why_not(impl, torch.device(DEVICE), torch.float32):
        pytest.skip(reason)
    return impl


def make(spec, B, S, L, H, dtype=torch.float32, layout="plain"):
    """k, v, positions, and caches of NaN in some layout."""
    g = torch.Generator().manual_seed(B + S)
    k, v = (torch.randn(B, S, H, spec.head_dim, generator=g).to(DEVICE, dtype) for _ in range(2))
    positions = (torch.rand(spec.axes, B, S, generator=g) * 262_144).round().to(DEVICE) / 2
    shape = (B, L, H, spec.head_dim)
    caches = []
    for _ in range(2):
        if layout == "heads first":
            cache = torch.full((B, H, L, spec.head_dim), torch.nan, dtype=dtype, device=DEVICE)
            cache = cache.transpose(1, 2)
        elif layout == "cut":
            wide = torch.full((B, L, H + 2, spec.head_dim + 3), torch.nan, dtype=dtype)
            cache = wide.to(DEVICE)[:, :, 1 : H + 1, 1 : spec.head_dim + 1]
        else:
            cache = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)
        caches.append(cache)
    return k, v, positions, caches


def expected(k, v, positions, spec, caches, starts, impl):
    """The caches after it, token by token."""
    turned = rotary(k, positions, spec, impl=impl)
    caches = [cache.clone() for cache in caches]
    for b, start in enumerate(starts.tolist()):
        for s in range(k.shape[1]):
            if 0 <= start + s < caches[0].shape[1]:
                caches[0][b, start + s] = turned[b, s]
                caches[1][b, start + s] = v[b, s]
    return caches


def equal(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(9), b.nan_to_num(9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_equals_rotary_and_a_copy(impl, name, dtype):
    spec = SPECS[name]
    starts = torch.tensor([0, 4, 11, -2, 13, 100, -100], device=DEVICE)
    for layout in ("plain", "heads first", "cut"):
        k, v, positions, caches = make(spec, 7, 5, 13, 3, dtype, layout)
        wanted = expected(k, v, positions, spec, caches, starts, impl)
        rotary_append(k, v, positions, spec, *caches, starts, impl=impl)
        assert all(equal(a, b) for a, b in zip(caches, wanted, strict=True))


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    B=st.integers(0, 3),
    S=st.integers(0, 6),
    L=st.integers(0, 9),
    H=st.integers(0, 9),
    first=st.integers(-7, 10),
    spread=st.booleans(),
)
def test_any_shape(name, B, S, L, H, first, spread):
    usable(DEVICE)
    spec = SPECS[name]
    k, v, positions, caches = make(spec, B, S, L, H)
    if spread:
        k, v = (torch.stack([t, t], dim=-1)[..., 0] for t in (k, v))
    starts = torch.arange(first, first + B, device=DEVICE)
    wanted = expected(k, v, positions, spec, caches, starts, DEVICE)
    rotary_append(k, v, positions, spec, *caches, starts, impl=DEVICE)
    assert all(equal(a, b) for a, b in zip(caches, wanted, strict=True))


def test_token_by_token_equals_all_at_once(impl):
    spec = SPECS["mrope"]
    k, v, positions, caches = make(spec, 2, 9, 12, 2)
    whole = [cache.clone() for cache in caches]
    first = torch.tensor([1, 3], device=DEVICE)
    rotary_append(k, v, positions, spec, *whole, first, impl=impl)
    for s in range(9):
        part = slice(s, s + 1)
        new = (k[:, part], v[:, part], positions[:, :, part])
        rotary_append(*new, spec, *caches, first + s, impl=impl)
    assert all(equal(a, b) for a, b in zip(caches, whole, strict=True))


def test_threads_change_nothing():
    usable("cpu")
    spec = SPECS["paper"]
    k, v, positions, caches = make(spec, 2, 300, 310, 4)
    starts = torch.tensor([3, 10], device=DEVICE)
    wanted = expected(k, v, positions, spec, caches, starts, "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rotary_append(k, v, positions, spec, *caches, starts, impl="cpu")
    finally:
        torch.set_num_threads(before)
    assert all(equal(a, b) for a, b in zip(caches, wanted, strict=True))


def test_opcheck(impl):
    spec = SPECS["warm"]
    k, v, positions, caches = make(spec, 2, 3, 8, 2)
    caches = [cache.zero_() for cache in caches]
    starts = torch.tensor([1, 5], device=DEVICE)
    arguments = (k, v, positions, spec.key, *caches, starts, impl)
    torch.library.opcheck(torch.ops.clinkd.rotary_append.default, arguments)


@pytest.mark.slow
def test_compiles_whole(impl):
    spec = SPECS["warm"]
    k, v, positions, caches = make(spec, 2, 3, 8, 2)
    starts = torch.tensor([1, 5], device=DEVICE)
    wanted = expected(k * 2, v, positions, spec, caches, starts, impl)

    def step(k, v, key_cache, value_cache):
        rotary_append(k * 2, v, positions, spec, key_cache, value_cache, starts, impl=impl)
        return key_cache.nan_to_num().sum()

    torch.compile(step, fullgraph=True, backend="aot_eager")(k, v, *caches)
    assert all(equal(a, b) for a, b in zip(caches, wanted, strict=True))


def test_check_names_the_row(monkeypatch):
    monkeypatch.setenv("CLINKD_CHECK", "1")
    spec = SPECS["warm"]
    k, v, positions, caches = make(spec, 3, 3, 8, 2)
    with pytest.raises(ValueError, match="starts must leave room for 3 tokens in 8 slots: row 1"):
        rotary_append(k, v, positions, spec, *caches, torch.tensor([5, 6, 0], device=DEVICE))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": torch.zeros(4, 2, 64)}, ValueError, r"k must be \[B, S, H, D\], got shape \(4"),
        ({"v": torch.zeros(1, 4, 1, 64)}, ValueError, r"v must have k's shape \(1, 4, 2, 64\)"),
        ({"v": torch.zeros(1, 4, 2, 64).half()}, TypeError, "v must be torch.float32 as k"),
        ({"key_cache": torch.zeros(2, 8, 2, 64)}, ValueError, r"key_cache must be \[B, L, H, D\]"),
        ({"value_cache": torch.zeros(1, 9, 2, 64)}, ValueError, r"value_cache must be \[B, L, H"),
        (
            {"value_cache": torch.zeros(1, 8, 2, 64).bfloat16()},
            TypeError,
            "value_cache must be torch.float32 as k, got torch.bfloat16",
        ),
        (
            {"key_cache": torch.zeros(1, 8, 64, 2).transpose(2, 3)},
            ValueError,
            "key_cache must have its components side by side",
        ),
        ({"starts": torch.zeros(1)}, TypeError, "starts must be int64, got torch.float32"),
        ({"starts": torch.zeros(2).long()}, ValueError, r"starts must be \[B\] = \[1\] on cpu"),
        ({"positions": torch.zeros(2, 1, 4).half()}, TypeError, "positions must be float32"),
        (
            {"k": torch.zeros(1, 4, 2, 64, requires_grad=True)},
            ValueError,
            "k must not need a gradient: rotary_append has none",
        ),
        (
            {"key_cache": torch.zeros(1, 8, 2, 64, requires_grad=True)},
            ValueError,
            "key_cache must not need a gradient: it is written in place",
        ),
        ({"v": torch.zeros(1, 4, 2, 64, device="meta")}, ValueError, "v must be on cpu, got meta"),
        ({"impl": "tpu"}, ValueError, "impl must be one of auto, reference, cpu, cuda, got 'tpu'"),
    ],
)
def test_errors(change, error, message):
    arguments = {
        "k": torch.zeros(1, 4, 2, 64), "v": torch.zeros(1, 4, 2, 64),
        "positions": torch.zeros(2, 1, 4), "spec": RotarySpec.split(64),
        "key_cache": torch.zeros(1, 8, 2, 64), "value_cache": torch.zeros(1, 8, 2, 64),
        "starts": torch.zeros(1, dtype=torch.int64),
    }  # fmt: skip
    with pytest.raises(error, match=message):
        rotary_append(**(arguments | change))
