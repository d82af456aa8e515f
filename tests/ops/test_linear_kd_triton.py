"""The form of `linear_kd_loss` that stores no logit, against the definition in float64."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clinkd.ops import _linear_kd_triton as tiles
from clinkd.ops._impl import why_not_triton
from clinkd.ops._linear_kd_triton import BANDS, LINEAR_KD_TILES
from clinkd.ops.reference.kd_loss import DIVERGENCES, kd_loss_rows

FORWARD, REVERSE, JSD, SKEW = range(4)
MIX = 0.3  # JSD's beta and skew KL's skew
IGNORED = -100
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _needs_triton():
    if reason := why_not_triton(DEVICE, torch.float32):
        pytest.skip(reason)


def make(N, student, teacher, bias, dtype=torch.float32, size=0.3):
    g = torch.Generator().manual_seed(N)

    def side(V, C):
        tensors = (torch.randn(N, C, generator=g), torch.randn(V, C, generator=g) * size)
        tensors = (*tensors, torch.randn(V, generator=g))
        return [t.to(DEVICE, dtype) if t.dim() > 1 or bias else None for t in tensors]

    labels = torch.randint(0, student[0], (N,), generator=g).to(DEVICE)
    return side(*student), side(*teacher), labels, torch.rand(N, generator=g).to(DEVICE)


def run(
    student,
    teacher,
    labels,
    weight,
    kd_weight,
    temperature,
    divergence,
    softcap,
    vocab_size=None,
    mix=MIX,
):
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in student]
    factor = labels.new_ones(labels.shape, dtype=torch.float32) if weight is None else weight
    loss, parts, _ = LINEAR_KD_TILES(
        *leaves, *teacher, labels, factor, kd_weight, IGNORED, temperature, divergence, mix,
        softcap or 0.0, vocab_size or len(student[1]),
    )  # fmt: skip
    (loss * 1.7).backward()
    return loss.detach(), parts, *(t.grad for t in leaves if t is not None)


def run_exact(
    student, teacher, labels, weight, kd_weight, temperature, divergence, softcap, dtype, mix=MIX
):
    leaves, others = (
        [None if t is None else t.detach().to(dtype) for t in side] for side in (student, teacher)
    )
    leaves = [None if t is None else t.requires_grad_() for t in leaves]
    ce, kd = kd_loss_rows(
        F.linear(*leaves),
        F.linear(*others),
        labels,
        temperature=temperature,
        divergence=DIVERGENCES[divergence],
        beta=mix,
        skew=mix,
        softcap=softcap,
    )
    weight = torch.ones_like(ce) if weight is None else weight
    parts = torch.stack([(ce * weight).sum(), (kd * weight).sum()])
    loss = (parts[0] + kd_weight * parts[1]) / (1 + kd_weight)
    (loss * 1.7).backward()
    return loss.detach(), parts.detach(), *(t.grad for t in leaves if t is not None)


@pytest.mark.parametrize("divergence", range(4), ids=DIVERGENCES)
@pytest.mark.parametrize(
    ("N", "student", "teacher", "bias", "weighted", "temperature", "softcap"),
    [
        (21, (77, 48), (77, 40), False, True, 2.0, None),
        (40, (150, 33), (90, 64), True, False, 1.0, 3.0),
        (5, (90, 64), (150, 32), True, True, 20.0, None),
        (1, (600, 16), (33, 16), False, False, 0.5, 5.0),
        (3, (1, 16), (7, 16), True, False, 1.0, None),
        (6, (70, 16), (70, 16), True, True, 0.1, None),
    ],
)
def test_matches_float64(N, student, teacher, bias, weighted, temperature, divergence, softcap):
    *sides, labels, weight = make(N, student, teacher, bias)
    options = (labels, weight if weighted else None, 0.7, temperature, divergence, softcap)
    found = run(*sides, *options)
    exact = run_exact(*sides, *options, torch.float64)
    plain = run_exact(*sides, *options, torch.float32)
    for a, e, p in zip(found, exact, plain, strict=True):
        least = 1e-5 * e.abs().max().clamp(min=1e-2)
        assert (a - e).abs().max() <= max(least, 2 * (p - e).abs().max())


@pytest.mark.parametrize("divergence", [FORWARD, JSD, SKEW])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype, divergence):
    """At most twice the error of plain torch in that dtype."""
    *sides, labels, weight = make(33, (170, 48), (170, 64), False, dtype)
    options = (labels, weight, 0.5, 2.0, divergence, None)
    found = run(*sides, *options)
    exact = run_exact(*sides, *options, torch.float64)
    plain = run_exact(*sides, *options, dtype)
    for a, e, p in zip(found, exact, plain, strict=True):
        least = torch.finfo(dtype).eps * e.abs().max()
        assert (a - e).abs().max() <= max(2 * (p - e).abs().max(), least)


@pytest.mark.parametrize("divergence", range(4), ids=DIVERGENCES)
def test_identical_models_have_no_distance(divergence):
    student, _, labels, _ = make(9, (64, 32), (64, 32), True)
    _, parts, *_ = run(student, student, labels, None, 1.0, 2.0, divergence, None)
    assert 0 <= parts[1] < (1e-4 if divergence < JSD else 1e-9)


@pytest.mark.parametrize("divergence", [JSD, SKEW])
@pytest.mark.parametrize("noise", [1e-4, 1e-2])
def test_a_small_divergence_keeps_its_digits(divergence, noise):
    """Against float64 on the very same float32 logits: a width of 1 makes every product exact."""
    g = torch.Generator().manual_seed(3)
    N, V = 8, 3000
    zeros = torch.zeros(N, 16, device=DEVICE)
    head = torch.zeros(V, 16, device=DEVICE)
    bias = torch.randn(V, generator=g).to(DEVICE)
    moved = bias + noise * torch.randn(V, generator=g).to(DEVICE)
    labels = torch.arange(N, device=DEVICE)
    sides = ((zeros, head, moved), (zeros, head, bias))
    options = (labels, None, 0.5, 2.0, divergence, None)
    found, exact = run(*sides, *options)[1], run_exact(*sides, *options, torch.float64)[1]
    assert (found[1] / exact[1] - 1).abs() < 2e-4


@pytest.mark.parametrize("divergence", range(4), ids=DIVERGENCES)
def test_extreme_logits(divergence):
    student, teacher, labels, _ = make(7, (50, 32), (50, 32), False, size=1e3)
    options = (labels, None, 0.5, 1.0, divergence, None)
    found = run(student, teacher, *options)
    exact = run_exact(student, teacher, *options, torch.float64)
    plain = run_exact(student, teacher, *options, torch.float32)
    for a, e, p in zip(found, exact, plain, strict=True):
        # a float32 logit of 1e4 is itself uncertain by 1e-3
        assert (a - e).abs().max() <= max(2 * (p - e).abs().max(), 1e-4 * e.abs().max())


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of -inf - -inf
@pytest.mark.parametrize("divergence", range(4), ids=DIVERGENCES)
def test_columns_of_minus_infinity(divergence):
    student, teacher, labels, _ = make(5, (70, 16), (70, 16), True)
    labels %= 40
    for columns in (slice(40, 70), slice(33, 34)):  # a whole block, and one column
        student[2][columns] = teacher[2][columns] = -torch.inf
    labels[labels == 33] = 0
    options = (labels, None, 0.5, 2.0, divergence, None)
    found = run(student, teacher, *options)
    keep = [c for c in range(40) if c != 33]
    cut = [(h, w[keep], b[keep]) for h, w, b in (student, teacher)]
    places = torch.tensor([keep.index(y) for y in labels.tolist()], device=DEVICE)
    expected = run(*cut, places, *options[1:])
    for a, b in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b)
    assert not found[4][[33, *range(40, 70)]].any()


def test_padded_rows_take_no_part():
    student, teacher, labels, weight = make(9, (77, 16), (60, 16), True)
    labels %= 50
    found = run(student, teacher, labels, weight, 0.5, 2.0, FORWARD, None, vocab_size=50)
    hidden, head, bias = student
    expected = run((hidden, head[:50], bias[:50]), teacher, labels, weight, 0.5, 2.0, FORWARD, None)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[: len(b)] if b.dim() else a, b)
        assert not (b.dim() and a[len(b) :].any())


def test_no_rows():
    student, teacher, labels, _ = make(0, (20, 16), (20, 16), False)
    loss, _, *grads = run(student, teacher, labels, None, 0.5, 1.0, FORWARD, None)
    assert loss == 0
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("divergence", range(4), ids=DIVERGENCES)
def test_every_output_is_written(empty_is_nan, divergence):
    *sides, labels, weight = make(19, (90, 33), (70, 32), False)
    assert all(t.isfinite().all() for t in run(*sides, labels, weight, 0.5, 2.0, divergence, None))


def test_a_label_outside_is_nan_not_garbage():
    student, teacher, labels, _ = make(6, (40, 16), (40, 16), False)
    labels[2] = 40
    loss, parts, grad, _ = run(student, teacher, labels, None, 0.5, 1.0, FORWARD, None)
    assert loss.isnan()
    assert parts[0].isnan()
    assert grad.isnan().any(dim=1).tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("divergence", [FORWARD, JSD])
def test_memory_of_8192_tokens(divergence, monkeypatch):
    """Everything torch allocates beside inputs and gradients, by shapes without memory."""
    path = Path(__file__).parent.parent / "plan" / "live_bytes.py"
    spec = importlib.util.spec_from_file_location("live", path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    sums = importlib.import_module("clinkd.kernels.linear_kd_loss")
    gradient = importlib.import_module("clinkd.kernels.linear_kd_gradient")
    N, V = 8192, 151_936

    def meta(*shape):
        return torch.empty(*shape, dtype=torch.float32, device="meta")

    monkeypatch.setattr(sums, "statistics", lambda *_: (meta(sums.SLOTS, BANDS, N), meta(N)))
    monkeypatch.setattr(sums, "mixture", lambda *_: meta(2, BANDS, N))
    monkeypatch.setattr(gradient, "gradient_band", lambda *_: None)
    student, teacher = (
        [torch.empty(n, C, dtype=torch.bfloat16, device="meta") for n in (N, V)]
        for C in (1536, 3584)
    )
    labels = torch.empty(N, dtype=torch.int64, device="meta")
    factor = torch.empty(N, dtype=torch.float32, device="meta")
    monkeypatch.setattr(tiles, "counted_rows", lambda labels, _: labels)  # all; none is copied
    live = tool.LiveBytes()
    for t in (*student, *teacher, labels, factor):
        live.add(t)
    before = live.now
    given = (*student, None, *teacher, None, labels, factor)
    options = (0.5, IGNORED, 2.0, divergence, MIX, 0.0, V)
    with live:
        loss, parts, statistics = tiles._tiles(*given, *options)
        learns = [True, True, False]
        grads = tiles._tiles_backward(loss, *given, statistics, learns, *options)
        del parts
    gradients = sum(grad.nbytes for grad in grads)
    assert gradients == 2 * 1536 * (N + V)
    assert live.peak - before - gradients < 64e6
