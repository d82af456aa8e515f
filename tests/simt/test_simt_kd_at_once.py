"""`kd_loss` and `linear_kd_loss` in one read, with the SIMT harness as the GPU: the whole ops."""

from importlib import import_module

import pytest
import torch

from clinkd.ops import _kd_at_once, kd_loss, linear_kd_loss
from clinkd.ops import _kd_loss_native as native
from clinkd.ops._impl import TYPES
from clinkd.ops.reference.kd_loss import DIVERGENCES

PLACES = (
    "student", "teacher", "labels", "ce", "kd", "statistics", "ce_factor", "kd_factor", "grad",
)  # fmt: skip
SIZES = (
    "rows", "student_columns", "teacher_columns", "student_stride", "teacher_stride", "grad_stride",
    "factor_stride",
)  # fmt: skip
NUMBERS = ("ignore_index", "temperature", "mix", "softcap", "divergence")


@pytest.fixture(scope="module")
def machine(simt):
    return simt("kd_loss_cluster.cu", "kd_loss.cu", "kd_scale.cu")


@pytest.fixture
def launched(machine, monkeypatch):
    """Tensors of the CPU count as those of an sm_90; gives the names of the kernels that ran."""
    names = []

    def run_native(name, impl, tensor, places, sizes, *options):
        names.append(name)
        fields = dict(zip(PLACES + SIZES + NUMBERS, (*places, *sizes, *options), strict=True))
        machine.run(f"{name}_{impl}", fields | {"type": TYPES[tensor.dtype]})

    monkeypatch.setattr(native, "run_native", run_native)
    monkeypatch.setenv(_kd_at_once.SWITCH, "1")
    monkeypatch.setattr(_kd_at_once, "why_no_clusters", lambda device: None)
    why_not = lambda *given: None if given[-1] in TYPES else "it takes no float64"  # noqa: E731
    monkeypatch.setattr(_kd_at_once, "why_not_native", why_not)
    for op in ("kd_loss", "linear_kd_loss"):
        module = import_module(f"clinkd.ops.{op}")
        monkeypatch.setattr(module, "native_impl", lambda device: "cuda")
        monkeypatch.setattr(module, "why_not", lambda *_: None)
    return names


def make(N, V, dtype=torch.float32):
    g = torch.Generator().manual_seed(N)
    z, t = ((torch.randn(N, V, generator=g) * 3).to(dtype) for _ in range(2))
    labels = torch.randint(0, V, (N,), generator=g)
    labels[1::3] = -100
    return z, t, labels, torch.rand(N, generator=g)


def loss_and_gradient(z, t, labels, scale=1.0, **options):
    z = z.detach().clone().requires_grad_()
    found = kd_loss(z, t, labels, **options)
    assert not found.ce.requires_grad
    (grad,) = torch.autograd.grad(found.loss * scale, z)
    return *(part.detach() for part in found), grad


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradient_from_one_launch(launched, empty_is_nan, divergence, scale):
    z, t, labels, weight = make(5, 160)
    options = {"temperature": 2.0, "divergence": divergence, "kd_weight": 0.7, "weight": weight}
    for more in ({}, {"num_items": 11, "softcap": 8.0}):
        launched.clear()
        found = loss_and_gradient(z, t, labels, scale, **options, **more)
        assert launched == ["kd_cluster", "kd_scale"]
        wide = (z.double(), t.double(), labels)
        exact = loss_and_gradient(*wide, scale, impl="reference", **options, **more)
        for a, e in zip(found, exact, strict=True):
            assert (a - e).abs().max() <= 1e-5 * e.abs().max()


def test_bf16_and_two_types(launched):
    z, t, labels, _ = make(4, 160, torch.bfloat16)
    for teacher, allowed in ((t, 2**-7), (t.float(), 2**-7)):
        found = loss_and_gradient(z, teacher, labels)
        exact = loss_and_gradient(z.double(), t.double(), labels, impl="reference")
        assert found[-1].dtype == torch.bfloat16
        for a, e in zip(found, exact, strict=True):
            assert (a - e).abs().max() <= allowed * e.abs().max()
    assert launched == ["kd_cluster", "kd_scale"] * 2


