"""Every implementation against the reference on float64 copies."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before the kernel is imported: it decides when it is decorated
    os.environ.setdefault("TRITON_INTERPRET", "1")

from clinkd.ops.prefix_decode_attention import prefix_decode_attention, resolve_prefix_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["triton"] if DEVICE == "cuda" else ["cpu", "triton"]
# B, K, Hkv, G, D, P, M
SHAPES = [
    (1, 1, 1, 1, 16, 1, 1),
    (2, 3, 2, 3, 32, 70, 12),
    (3, 4, 1, 2, 24, 129, 37),  # no multiples of a tile, a head dim that is no power of two
    (2, 2, 2, 7, 80, 300, 5),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_inputs(B, K, Hkv, G, D, P, M, dtype=torch.float32, seed=0):
    """Random inputs whose places beyond the lengths are NaN."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    prefix_lengths = torch.randint(1, P + 1, (B,), generator=generator)
    suffix_lengths = torch.randint(0, M + 1, (B,), generator=generator)
    inputs = {
        "q": normal(B, K, Hkv * G, D) * 2,
        "prefix_k": normal(B, Hkv, P, D),
        "prefix_v": normal(B, Hkv, P, D),
        "suffix_k": normal(B, Hkv, M, D),
        "suffix_v": normal(B, Hkv, M, D),
        "prefix_lengths": prefix_lengths,
        "suffix_lengths": suffix_lengths,
        "visible": torch.rand(B, K, M, generator=generator) < 0.6,
    }
    for b in range(B):
        for part, lengths in (("prefix", prefix_lengths), ("suffix", suffix_lengths)):
            for name in ("k", "v"):
                inputs[f"{part}_{name}"][b, :, lengths[b] :] = float("nan")
    return {name: value.to(DEVICE) for name, value in inputs.items()}


