"""The row kernels of the distillation loss, on whatever device is here, against float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.ops import kd_loss, linear_kd_loss
from clinkd.ops._impl import why_not_triton
from clinkd.ops._kd_loss_native import operator_options
from clinkd.ops.kd_loss import why_not
from clinkd.ops.reference.kd_loss import DIVERGENCES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def _needs_the_kernel():
    if reason := why_not(DEVICE, torch.device(DEVICE), torch.float32):
        pytest.skip(reason)


def make(N, Vs, Vt, dtype=torch.float32, size=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    z, t = ((torch.randn(N, V, generator=g) * size).to(DEVICE, dtype) for V in (Vs, Vt))
    labels = torch.randint(0, Vs, (N,), generator=g).to(DEVICE)
    labels[1::5] = -100
    return z, t, labels, torch.rand(N, generator=g).to(DEVICE)


def run(z, t, labels, impl, **options):
    z = z.detach().clone().requires_grad_()
    found = kd_loss(z, t, labels, impl=impl, **options)
    (found.loss * 1.3).backward()
    return (*(part.detach() for part in found), z.grad)


def compare(z, t, labels, slack=0.0, **options):
    found = run(z, t, labels, DEVICE, **options)
    exact = run(z.double(), t.double(), labels, "reference", **options)
    plain = run(z, t, labels, "reference", **options)
    for a, e, p in zip(found, exact, plain, strict=True):
        size = e.abs().max().item()
        least = max(1e-5 * max(size, 1e-3), slack)
        if a.dtype != torch.float32:
            least = torch.finfo(a.dtype).eps * size
        assert (a - e).abs().max() <= max(2 * (p - e).abs().max().item(), least)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_float64(divergence, dtype):
    widths = ((2500, 2500), (2500, 1111), (777, 2048), (1025, 1024), (5, 5))
    for T, cap, (Vs, Vt) in itertools.product((1.0, 2.0, 0.7), (None, 5.0), widths):
        z, t, labels, weight = make(7, Vs, Vt, dtype)
        options = {"temperature": T, "softcap": cap, "divergence": divergence, "weight": weight}
        compare(z, t, labels, beta=0.3, skew=0.2, kd_weight=0.7, **options)


@settings(max_examples=30, deadline=None)
@given(
    N=st.integers(1, 6),
    Vs=st.integers(1, 70),
    Vt=st.integers(1, 70),
    T=st.floats(0.1, 20),
    divergence=st.sampled_from(DIVERGENCES),
    layout=st.sampled_from(["plain", "cut", "every second"]),
)
def test_any_shape_and_stride(N, Vs, Vt, T, divergence, layout):
    z, t, labels, _ = make(N, 2 * Vs + 3, 2 * Vt + 3)
    labels = labels.clamp(max=Vs - 1)
    if layout == "cut":
        z, t = z[:, 3 : 3 + Vs], t[:, 1 : 1 + Vt]
    elif layout == "every second":
        z, t = z[:, : 2 * Vs : 2], t[:, : 2 * Vt : 2]
    else:
        z, t = z[:, :Vs].contiguous(), t[:, :Vt].contiguous()
    compare(z, t, labels, temperature=T, divergence=divergence)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_two_models_that_are_nearly_one(divergence):
    """Plain torch loses such a divergence to rounding, from all of it to a thousandth."""
    for T, apart in itertools.product((0.5, 1.0, 2.0), (1e-4, 1e-2, 0.3)):
        z, noise, labels, _ = make(5, 5000, 5000)
        options = {"temperature": T, "divergence": divergence}
        t = z + apart * noise
        exact = kd_loss(z.double(), t.double(), labels, impl="reference", **options).kd
        found = kd_loss(z, t, labels, impl=DEVICE, **options).kd
        assert found.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_extreme_logits(divergence):
    z, t, labels, _ = make(8, 300, 300, size=1e4)
    # the reverse form subtracts log-ratios of 1e4, which float32 holds to 1e-3
    slack = 1e-3 if divergence == "reverse_kl" else 0.0
    compare(z, t, labels, slack, divergence=divergence)
    if divergence == "reverse_kl":
        return  # plain torch has no gradient there
    z[:, 7], t[:, 7] = -torch.inf, -torch.inf  # as where both models mask a token
    labels[labels == 7] = 8
    compare(z, t, labels, divergence=divergence, temperature=2.0)


def test_a_row_that_is_wrong_gives_nan_alone():
    z, t, labels, _ = make(6, 40, 40)
    labels[:] = 3
    z[0, 5] = torch.nan
    z[1] = -torch.inf
    labels[2] = 40
    t[3] = torch.nan
    z.requires_grad_()
    options = operator_options(2.0, "forward_kl", 0.5, 0.1, -100, None, DEVICE)
    ce, kd, _ = torch.ops.clinkd.kd_rows(z, t, labels, *options)
    assert (ce + kd).isnan().tolist() == [True, True, True, True, False, False]
    (grad,) = torch.autograd.grad((ce + kd).sum(), z)
    assert grad[4:].isfinite().all()
    assert grad[:4].isnan().any(dim=1).all()


def test_check_names_the_row(monkeypatch):
    monkeypatch.setenv("CLINKD_CHECK", "1")
    z, t, labels, _ = make(6, 40, 40)
    labels[4] = 40
    with pytest.raises(ValueError, match=r"labels must be -100 or in 0 … 39.*row 4"):
        kd_loss(z, t, labels)
    labels[4] = 0
    z[2, 3] = torch.nan
    with pytest.raises(ValueError, match="student_logits must have no NaN: row 2"):
        kd_loss(z, t, labels)
    z[2] = -torch.inf
    with pytest.raises(ValueError, match="student_logits must have a finite maximum: row 2"):
        kd_loss(z, t, labels)
    z[2], labels[2] = 0, -100
    kd_loss(z, t, labels)


def test_every_output_is_written(empty_is_nan):
    z, t, labels, _ = make(9, 1500, 1200)
    assert all(x.isfinite().all() for x in run(z, t, labels, DEVICE, temperature=2.0))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck():
    z, t, labels, _ = make(3, 40, 30)
    options = operator_options(2.0, "forward_kl", 0.5, 0.1, -100, None, DEVICE)
    for sample in (z, z.clone().requires_grad_()):
        torch.library.opcheck(torch.ops.clinkd.kd_rows.default, (sample, t, labels, *options))


@pytest.mark.slow
def test_compiles_whole():
    z, t, labels, _ = make(5, 60, 60)
    z.requires_grad_()

    def step(z):
        return kd_loss(z * 2, t, labels, temperature=2.0).loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(z), z)[0]
    assert torch.allclose(torch.autograd.grad(compiled(z), z)[0], expected, atol=1e-6)


def test_autocast_leaves_the_arithmetic_alone():
    z, t, labels, _ = make(5, 60, 60)
    expected = run(z, t, labels, DEVICE)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = run(z, t, labels, DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_two_dtypes_are_widened():
    z, t, labels, _ = make(5, 60, 60)
    found = run(z.bfloat16(), t, labels, DEVICE)
    expected = run(z.bfloat16().float(), t, labels, DEVICE)
    assert torch.equal(found[0], expected[0])
    assert found[3].dtype == torch.bfloat16


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_linear_equals_the_reference(divergence):
    g = torch.Generator().manual_seed(1)
    hidden, teacher, weight, head = (
        torch.randn(*shape, generator=g).to(DEVICE)
        for shape in ((23, 16), (23, 12), (90, 16), (70, 12))
    )
    labels = torch.randint(0, 90, (23,), generator=g).to(DEVICE)
    labels[::3] = -100
    results = []
    for impl, workspace in (("reference", "auto"), (DEVICE, "auto"), (DEVICE, 2000)):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        loss = linear_kd_loss(
            *leaves, teacher, head, labels, temperature=2.0, divergence=divergence,
            impl=impl, workspace=workspace,
        ).loss  # fmt: skip
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for found in results[1:]:
        for a, e in zip(found, results[0], strict=True):
            assert (a - e).abs().max() <= 1e-5 * e.abs().max()


def test_no_stored_logits_at_the_door():
    if reason := why_not_triton(torch.device(DEVICE), torch.float32):
        pytest.skip(reason)
    g = torch.Generator().manual_seed(2)
    hidden, teacher, weight, head = (
        torch.randn(*shape, generator=g).to(DEVICE)
        for shape in ((9, 16), (9, 16), (50, 16), (50, 16))
    )
    labels = torch.tensor([1, 2, -100, 3, 4, -100, 5, 6, 7], device=DEVICE)
    arguments = (hidden, weight, teacher, head, labels)
    for divergence in DIVERGENCES:
        options = dict(temperature=2.0, divergence=divergence, beta=0.3, skew=0.2)
        found = linear_kd_loss(*arguments, **options, workspace=0)
        expected = linear_kd_loss(*arguments, **options)
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of NaN in the interpreter
@pytest.mark.parametrize("workspace", [0, 500, "auto"])
def test_check_names_the_row_that_the_caller_gave(workspace, monkeypatch):
    """Ignored rows are dropped, and rows are cut into chunks, before the logits exist."""
    if workspace == 0 and (reason := why_not_triton(torch.device(DEVICE), torch.float32)):
        pytest.skip(reason)
    monkeypatch.setenv("CLINKD_CHECK", "1")
    hidden, weight = torch.randn(12, 16, device=DEVICE), torch.randn(40, 16, device=DEVICE)
    labels = torch.arange(12, device=DEVICE)
    labels[:5] = -100
    arguments = (hidden, weight, hidden.clone(), weight, labels)
    linear_kd_loss(*arguments, workspace=workspace)
    labels[9] = 40
    with pytest.raises(ValueError, match=r"labels must be .*: row 9 breaks it, and 0 more"):
        linear_kd_loss(*arguments, workspace=workspace)
    labels[9] = 0
    hidden[7, 3] = torch.nan
    with pytest.raises(ValueError, match=r"logits.* must have no NaN.*: row 7 breaks it"):
        linear_kd_loss(*arguments, workspace=workspace)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_of_hidden_states_in_16_bits(dtype, chunks, autocast):
    """Heads as wide as autocast leaves them, or 16 bits themselves; one chunk, and several."""
    g = torch.Generator().manual_seed(0)
    shapes = ((40, 64), (500, 64), (40, 48), (500, 48))
    exact = [torch.randn(*shape, generator=g).mul(0.5).to(DEVICE, dtype) for shape in shapes]
    labels = torch.randint(0, 500, (40,), generator=g).to(DEVICE)
    bits = 2 if autocast or dtype != torch.float32 else 4
    results = []
    for tensors, options in (
        ([t.double() for t in exact], {"impl": "reference"}),
        (exact, {"impl": DEVICE, "workspace": 2 * 500 * bits * 40 // chunks}),
    ):
        hidden, weight, teacher, head = tensors
        leaves = [hidden.detach().requires_grad_(), weight.detach().requires_grad_()]
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
            loss = linear_kd_loss(
                leaves[0], leaves[1], teacher, head, labels, temperature=2.0, **options
            ).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    allowed = 1e-5 if bits == 4 else 2e-2
    for found, expected, like in zip(results[1], results[0], (None, *exact[:2]), strict=True):
        assert like is None or found.dtype == like.dtype
        assert (found - expected).norm() <= allowed * expected.norm()
