"""Attention with the rotary embedding inside: against the definition in float64."""

import sys
from dataclasses import dataclass, field

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from clinkd.ops import _attention_flash, rotary_attention
from clinkd.ops.reference.rotary_attention import rotary_attention as reference
from clinkd.rotary import RotarySpec

attention_module = sys.modules["clinkd.ops.rotary_attention"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Case:
    """One call: lengths (a list of them: packed), heads, spec and options."""

    queries: int | list[int]
    keys: int | list[int] | None = None
    batch: int = 2
    heads: tuple[int, int] = (4, 2)
    spec: RotarySpec = field(default_factory=lambda: RotarySpec.split(32))
    causal: bool = True
    window: int | None = None
    scale: float | None = None
    separate: bool = False  # key positions of their own, in no order

    def make(self, dtype=torch.float32, seed=0):
        g = torch.Generator().manual_seed(seed)
        packed = isinstance(self.queries, list)
        keys = self.queries if self.keys is None else self.keys
        sizes = [(sum(n),) if packed else (self.batch, n) for n in (self.queries, keys)]
        D = self.spec.head_dim
        q, k, v = (
            torch.randn(*size, heads, D, generator=g).to(dtype)
            for size, heads in zip(
                (sizes[0], sizes[1], sizes[1]), (self.heads[0], *self.heads[1:] * 2), strict=True
            )
        )
        places = torch.rand(self.spec.axes, *sizes[0], generator=g) * 200
        options = {"causal": self.causal, "window": self.window, "scale": self.scale}
        if self.separate or self.keys is not None:
            options["key_positions"] = (
                torch.rand(self.spec.axes, *sizes[1], generator=g) * 200
            ).to(DEVICE)
        if packed:
            options["cu_seqlens"] = starts(self.queries)
            if self.keys is not None:
                options["cu_seqlens_k"] = starts(keys)
        q, k, v, places = (t.to(DEVICE) for t in (q, k, v, (places * 2).round() / 2))
        return (q, k, v), places, options


def starts(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


CASES = {
    "causal": Case(45),
    "full": Case(37, causal=False),
    "one query": Case(1, 23),
    "one token": Case(1),
    "later queries": Case(7, 40),
    "more queries than keys": Case(40, 9),
    "window": Case(50, window=8),
    "window, full, later": Case(20, 40, causal=False, window=11),
    "own key positions": Case(21, separate=True, scale=0.3),
    "one head each": Case(19, heads=(1, 1)),
    "six to one": Case(19, heads=(6, 1)),
    "packed": Case([13, 1, 30]),
    "packed with an empty one": Case([5, 0, 9], causal=False),
    "packed, other keys": Case([3, 20, 7], [10, 20, 5]),
    "packed window": Case([30, 12], window=5),
    "no queries": Case(0, 5),
    "no keys": Case(5, 0),
    "head 80": Case(33, spec=RotarySpec.axial(80), causal=False),
    "head 96": Case(18, spec=RotarySpec.alternate(96)),
    "head 48 partial": Case(18, spec=RotarySpec.rope(48, rotary_dim=20)),
    "head 128": Case(21, batch=1, spec=RotarySpec.mrope(128)),
}


def usable(impl, dtype=torch.float32):
    if reason := attention_module.why_not(impl, torch.device(DEVICE), dtype):
        pytest.skip(reason)


def run(impl, tensors, positions, spec, options, dtype=None):
    """Output, lse and the three gradients; `reference` in float64 where dtype says so."""
    tensors = [(t.to(dtype) if dtype else t).detach().requires_grad_() for t in tensors]
    if impl == "exact":
        out, lse = reference(*tensors, positions, spec, **options)
    else:
        out, lse = rotary_attention(
            *tensors, positions, spec, **options, return_lse=True, impl=impl
        )
    weight = torch.linspace(-1, 1, max(1, out.numel()), device=DEVICE)[: out.numel()]
    weight = weight.reshape(out.shape)
    (out.float() * weight).sum().backward()
    return [out.detach(), lse.detach(), *(t.grad for t in tensors)]


def compare(impl, case, dtype=torch.float32):
    tensors, positions, options = case.make(dtype)
    found = run(impl, tensors, positions, case.spec, options)
    exact = run("exact", tensors, positions, case.spec, options, torch.float64)
    plain = run("reference", tensors, positions, case.spec, options)
    for name, a, e, p in zip(("out", "lse", "dq", "dk", "dv"), found, exact, plain, strict=True):
        assert a.shape == e.shape, name
        if a.numel() == 0:
            continue
        assert torch.equal(a.isinf(), e.isinf()), name
        a, e, p = (t.double().masked_fill(e.isinf(), 0) for t in (a, e, p))
        error, size = (a - e).abs().max(), max(1.0, e.abs().max().item())
        allowed = 1e-5 * size
        if dtype != torch.float32:  # plain torch rounds q, k and the weights to the type
            unit = torch.finfo(dtype).eps
            allowed = max(2 * (p - e).abs().max().item(), 2 * unit * size)
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("name", CASES)
def test_cpu_matches_float64(name):
    usable("cpu")
    compare("cpu", CASES[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "window", "packed"])
def test_cpu_in_16_bits(name, dtype):
    usable("cpu")
    compare("cpu", CASES[name], dtype)


QUICK = {"one token", "more queries than keys", "packed with an empty one", "no queries", "no keys"}
QUICK |= {"head 48 partial", "window, full, later"}


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_triton_matches_float64(name):
    usable("triton")
    compare("triton", CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["causal", "packed", "head 80"])
def test_triton_in_16_bits(name, dtype):
    usable("triton")
    compare("triton", CASES[name], dtype)


def test_triton_writes_every_output(empty_is_nan):
    usable("triton")
    compare("triton", CASES["head 48 partial"])
    compare("triton", CASES["packed with an empty one"])


@pytest.mark.slow
def test_triton_backward_repeats():
    usable("triton")
    case = CASES["six to one"]
    tensors, positions, options = case.make()
    first, second = (run("triton", tensors, positions, case.spec, options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    ("impl", "name"),
    [
        ("cpu", "causal"),
        ("cpu", "packed, other keys"),
        pytest.param("triton", "one head each", marks=pytest.mark.slow),
    ],
)
def test_the_operator_follows_the_rules(impl, name):
    usable(impl)
    case = CASES[name]
    tensors, positions, options = case.make()
    leaves = [t.requires_grad_() for t in tensors]
    starts = options.get("cu_seqlens")
    rest = (options.get("key_positions", positions), case.spec.key, True, 0.2)
    rest += (starts, options.get("cu_seqlens_k", starts), 0, True, impl)
    torch.library.opcheck(torch.ops.clinkd.rotary_attention.default, (*leaves, positions, *rest))


@pytest.mark.parametrize("name", ["causal", "window", "packed, other keys"])
@pytest.mark.parametrize("keep", [False, True])
def test_results_lie_as_compilers_are_told(name, keep):
    usable("cpu")
    case = CASES[name]
    tensors, positions, options = case.make()
    keys, starts = options.get("key_positions", positions), options.get("cu_seqlens")
    rest = (case.spec.key, True, 0.2, starts, options.get("cu_seqlens_k", starts))
    arguments = (*tensors, positions, keys, *rest, options.get("window") or 0, keep, "cpu")
    run = torch.ops.clinkd.rotary_attention.default
    found = run(*arguments)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in arguments]
        told = run(*fake)
    assert [t.shape for t in found] == [t.shape for t in told]
    assert [t.stride() for t in found] == [t.stride() for t in told]


def test_chunks_of_queries(monkeypatch):
    usable("cpu")
    monkeypatch.setattr(_attention_flash, "CHUNK", 16)
    for name in ("window", "later queries", "more queries than keys", "window, full, later"):
        compare("cpu", CASES[name])


def test_never_a_square_matrix():
    """2,048 × 2,048 booleans are 4 MiB: no allocation comes near, whatever the mask."""
    if DEVICE != "cpu":
        pytest.skip("it profiles the memory of the CPU")
    spec = RotarySpec.split(32)
    q, k, v = (torch.randn(1, 2048, 1, 32) for _ in range(3))
    positions = torch.arange(2048.0).expand(2, 1, -1).contiguous()
    for more in ({}, {"causal": False}, {"window": 300}, {"key_positions": positions}):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            rotary_attention(q, k, v, positions, spec, impl="cpu", **more)
        largest = max(e.self_cpu_memory_usage for e in profile.events())
        assert largest < 4 << 20


def test_strided_inputs():
    spec = RotarySpec.split(32)
    qkv = torch.randn(2, 17, 8, 32)  # four query heads, two of keys, two of values
    q, k, v = qkv[:, :, :4], qkv[:, :, 4:6], qkv[:, :, 6:]
    positions = torch.rand(2, 17, 2).movedim(-1, 0)
    expected = reference(q, k, v, positions, spec)[0]
    assert torch.allclose(rotary_attention(q, k, v, positions, spec), expected, atol=1e-5)


def test_packed_equals_alone():
    case = CASES["packed"]
    (q, k, v), positions, options = case.make()
    out, lse = rotary_attention(q, k, v, positions, case.spec, **options, return_lse=True)
    for begin, end in zip(options["cu_seqlens"][:-1], options["cu_seqlens"][1:], strict=True):
        part = slice(begin, end)
        alone, alone_lse = rotary_attention(
            q[None, part], k[None, part], v[None, part], positions[:, None, part], case.spec,
            return_lse=True,
        )  # fmt: skip
        assert torch.allclose(out[part], alone[0], atol=1e-6)
        assert torch.allclose(lse[:, part], alone_lse[0], atol=1e-6)


def test_only_differences_of_positions_matter():
    spec = RotarySpec.alternate(64)
    q, k, v = (torch.randn(1, 9, 2, 64) for _ in range(3))
    positions = (torch.rand(2, 1, 9) * 100).round() / 2
    here = rotary_attention(q, k, v, positions, spec)
    there = rotary_attention(q, k, v, positions + 1000.5, spec)
    assert torch.allclose(here, there, atol=2e-5)
    assert not torch.allclose(here, rotary_attention(q, k, v, positions * 2, spec), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "packed", "packed, other keys", "packed window"])
def test_compiles_whole(name):
    case = CASES[name]
    tensors, positions, options = case.make()
    attend = lambda q, k, v: rotary_attention(q, k, v, positions, case.spec, **options)  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for run in (compiled, attend):
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = run(*leaves)
        grads = torch.autograd.grad(out.square().sum(), leaves)
        results.append((out.detach(), *grads))
    for found, expected in zip(*results, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(4, 2, 32)}, ValueError, "positions must be"),
        ({"k": torch.zeros(1, 4, 2, 16)}, ValueError, "k must have q's batch and head_dim"),
        ({"k": torch.zeros(1, 4, 3, 32)}, ValueError, "v must have k's shape"),
        (
            {"k": torch.zeros(1, 4, 1, 32).half()},
            TypeError,
            "k must be torch.float32 on cpu like q",
        ),
        (
            {"k": torch.zeros(1, 4, 3, 32), "v": torch.zeros(1, 4, 3, 32)},
            ValueError,
            "k must have a number of heads that divides q's 2, got 3",
        ),
        (
            {"k": torch.zeros(1, 5, 1, 32), "v": torch.zeros(1, 5, 1, 32)},
            ValueError,
            "key_positions must be given",
        ),
        ({"key_positions": torch.zeros(2, 1, 9)}, ValueError, r"key_positions must be \[A, 1, 4\]"),
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"scale": 0}, ValueError, "scale must be above 0 and finite, or None, got 0"),
        ({"scale": -1.0}, ValueError, "scale must be above 0"),
        ({"scale": float("nan")}, ValueError, "scale must be above 0"),
        ({"scale": torch.tensor(0.1)}, TypeError, "scale must be a number, got a tensor: multiply"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, r"q must be \[N, H, D\] with"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, reference, cpu, triton"),
    ],
)
def test_errors(change, error, message):
    arguments = {"q": torch.zeros(1, 4, 2, 32), "positions": torch.zeros(2, 1, 4)}
    arguments |= {"k": torch.zeros(1, 4, 1, 32), "v": torch.zeros(1, 4, 1, 32)}
    with pytest.raises(error, match=message):
        rotary_attention(**(arguments | {"spec": RotarySpec.split(32)} | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 4])}, TypeError, r"cu_seqlens must be int32 \[n \+ 1\]"),
        ({"cu_seqlens": starts([3])}, ValueError, r"rise from 0 to N = 4, got \[0, 3\]"),
        ({"cu_seqlens_k": starts([1, 3])}, ValueError, "cu_seqlens_k must come with a cu_seqlens"),
    ],
)
def test_errors_of_packing(change, error, message):
    if DEVICE != "cpu":
        pytest.skip("the contents of cu_seqlens on a GPU are not looked at: the host would wait")
    q = torch.zeros(4, 2, 32)
    options = {"cu_seqlens": starts([4])} | change
    with pytest.raises(error, match=message):
        rotary_attention(q, q, q, torch.zeros(2, 4), RotarySpec.split(32), **options)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_strided_starts(impl):
    usable(impl)
    case = CASES["packed"]
    (q, k, v), positions, options = case.make()
    starts = options["cu_seqlens"]
    found = [
        rotary_attention(q, k, v, positions, case.spec, cu_seqlens=given, impl=impl)
        for given in (starts, torch.stack((starts, starts * 0 + 7), 1)[:, 0])
    ]
    assert torch.equal(*found)
