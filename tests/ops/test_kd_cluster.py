"""`kd_loss` in one read on a real sm_90; without one, tests/simt runs the same kernels."""

import itertools

import pytest
import torch

from clinkd.ops import kd_loss, linear_kd_loss
from clinkd.ops._kd_at_once import SWITCH, why_no_clusters
from clinkd.ops.reference.kd_loss import DIVERGENCES


@pytest.fixture(autouse=True)
def _needs_clusters(monkeypatch):
    monkeypatch.setenv(SWITCH, "1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := why_no_clusters(device):
        pytest.skip(reason)


def make(N, Vs, Vt, dtype):
    g = torch.Generator(device="cuda").manual_seed(0)
    z, t = ((torch.randn(N, V, generator=g, device="cuda") * 3).to(dtype) for V in (Vs, Vt))
    labels = torch.randint(0, Vs, (N,), generator=g, device="cuda")
    labels[1::5] = -100
    return z, t, labels


def run(z, t, labels, scale=1.3, **options):
    z = z.detach().clone().requires_grad_()
    found = kd_loss(z, t, labels, **options)
    (grad,) = torch.autograd.grad(found.loss * scale, z)
    return type(found.loss.grad_fn).__name__, (*(part.detach() for part in found), grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_float64(divergence, dtype):
    sizes = ((9, 2560, 2560), (9, 2560, 1104), (300, 1024, 1024), (3, 8, 8))
    for T, cap, (N, Vs, Vt) in itertools.product((1.0, 2.0, 0.7), (None, 5.0), sizes):
        inputs = make(N, Vs, Vt, dtype)
        options = {"temperature": T, "softcap": cap, "divergence": divergence, "kd_weight": 0.7}
        name, found = run(*inputs, **options)
        assert name == "WithGradientBackward"
        z, t, labels = inputs
        _, exact = run(z.double(), t.double(), labels, impl="reference", **options)
        _, plain = run(*inputs, impl="reference", **options)
        for a, e, p in zip(found, exact, plain, strict=True):
            size = e.abs().max().item()
            least = 1e-5 * max(size, 1e-3)
            if a.dtype != torch.float32:  # rounded once more, by the scale
                least = 2 * torch.finfo(a.dtype).eps * size
            assert (a - e).abs().max() <= max(2 * (p - e).abs().max().item(), least)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_qwen_vocabulary_equals_two_passes(dtype, monkeypatch):
    """More rows than a GPU holds at once; both vocabularies in use."""
    inputs = make(600, 151_936, 152_064, dtype)
    name, found = run(*inputs, 1.0, temperature=2.0)
    assert name == "WithGradientBackward"
    monkeypatch.delenv(SWITCH)
    name, expected = run(*inputs, 1.0, temperature=2.0)
    assert name != "WithGradientBackward"
    for a, e in zip(found, expected, strict=True):
        allowed = 2e-5 if a.dtype == torch.float32 else torch.finfo(a.dtype).eps
        assert (a.float() - e.float()).abs().max() <= allowed * e.float().abs().max()


def test_the_same_bits_each_time():
    inputs = make(600, 32_000, 32_000, torch.bfloat16)
    (_, first), (_, again) = (run(*inputs, temperature=2.0, divergence="jsd") for _ in range(2))
    # the sums over the rows are torch's
    assert torch.equal(first[-1], again[-1])


def test_row_chunks(monkeypatch):
    g = torch.Generator(device="cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 64, generator=g, device="cuda") for n in (300, 4096))
    labels = torch.randint(0, 4096, (300,), generator=g, device="cuda")

    def step():
        given = [x.detach().requires_grad_() for x in (hidden, weight)]
        teacher = (hidden.flip(0), weight.flip(0))
        loss = linear_kd_loss(*given, *teacher, labels, workspace=2 * 4096 * 4 * 100).loss
        return loss.detach(), *torch.autograd.grad(loss, given)

    found = step()
    monkeypatch.delenv(SWITCH)
    for a, e in zip(found, step(), strict=True):
        assert (a - e).abs().max() <= 1e-4 * e.abs().max()
