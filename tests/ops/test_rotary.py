"""The rotary op: against the definition in float64, with every layout, dtype and stride."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.ops import rotary
from clinkd.ops.reference.rotary import rotary as reference
from clinkd.rotary import RotarySpec

rotary_module = sys.modules["clinkd.ops.rotary"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OTHER = "cpu" if DEVICE == "cuda" else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = {
    "paper": RotarySpec.split(128),
    "unequal": RotarySpec.split(80, 24),
    "split-half": RotarySpec.split(64, layout="half"),
    "warm": RotarySpec.alternate(128),
    "mrope": RotarySpec.mrope(128),
    "mrope-interleaved": RotarySpec.mrope(128, (24, 20, 20), 5e6, interleaved=True),
    "vision": RotarySpec.axial(80),
    "partial": RotarySpec.rope(64, rotary_dim=24),
    "partial-neighbours": RotarySpec.rope(48, layout="interleaved", rotary_dim=22),
    "odd-pairs": RotarySpec.rope(18),
    "widest": RotarySpec.rope(256),
}


@pytest.fixture(autouse=True)
def _on_the_gpu_where_there_is_one():
    with torch.device(DEVICE):
        yield


def usable(impl, dtype=torch.float32):
    if reason := rotary_module.why_not(impl, torch.device(DEVICE), dtype):
        pytest.skip(reason)


@pytest.fixture(params=["reference", DEVICE])
def impl(request):
    usable(request.param)
    return request.param


def positions_for(spec, *tokens, limit=131_072):
    """Half-integers from 0 to `limit`, more axes than the spec reads."""
    generator = torch.Generator(DEVICE).manual_seed(sum(tokens))
    places = torch.rand(spec.axes + 1, *tokens, generator=generator) * limit
    return (places * 2).round() / 2


def assert_as_accurate(actual, x, positions, spec, inverse=False):
    """Float32 to 1e-5 relative; 16-bit types with at most twice plain torch's error."""
    if x.numel() == 0:
        return
    exact = reference(x.double(), positions, spec, inverse=inverse)
    error = (actual.double() - exact).abs().max().item()
    if x.dtype in (torch.float32, torch.float64):
        assert error <= 1e-5 * exact.abs().max().item()
    else:
        plain = reference(x.float(), positions, spec, inverse=inverse).to(x.dtype)
        assert error <= 2 * (plain.double() - exact).abs().max().item() + 1e-12


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_matches_float64(impl, name, dtype, inverse):
    spec = SPECS[name]
    x = torch.randn(2, 13, 3, spec.head_dim).to(dtype)
    positions = positions_for(spec, 2, 13)
    found = rotary(x, positions, spec, inverse=inverse, impl=impl)
    assert found.dtype == dtype
    assert_as_accurate(found, x, positions, spec, inverse)
    packed = rotary(x[0], positions[:, 0], spec, inverse=inverse, impl=impl)
    assert torch.equal(packed, found[0])


def test_the_formula_itself():
    """Two pairs by hand, so that the reference too can be wrong."""
    spec = RotarySpec(16, (1, 0), (1.0, 0.5), 1)
    x = torch.arange(1.0, 17.0).reshape(1, 1, 16)
    found = rotary(x, torch.tensor([[2.5], [0.25]]), spec, impl="reference")[0, 0]
    a, b = torch.tensor(0.25), torch.tensor(1.25)
    expected = [
        1 * a.cos() - 2 * a.sin(),
        1 * a.sin() + 2 * a.cos(),
        3 * b.cos() - 4 * b.sin(),
        3 * b.sin() + 4 * b.cos(),
    ]
    assert torch.allclose(found[:4], torch.stack(expected), rtol=1e-6)
    assert torch.equal(found[4:], x[0, 0, 4:])


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    dtype=st.sampled_from(DTYPES),
    B=st.integers(0, 3),
    S=st.integers(0, 9),
    H=st.integers(0, 5),
    layout=st.sampled_from(["plain", "heads first", "cut", "every second", "spread"]),
    position_layout=st.sampled_from(["plain", "axes last", "one row"]),
    inplace=st.booleans(),
)
def test_any_shape_and_stride(name, dtype, B, S, H, layout, position_layout, inplace):
    usable(DEVICE)
    spec = SPECS[name]
    D = spec.head_dim
    x = {
        "plain": lambda: torch.randn(B, S, H, D),
        "heads first": lambda: torch.randn(B, H, S, D).transpose(1, 2),
        "cut": lambda: torch.randn(B, S, 3 * H, D + 5)[:, :, H : 2 * H, 3 : 3 + D],
        "every second": lambda: torch.randn(B, 2 * S, H, D)[:, ::2],
        "spread": lambda: torch.randn(B, S, H, 2 * D)[..., ::2],
    }[layout]()
    x = x.to(dtype) if layout in ("plain", "heads first") else _cast_in_place(x, dtype)
    positions = positions_for(spec, B, S)
    if position_layout == "axes last":
        positions = positions.movedim(0, -1).contiguous().movedim(-1, 0)
    elif position_layout == "one row":
        positions = positions[:, :1].expand(-1, B, -1) if B else positions
    before = x.clone()
    found = rotary(x, positions, spec, inplace=inplace, impl=DEVICE)
    assert found.shape == x.shape
    if inplace:
        assert found is x
    else:
        assert torch.equal(x, before)
    assert_as_accurate(found, before, positions, spec)


