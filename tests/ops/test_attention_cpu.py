"""Attention's C++ kernel: borders of blocks, threads, vectors, memory, what it leaves to torch."""

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_rotary_attention import CASES, Case, compare, run

from clinkd.ops import _attention_cpu, _attention_flash, rotary_attention
from clinkd.rotary import RotarySpec

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or not _attention_cpu.built("attention_cpu"),
    reason="it is for the kernel of the CPU, which is not built or not what runs here",
)

here = Path(__file__).parent
csrc = here.parents[1] / "csrc"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

BLOCKS = {
    "a block of queries": Case(96),
    "one more": Case(97),
    "a block of keys": Case(192, heads=(2, 1)),
    "one more key": Case(193, heads=(2, 1), batch=1),
    "three blocks, full": Case(200, 390, causal=False, batch=1, heads=(2, 1)),
    "three blocks, later": Case(130, 410, batch=1, heads=(3, 1)),
    "window over blocks": Case(400, window=150, batch=1, heads=(2, 1)),
    "window within one": Case(230, window=3, batch=1, heads=(1, 1)),
    "window, full": Case(210, 300, window=70, causal=False, batch=1, heads=(2, 2)),
    "packed over blocks": Case([100, 1, 0, 205], heads=(2, 1)),
    "packed, other keys": Case([100, 20, 60], [10, 0, 250], heads=(2, 2), causal=False),
    "head 16": Case(60, spec=RotarySpec.split(16)),
    "head 34": Case(60, spec=RotarySpec.rope(34, rotary_dim=22)),
    "head 72": Case(60, spec=RotarySpec.axial(72)),
    "head 200": Case(100, spec=RotarySpec.alternate(200), batch=1),
    "head 256": Case(100, spec=RotarySpec.rope(256, layout="interleaved"), batch=1),
    "four axes": Case(50, spec=RotarySpec(32, (0, 1, 2, 3) * 4, (1.0, 0.1, 0.3, 0.02) * 4, 16)),
}


@pytest.fixture(autouse=True)
def takes_all(monkeypatch):
    """However few the tokens are."""
    monkeypatch.setattr(_attention_cpu, "FEWEST_QUERIES", 0)
    monkeypatch.setattr(_attention_cpu, "FEWEST_KEYS", 0)


@pytest.mark.parametrize("name", BLOCKS)
def test_borders_of_blocks(name):
    compare("cpu", BLOCKS[name])


@pytest.mark.parametrize("name", CASES)
def test_few_queries(name):
    compare("cpu", CASES[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bits_over_blocks(dtype):
    compare("cpu", BLOCKS["three blocks, later"], dtype)


@pytest.mark.parametrize("name", CASES)
def test_what_is_left_to_torch(name, monkeypatch):
    monkeypatch.setattr(_attention_cpu, "takes", lambda *_: False)
    compare("cpu", CASES[name])


def test_which_kernel_runs(monkeypatch):
    """What the C++ kernel takes never comes to torch's, and the rest always does."""
    monkeypatch.undo()
    asked = []

    def watched(original):
        return lambda *arguments: asked.append(1) or original(*arguments)

    for name in ("forward", "backward"):
        monkeypatch.setattr(_attention_flash, name, watched(getattr(_attention_flash, name)))

    def by_torch(case, dtype=torch.float32):
        asked.clear()
        tensors, positions, options = case.make(dtype)
        run("cpu", tensors, positions, case.spec, options)
        assert len(asked) in (0, 2)
        return bool(asked)

    assert not by_torch(Case(96))
    assert not by_torch(Case([40, 60]))
    assert not by_torch(Case(5))
    assert by_torch(Case(1, 60))
    assert by_torch(Case([1, 1], [60, 60]))
    assert by_torch(Case([7] * 20, heads=(8, 1)))
    assert by_torch(Case(96), torch.float64)
    assert not by_torch(Case(1, 60, heads=(48, 1), batch=1))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    _attention_cpu._has_tiles.cache_clear()
    assert by_torch(Case(96), torch.bfloat16)
    assert not by_torch(Case(96), torch.float16)
    assert not by_torch(Case(96))
    _attention_cpu._has_tiles.cache_clear()


def test_any_number_of_threads():
    """Keys' gradients are shared out in two ways: by heads of the keys, or of the queries."""
    case = Case(230, heads=(6, 2), batch=1)
    tensors, positions, options = case.make()
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 3, 16, 3):
            torch.set_num_threads(n)
            found.append(run("cpu", tensors, positions, case.spec, options))
    finally:
        torch.set_num_threads(threads)
    for a, b in pairwise(found):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(found[2], found[4], strict=True))


def test_writes_every_output(empty_is_nan):
    for name in ("packed, other keys", "window, full", "head 34"):
        compare("cpu", BLOCKS[name])


def test_large_scores():
    """Of 1e4 and more: one key has it all, and what is not finite stays in its row."""
    spec = RotarySpec.rope(32, rotary_dim=2)
    q, k, v = (torch.randn(1, 200, 2, 32) for _ in range(3))
    positions = torch.zeros(1, 1, 200)
    far = [t.requires_grad_() for t in (q * 1e3, k.clone(), v.clone())]
    out = rotary_attention(*far, positions, spec, impl="cpu")
    exact = [t.detach().double().requires_grad_() for t in far]
    expected = rotary_attention(*exact, positions, spec, impl="reference")
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), far))
    bad = q.clone()
    bad[0, 130, 1] = torch.nan
    out = rotary_attention(bad, k, v, positions, spec, impl="cpu")
    assert out.isnan().nonzero()[:, 1:3].unique(dim=0).tolist() == [[130, 1]]