def wide(inputs):
    return {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


def run(inputs, impl, **options):
    parts = [inputs[n] for n in ("q", "prefix_k", "prefix_v", "suffix_k", "suffix_v")]
    rest = {n: t for n, t in inputs.items() if n.endswith("lengths") or n == "visible"}
    return prefix_decode_attention(*parts, **rest, **options, impl=impl)


def assert_as_accurate(actual, same, exact, dtype):
    """float32 to 1e-5 relative; else at most twice the error of plain torch in that dtype."""
    error = (actual.double() - exact).abs().max()
    if dtype == torch.float32:
        assert error <= 1e-5 * max(1.0, exact.abs().max())
    else:
        # one rounding of the largest value: what plain torch may be lucky to miss
        least = torch.finfo(dtype).eps * exact.abs().max()
        assert error <= 2 * max((same.double() - exact).abs().max(), least)


def plain(inputs, dtype):
    """Plain torch in the inputs' own dtype, a hypothesis at a time."""
    q = inputs["q"]
    B, K, _, D = q.shape
    out = torch.empty_like(q)
    for b in range(B):
        P, M = inputs["prefix_lengths"][b], inputs["suffix_lengths"][b]
        for k in range(K):
            seen = inputs["visible"][b, k, :M]
            key = torch.cat(
                [inputs["prefix_k"][b, :, :P], inputs["suffix_k"][b, :, :M][:, seen]], 1
            )
            val = torch.cat(
                [inputs["prefix_v"][b, :, :P], inputs["suffix_v"][b, :, :M][:, seen]], 1
            )
            rows = q[b, k].unflatten(0, (key.shape[0], -1))  # [Hkv, G, D]
            weights = ((rows @ key.transpose(1, 2)) * D**-0.5).softmax(-1)
            out[b, k] = (weights @ val).flatten(0, 1)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_matches_reference(impl, shape, dtype):
    inputs = make_inputs(*shape, dtype=dtype)
    exact = run(wide(inputs), "reference")
    assert exact.isfinite().all()
    assert_as_accurate(run(inputs, impl), plain(inputs, dtype), exact, dtype)


def test_reference_is_attention_of_each_hypothesis_alone():
    inputs = wide(make_inputs(2, 3, 2, 2, 16, 20, 9))
    torch.testing.assert_close(run(inputs, "reference"), plain(inputs, torch.float64))


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_defaults_and_scale(impl):
    inputs = make_inputs(2, 3, 1, 2, 16, 40, 9)
    inputs = {n: torch.nan_to_num(t) if t.is_floating_point() else t for n, t in inputs.items()}
    del inputs["visible"], inputs["prefix_lengths"]
    own = torch.arange(9, device=DEVICE) % 3 == torch.arange(3, device=DEVICE)[:, None]
    spelt = inputs | {
        "visible": own.expand(2, 3, 9),
        "prefix_lengths": torch.full((2,), 40, device=DEVICE),
    }
    actual = run(inputs, impl, scale=0.5)
    torch.testing.assert_close(actual, run(spelt, "reference", scale=0.5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs(impl):
    inputs = make_inputs(2, 3, 2, 2, 32, 50, 12)
    expected = run(inputs, "reference")
    # views of one buffer of places, heads after places, as a cache may hold them
    for part in ("prefix", "suffix"):
        for name in ("k", "v"):
            tensor = inputs[f"{part}_{name}"]
            inputs[f"{part}_{name}"] = tensor.transpose(1, 2).contiguous().transpose(1, 2)
    inputs["q"] = inputs["q"].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(run(inputs, impl), expected, rtol=1e-5, atol=1e-5)
    inputs["suffix_v"] = inputs["suffix_v"].transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(run(inputs, impl), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_scores_do_not_overflow(impl):
    inputs = make_inputs(1, 3, 1, 2, 16, 200, 7)
    inputs["q"] *= 100
    torch.testing.assert_close(
        run(inputs, impl), run(wide(inputs), "reference").float(), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_a_hypothesis_that_sees_nothing_is_nan_and_no_other(impl):
    inputs = make_inputs(2, 2, 1, 2, 16, 8, 6)
    inputs["prefix_lengths"][0] = 0
    inputs["suffix_lengths"][:] = 6
    inputs["suffix_k"].nan_to_num_()
    inputs["suffix_v"].nan_to_num_()
    inputs["visible"][:] = True
    inputs["visible"][0, 1] = False
    out = run(inputs, impl)
    assert out[0, 1].isnan().all()
    assert out[0, 0].isfinite().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
@pytest.mark.parametrize(("context", "room"), [(1, 0), (1, 6), (0, 0), (0, 6)])
def test_where_there_is_nothing_to_see(impl, context, room):
    inputs = make_inputs(1, 2, 1, 2, 16, 1, 6)
    for name, places in (("prefix", context), ("suffix", room)):
        for part in ("k", "v"):
            inputs[f"{name}_{part}"] = inputs[f"{name}_{part}"][:, :, :places]
        inputs[f"{name}_lengths"].zero_()
    inputs["visible"] = inputs["visible"][:, :, :room]
    assert run(inputs, impl).isnan().all()


def test_another_default_device():
    inputs = {name: tensor.cpu() for name, tensor in make_inputs(*SHAPES[1]).items()}
    expected = run(inputs, "cpu")
    with torch.device("meta"):
        assert torch.equal(run(inputs, "cpu"), expected)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_empty(impl):
    inputs = make_inputs(1, 2, 1, 2, 16, 8, 6)
    none = {n: t[:0] for n, t in inputs.items()}
    assert run(none, impl).shape == (0, 2, 2, 16)


@pytest.mark.parametrize("impl", ["reference", *IMPLS])
def test_opcheck(impl):
    inputs = make_inputs(2, 2, 1, 2, 16, 8, 6)
    parts = [inputs[n] for n in ("q", "prefix_k", "prefix_v", "suffix_k", "suffix_v")]
    rest = (inputs["prefix_lengths"], inputs["suffix_lengths"], inputs["visible"], 0.25, impl)
    torch.library.opcheck(torch.ops.clinkd.prefix_decode_attention.default, (*parts, *rest))


def bad(**changes):
    return make_inputs(2, 2, 2, 2, 16, 8, 6) | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(2, 2, 16)}, ValueError, r"q must be \[B, K, Hq, D\], got shape"),
        ({"q": torch.zeros(2, 2, 3, 16)}, ValueError, "Hq = 3 must be a multiple of"),
        ({"prefix_v": torch.zeros(2, 2, 7, 16)}, ValueError, "prefix_v must be"),
        ({"suffix_k": torch.zeros(2, 1, 6, 16)}, ValueError, "suffix_k must be"),
        (
            {"suffix_v": torch.zeros(2, 2, 6, 16).half()},
            TypeError,
            "suffix_v must be torch.float32",
        ),
        ({"suffix_lengths": torch.zeros(2)}, TypeError, "suffix_lengths must be int32 or int64"),
        ({"prefix_lengths": torch.zeros(3).int()}, ValueError, r"prefix_lengths must be \[B\]"),
        ({"visible": torch.zeros(2, 2, 6)}, TypeError, "visible must be bool"),
        ({"visible": torch.zeros(2, 2, 5).bool()}, ValueError, "visible must be"),
        ({"q": torch.zeros(2, 2, 4, 16, requires_grad=True)}, ValueError, "need a gradient"),
        ({"suffix_v": torch.zeros(2, 2, 6, 16).to("meta")}, ValueError, "suffix_v must be on"),
        (
            {"suffix_lengths": torch.zeros(2).int().to("meta")},
            ValueError,
            "suffix_lengths must be on .* as q is, got meta",
        ),
        (
            {"prefix_k": torch.zeros(2, 2, 8, 16, requires_grad=True)},
            ValueError,
            "need a gradient",
        ),
    ],
)
def test_checks_at_the_door(changes, error, message):
    with pytest.raises(error, match=message):
        run(bad(**changes), "auto")


def test_choice_of_implementation(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_prefix_decode("auto", cpu, torch.float32) == "cpu"
    with pytest.raises(ValueError, match="impl must be one of auto"):
        resolve_prefix_decode("fast", cpu, torch.float32)
    with pytest.raises(RuntimeError, match=r"got torch\.float64"):
        resolve_prefix_decode("triton", cpu, torch.float64)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="it takes cuda tensors"):
        resolve_prefix_decode("triton", cpu, torch.float32)


@pytest.mark.parametrize("name", ["suffix_lengths", "prefix_lengths"])
@pytest.mark.parametrize("wrong", [-1, 1000])
def test_lengths_that_reach_beyond_on_the_cpu(name, wrong):
    inputs = {key: value.cpu() for key, value in make_inputs(*SHAPES[1]).items()}
    inputs[name][0] = wrong
    with pytest.raises(ValueError, match=rf"{name} must be in 0 … \d+, got"):
        run(inputs, "cpu")