def _cast_in_place(x, dtype):
    """x in another dtype with the strides that it has."""
    wider = torch.empty_strided(x.shape, x.stride(), dtype=dtype)
    return wider.copy_(x)


def test_every_output_is_written(impl, empty_is_nan):
    """Fresh memory is NaN, in sizes that take the streaming path and those that do not."""
    for tokens, name in ((1, "partial"), (37, "unequal"), (700, "mrope"), (700, "paper")):
        spec = SPECS[name]
        x = torch.randn(1, tokens, 14, spec.head_dim)
        positions = positions_for(spec, 1, tokens)
        assert_as_accurate(rotary(x, positions, spec, impl=impl), x, positions, spec)


@pytest.mark.parametrize("name", ["paper", "warm"])
def test_inverse_undoes(impl, name):
    spec = SPECS[name]
    x = torch.randn(2, 5, 4, spec.head_dim)
    positions = positions_for(spec, 2, 5)
    there = rotary(x, positions, spec, impl=impl)
    assert not torch.allclose(there, x, atol=0.1)
    back = rotary(there, positions, spec, inverse=True, impl=impl)
    assert torch.allclose(back, x, atol=2e-6)


@pytest.mark.parametrize("inverse", [False, True])
def test_gradient(impl, inverse):
    spec = SPECS["unequal"]
    x = torch.randn(2, 5, 3, spec.head_dim, requires_grad=True)
    positions = positions_for(spec, 2, 5)
    weight = torch.randn(3, 5, 2, spec.head_dim).transpose(0, 2)
    (rotary(x, positions, spec, inverse=inverse, impl=impl) * weight).sum().backward()
    exact = x.detach().double().requires_grad_()
    (reference(exact, positions, spec, inverse=inverse) * weight).sum().backward()
    assert (x.grad - exact.grad).abs().max() <= 1e-5 * exact.grad.abs().max()


def test_gradcheck_of_the_reference():
    spec = RotarySpec.split(16, 6)
    x = torch.randn(1, 2, 2, 16, dtype=torch.float64, requires_grad=True)
    positions = positions_for(spec, 1, 2)
    assert torch.autograd.gradcheck(lambda t: rotary(t, positions, spec), x)
    assert torch.autograd.gradgradcheck(lambda t: rotary(t, positions, spec), x)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck(impl):
    spec = SPECS["warm"]
    x = torch.randn(2, 5, 3, spec.head_dim)
    positions = positions_for(spec, 2, 5)
    for sample in (x, x.clone().requires_grad_(), x.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.library.opcheck(
            torch.ops.clinkd.rotary.default, (sample, positions, spec.key, False, impl)
        )
    torch.library.opcheck(
        torch.ops.clinkd.rotary_.default, (x.clone(), positions, spec.key, True, impl)
    )


@pytest.mark.slow
def test_compiles_whole(impl):
    spec = SPECS["warm"]
    x = torch.randn(2, 5, 3, spec.head_dim, requires_grad=True)
    positions = positions_for(spec, 2, 5)

    def step(t):
        return rotary(t * 2, positions, spec, impl=impl).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(x), x)[0]
    assert torch.allclose(torch.autograd.grad(compiled(x), x)[0], expected, atol=1e-5)