def test_what_takes_two_passes(launched):
    z, t, labels, weight = make(4, 160)
    with torch.no_grad():
        kd_loss(z.requires_grad_(), t, labels)
    kd_loss(z.detach(), t, labels)
    assert launched == ["kd_statistics"] * 2
    two = ["kd_statistics", "kd_gradient"]
    for given, more in (
        ((z.half(), t.half()), {}),
        ((z[:, 1:9], t[:, 1:9]), {}),
        ((z, t), {"weight": weight.requires_grad_()}),
    ):
        launched.clear()
        loss_and_gradient(*given, labels.clamp(max=7), **more)
        assert launched == two


def test_all_tokens_ignored(launched):
    z, t, labels, _ = make(4, 160)
    *losses, grad = loss_and_gradient(z, t, labels.fill_(-100), 1.3)
    assert [x.item() for x in losses] == [0, 0, 0]
    assert not grad.any()


def test_a_second_backward_pass(launched):
    z, t, labels, _ = make(4, 160)
    loss = 3 * kd_loss(z.requires_grad_(), t, labels).loss
    (first,) = torch.autograd.grad(loss, z, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(second, kept)
    assert torch.equal(first, kept)


def test_row_chunks_from_hidden_states(launched):
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 24, generator=g), torch.randn(160, 24, generator=g)
    labels = torch.tensor([3, -100, 159, 0, -100, 7, 8])

    def run(kind, **options):
        given = [x.detach().to(kind).requires_grad_() for x in (hidden, weight)]
        teacher = (hidden.flip(0).to(kind), weight.flip(0).to(kind))
        found = linear_kd_loss(*given, *teacher, labels, temperature=2.0, **options)
        return *(x.detach() for x in found), *torch.autograd.grad(found.loss, given)

    found = run(torch.float32, workspace=2 * 2 * 160 * 4)
    assert launched == ["kd_cluster"] * 3 + ["kd_scale"] * 2
    for a, e in zip(found, run(torch.float64, impl="reference"), strict=True):
        assert (a - e).abs().max() <= 1e-5 * e.abs().max()


def test_where_a_cluster_runs(monkeypatch):
    """The rule, on a machine without such a GPU."""
    z = torch.zeros(3, 160)
    assert _kd_at_once.why_not_at_once("cuda", z, z) == "CLINKD_KD_CLUSTER is not 1"
    monkeypatch.setenv(_kd_at_once.SWITCH, "1")
    assert "compute capability 9.0" in _kd_at_once.why_not_at_once("cuda", z, z)
    device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for archs, switch, reason in (
        ("80;120", "1", "has no code for sm_90"),
        ("80;90;120", "", "CLINKD_KD_CLUSTER=1 turns it on"),
        ("90a", "1", None),
    ):
        monkeypatch.setenv(_kd_at_once.SWITCH, switch)
        monkeypatch.setattr(_kd_at_once, "built", lambda name: True)
        compiled = import_module("clinkd._C")
        monkeypatch.setattr(compiled, "cuda_archs", archs)
        found = _kd_at_once.why_no_clusters(device)
        assert found is None if reason is None else reason in found
    monkeypatch.setattr(_kd_at_once, "why_no_clusters", lambda device: None)
    most = compiled.kd_cluster_most_bytes
    for logits, reason in (
        (z, None),
        (z[:, :150], "begin on 16 bytes"),
        (z[:, 1:153], "begin on 16 bytes"),
        (z[:, ::2], "side by side"),
        (torch.empty(1, 151_936, dtype=torch.bfloat16), None),
        (torch.empty(1, 151_936), None),
        (torch.empty(1, most + 8), f"{most + 8} columns of 4 bytes do not fit"),
    ):
        found = _kd_at_once.why_not_at_once("cuda", logits, logits)
        assert found is None if reason is None else reason in found


@pytest.mark.slow
def test_a_compiled_graph_takes_two_passes(launched):
    z, t, labels, _ = make(4, 160)
    z.requires_grad_()
    step = torch.compile(lambda z: kd_loss(z, t, labels).loss, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(step(z), z)
    assert launched == ["kd_statistics", "kd_gradient"]
    assert torch.allclose(grad, loss_and_gradient(z, t, labels)[-1], atol=1e-7)