def test_keys_that_score_minus_infinity():
    """A whole block of them says nothing of those that follow; a row of nothing else is NaN."""
    spec = RotarySpec.rope(32, rotary_dim=2)
    q, k, v = (torch.randn(1, 250, 1, 32) for _ in range(3))
    positions = torch.zeros(1, 1, 250)
    q[..., 5] = 1
    for hidden in (192, 250):
        k[:, :hidden, :, 5] = -torch.inf
        found, expected = (
            rotary_attention(q, k, v, positions, spec, causal=False, return_lse=True, impl=impl)
            for impl in ("cpu", "reference")
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_window_of_any_width():
    case = Case(100, window=None)
    tensors, positions, options = case.make()
    wide = run("cpu", tensors, positions, case.spec, options)
    for window in (sys.maxsize, 2**70):
        found = run("cpu", tensors, positions, case.spec, {**options, "window": window})
        assert all(torch.equal(a, b) for a, b in zip(found, wide, strict=True))


@pytest.mark.parametrize("starts", [[0, 60], [0, 60, 20, 100], [0, 60, 2_000_000], [1, 100]])
def test_wrong_starts_in_a_graph(starts):
    """There nobody looks at numbers before the kernel, which must not follow them."""
    q, k, v = (torch.randn(100, 2, 32) for _ in range(3))
    positions, spec = torch.zeros(2, 100), RotarySpec.split(32)

    @torch.compile(backend="eager", fullgraph=True)
    def attend(cu_seqlens):
        return rotary_attention(q, k, v, positions, spec, cu_seqlens=cu_seqlens, impl="cpu")

    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0"):
        attend(torch.tensor(starts, dtype=torch.int32))


NARROW = """
import sys
import torch
from clinkd import _C
from clinkd.ops import _attention_cpu, rotary_attention
from clinkd.rotary import RotarySpec

assert _C.vector_width == int(sys.argv[1])
_attention_cpu.FEWEST_QUERIES = 0
for D, window in ((128, None), (80, 70), (34, None)):
    spec = RotarySpec.rope(D, rotary_dim=D - 6)
    found = []
    torch.manual_seed(0)
    given = [torch.randn(1, 210, heads, D) for heads in (4, 2, 2)]
    runs = (torch.float32, "cpu"), (torch.bfloat16, "cpu"), (torch.float64, "reference")
    for dtype, impl in runs:
        leaves = [t.to(dtype).requires_grad_() for t in given]
        positions = torch.arange(210.0).view(1, 1, -1)
        out = rotary_attention(*leaves, positions, spec, window=window, impl=impl)
        weight = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        found.append([out, *torch.autograd.grad(out, leaves, weight)])
    for ours, half, exact in zip(*found):
        assert torch.allclose(ours.double(), exact, rtol=1e-4, atol=1e-5), (D, window)
        assert torch.allclose(half.double(), exact, rtol=5e-2, atol=5e-2), (D, window)
"""

MEMORY = """
import resource
import torch
from clinkd.ops import rotary_attention
from clinkd.rotary import RotarySpec

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

def run(S):
    leaves = [torch.randn(1, S, 1, 16, requires_grad=True) for _ in range(3)]
    positions = torch.arange(float(S)).view(1, 1, -1).expand(2, 1, -1).contiguous()
    out = rotary_attention(*leaves, positions, RotarySpec.split(16), window=64, impl="cpu")
    torch.autograd.grad(out.sum(), leaves)

run(64)
before = peak()
run(20_000)  # scores of a head would be 1.6 GB
print((peak() - before) // 1024)
"""

SHORT = """
import resource
import torch
from clinkd.ops import rotary_attention
from clinkd.rotary import RotarySpec

def run(N):
    leaves = [torch.randn(N, 2, 64, requires_grad=True) for _ in range(3)]
    starts = torch.arange(N + 1, dtype=torch.int32)
    out = rotary_attention(
        *leaves, torch.zeros(2, N), RotarySpec.split(64), cu_seqlens=starts, impl="cpu"
    )
    torch.autograd.grad(out.sum(), leaves)

run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(8192)  # queries of 4 MB
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def python(program, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("width", [4, 8, 16])
def test_narrower_vectors(width):
    """In memory that is full of large numbers, as malloc may give it."""
    from clinkd import _C

    if width > _C.vector_width:
        pytest.skip(f"this processor has vectors of {_C.vector_width} floats")
    python(NARROW, str(width), CLINKD_VECTORS=str(width), MALLOC_PERTURB_="128")


def test_memory_grows_with_the_tokens():
    assert int(python(MEMORY)) < 100


def test_memory_of_short_sequences():
    assert int(python(SHORT)) < 150


@pytest.mark.slow
@pytest.mark.parametrize("width", [4, 16])
def test_reads_and_writes_only_its_own(width, tmp_path):
    """Under the sanitizers, for vectors that this processor may lack."""
    if shutil.which("g++") is None:
        pytest.skip("it compiles a program with g++")
    program = tmp_path / "check"
    flags = ["-O1", "-std=c++17", "-Wno-psabi", "-fopenmp", f"-DCLINKD_WIDTH={width}"]
    sources = [here / "attention_check.cpp"]
    sources += [csrc / f"attention{part}_cpu.cpp" for part in ("", "_backward")]
    build = ["g++", *flags, *SANITIZERS, f"-I{csrc}", *map(str, sources), "-o", str(program)]
    subprocess.run(build, check=True, timeout=300)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