def test_autocast_leaves_dtypes_alone(impl):
    spec = SPECS["warm"]
    x, positions = torch.randn(1, 4, 2, spec.head_dim), positions_for(spec, 1, 4)
    expected = rotary(x, positions, spec, impl=impl)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert torch.equal(rotary(x, positions, spec, impl=impl), expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads):
    usable("cpu")
    spec = SPECS["paper"]
    x, positions = torch.randn(3, 701, 4, spec.head_dim), positions_for(spec, 3, 701)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = rotary(x, positions, spec, impl="cpu")
    finally:
        torch.set_num_threads(before)
    assert torch.equal(
        found,
        torch.cat(
            [rotary(x[i : i + 1], positions[:, i : i + 1], spec, impl="cpu") for i in range(3)]
        ),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_positions(impl, value):
    """An error where the host knows them; the operator, as on a GPU, gives NaN there alone."""
    spec = SPECS["warm"]
    positions = positions_for(spec, 1, 3)
    positions[:, 0, 1] = value
    x = torch.ones(1, 3, 2, spec.head_dim)
    if DEVICE == "cpu":
        with pytest.raises(
            ValueError, match=rf"positions must be finite, got {value} at \[0, 0, 1\]"
        ):
            rotary(x, positions, spec, impl=impl)
    found = torch.ops.clinkd.rotary(x, positions, spec.key, False, impl)
    assert found[0, 1].isnan().all()
    assert found[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_values_survive(dtype):
    """Every value of the type comes back if turned by nothing, and is rounded as torch does."""
    usable(DEVICE)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(dtype).reshape(-1, 1, 64)
    still = RotarySpec(64, (0,) * 32, (0.0,) * 32, 32)
    finite = torch.where(x.isfinite(), x, 1)
    assert torch.equal(rotary(finite, torch.zeros(1, len(x)), still, impl=DEVICE), finite)
    turning = RotarySpec(64, (0,) * 32, (1.0,) * 32, 32)
    angle = torch.rand(1, len(x), generator=torch.Generator(DEVICE).manual_seed(0)) * 100
    found = rotary(x, angle, turning, impl=DEVICE)
    expected = rotary(x.float(), angle, turning, impl=DEVICE).to(dtype)
    assert expected.isinf().any()
    assert expected.isnan().any()
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 64)}, ValueError, r"x must be \[B, S, H, D\] or \[N, H, D\]"),
        ({"x": torch.zeros(1, 4, 2, 64, dtype=torch.int64)}, TypeError, "x must be a floating"),
        ({"x": torch.zeros(1, 4, 2, 32)}, ValueError, "x must have the spec's head_dim 64"),
        ({"positions": torch.zeros(2, 1, 4).half()}, TypeError, "positions must be float32, got"),
        ({"positions": torch.zeros(2, 1, 4).long()}, TypeError, "positions must be float32, got"),
        ({"positions": torch.zeros(2, 4)}, ValueError, r"positions must be \[A, 1, 4\]"),
        ({"positions": torch.zeros(2, 1, 5)}, ValueError, r"positions must be \[A, 1, 4\]"),
        ({"positions": torch.zeros(1, 1, 4)}, ValueError, "positions must have the spec's 2 axes"),
        (
            {"positions": torch.zeros(2, 1, 4, device="meta")},
            ValueError,
            f"positions must be on {DEVICE}",
        ),
        ({"impl": "tpu"}, ValueError, "impl must be one of auto, reference, cpu, cuda, got 'tpu'"),
        (
            {"impl": OTHER},
            RuntimeError,
            f"impl='{OTHER}' cannot run here: it takes {OTHER} tensors, got {DEVICE}",
        ),
    ],
)
def test_errors(change, error, message):
    arguments = {"x": torch.zeros(1, 4, 2, 64), "positions": torch.zeros(2, 1, 4)}
    arguments["spec"] = RotarySpec.split(64)
    with pytest.raises(error, match=message):
        rotary(**(arguments | change))


def test_inplace_needs_no_gradient():
    x = torch.zeros(1, 4, 2, 64, requires_grad=True)
    with pytest.raises(ValueError, match="inplace must be False where x needs a gradient"):
        rotary(x, torch.zeros(2, 1, 4), RotarySpec.split(64), inplace=True)


def test_double_has_no_kernel():
    x = torch.zeros(1, 4, 2, 64, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="it takes float32, float16 and bfloat16"):
        rotary(x, torch.zeros(2, 1, 4), RotarySpec.split(64), impl=DEVICE)
