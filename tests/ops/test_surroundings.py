"""The ops inside what else a program does: default dtypes, threads, tracers, other derivatives."""

import threading

import pytest
import torch
from conftest_losses import LOSSES, C, N, V, arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from clinkd.ops import (
    _row_chunks,
    kd_loss,
    linear_kd_loss,
    linear_topk_kd_loss,
    rotary,
    rotary_attention,
    topk_kd_loss,
)
from clinkd.ops.rotary import native_arguments, spec_tensors
from clinkd.rotary import RotarySpec

SPEC = RotarySpec.split(32)
BY_NAME = {"ids": lambda op: op.__name__}


def leaf_of(given):
    """The student's tensor among a loss's arguments, which now has a gradient."""
    name = "student_logits" if "student_logits" in given else "student_hidden"
    given[name].requires_grad_()
    return given[name]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES, **BY_NAME)
def test_another_default_dtype(loss, dtype):
    """Kernels write float32 sums whatever new tensors are by default."""
    given = arguments(loss)
    leaf = leaf_of(given)
    results = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        try:
            found = loss(**given)
            results.append((*found, *torch.autograd.grad(found.loss, leaf)))
        finally:
            torch.set_default_dtype(torch.float32)
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_another_default_device():
    x, positions = torch.randn(2, 5, 3, 48), torch.zeros(2, 2, 5)
    given = arguments(linear_kd_loss)
    expected = linear_kd_loss(**given).loss
    with torch.device("meta"):
        assert rotary(x, positions, RotarySpec.split(48)).isfinite().all()
        assert torch.equal(linear_kd_loss(**given).loss, expected)


def test_threads_that_meet_a_new_spec_together():
    """A kernel is given places of tables: those of the tables that are kept."""
    x, positions = torch.randn(1, 3, 2, 32), torch.zeros(2, 1, 3)
    for base in range(2000, 2050):
        spec = RotarySpec.split(32, base=float(base))
        places, start = [], threading.Barrier(4)

        def run(spec=spec, places=places, start=start):
            start.wait()
            places.append(native_arguments(x, x, positions, spec.key)[3].tables)

        threads = [threading.Thread(target=run) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        kept = [table.data_ptr() for table in spec_tensors(spec.key, x.device)]
        assert places == [kept] * 4


def test_tensors_without_numbers():
    with FakeTensorMode():
        student, teacher = torch.randn(4, 9, requires_grad=True), torch.randn(4, 9)
        found = kd_loss(student, teacher, torch.ones(4, dtype=torch.int64))
        found.loss.backward()
    assert found.loss.shape == ()
    assert student.grad.shape == student.shape


@pytest.mark.parametrize("loss", [kd_loss, topk_kd_loss], **BY_NAME)
def test_a_traced_graph_has_the_kernel(loss):
    given = arguments(loss)

    def run(logits):
        return loss(**given | {"student_logits": logits}).loss

    graph = make_fx(run)(given["student_logits"])
    other = 2 * given["student_logits"]
    torch.testing.assert_close(graph(other), run(other))
    assert "_rows" in graph.code


def test_forward_mode_is_refused():
    """A tangent that is dropped in silence would be a gradient of zero."""
    x, positions = torch.randn(1, 3, 2, 32), torch.zeros(2, 1, 3)
    given = arguments(topk_kd_loss)
    logits = given.pop("student_logits")
    calls = [
        (x, lambda x: rotary(x, positions, SPEC)),
        (x, lambda x: rotary_attention(x, x, x, positions, SPEC)),
        (logits, lambda z: topk_kd_loss(student_logits=z, **given).loss),
        (logits, lambda z: kd_loss(z, logits, given["labels"]).loss),
    ]
    for tensor, call in calls:
        with forward_ad.dual_level():
            call(tensor)
            with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
                call(forward_ad.make_dual(tensor, torch.ones_like(tensor)))


@pytest.mark.parametrize("loss", LOSSES, **BY_NAME)
def test_a_penalty_on_the_gradient_is_refused(loss):
    given = arguments(loss)
    leaf = leaf_of(given)
    (grad,) = torch.autograd.grad(loss(**given).loss, leaf, create_graph=True)
    with pytest.raises(
        (NotImplementedError, RuntimeError), match=r"derivative|differentiate twice"
    ):
        (loss(**given).loss + grad.square().sum()).backward()


def test_a_penalty_where_weights_learn_is_refused():
    given = arguments(kd_loss)
    leaf = leaf_of(given)
    weight = torch.ones(N, requires_grad=True)
    (grad,) = torch.autograd.grad(kd_loss(**given, weight=weight).loss, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="kd_rows_backward has no derivative"):
        grad.square().sum().backward()


@pytest.mark.parametrize("loss", [linear_kd_loss, linear_topk_kd_loss], **BY_NAME)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_no_gradient_is_made_where_none_can_be_asked_for(loss, mode, monkeypatch):
    given = arguments(loss)
    given["student_weight"].requires_grad_()
    expected = loss(**given).loss.detach()
    monkeypatch.setattr(_row_chunks, "_add_product", lambda *_, **__: pytest.fail("a product"))
    with mode():
        assert torch.equal(loss(**given).loss, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("loss", LOSSES, **BY_NAME)
def test_a_teacher_in_inference_mode(loss, dtype):
    """Autograd keeps no such tensor, and the two passes over logits need the teacher's again."""
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in arguments(loss).items()}
    leaf = leaf_of(given)
    (expected,) = torch.autograd.grad(loss(**given).loss, leaf)
    with torch.inference_mode():
        given |= {name: t.clone() for name, t in given.items() if name.startswith("teacher")}
    (found,) = torch.autograd.grad(loss(**given).loss, leaf)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kept", [False, True])
def test_a_factor_of_the_loss_is_not_rounded(kept):
    """1/3 in bfloat16 would make every gradient 0.2 % too large."""
    g = torch.Generator().manual_seed(0)
    hidden, head = (torch.randn(n, 64, generator=g).bfloat16().requires_grad_() for n in (64, 300))
    labels = torch.randint(0, 300, (64,), generator=g)
    sums = []
    for factor in (1.0, 1 / 3):
        loss = linear_kd_loss(hidden, head, hidden.detach(), head.detach().roll(1, 0), labels).loss
        grads = torch.autograd.grad(loss * factor, (hidden, head), retain_graph=kept)
        sums.append(torch.stack([grad.double().abs().sum() for grad in grads]))
    assert ((sums[1] / sums[0] * 3) - 1).abs().max() < 1e-3


def test_a_transposed_head():
    """Its gradient has rows side by side, which the kernel that scales gradients does not take."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = {name: tensor.to(device) for name, tensor in arguments(linear_kd_loss).items()}
    grads = []
    for head in (given["student_weight"], given["student_weight"].T.contiguous().T):
        head = head.detach().requires_grad_()
        (linear_kd_loss(**given | {"student_weight": head}).loss / 7).backward()
        grads.append(head.grad)
    assert grads[1].stride(0) == 1
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("loss", LOSSES, **BY_NAME)
def test_losses_are_float32_scalars(loss):
    given = arguments(loss)
    plain = loss(**given, num_items=N)
    found = loss(**given, num_items=torch.tensor([N]), weight=torch.ones(N, dtype=torch.float64))
    for actual, expected in zip(found, plain, strict=True):
        assert actual.shape == ()
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("loss", LOSSES, **BY_NAME)
def test_the_weight_of_a_token_that_does_not_count(loss):
    given = arguments(loss)
    given["labels"][1] = -100
    weight = torch.ones(N)
    expected = loss(**given, weight=weight).loss
    weight[1] = torch.nan
    assert torch.equal(loss(**given, weight=weight).loss, expected)


def test_dtypes_that_do_not_go_together():
    for loss in (linear_kd_loss, linear_topk_kd_loss):
        given = arguments(loss)
        with pytest.raises(TypeError, match=r"student_weight must be torch.bfloat16 as student_hi"):
            loss(**given | {"student_hidden": given["student_hidden"].bfloat16()})
        with pytest.raises(TypeError, match=r"student_bias must be torch.float32 as the head is"):
            loss(**given, student_bias=torch.zeros(V, dtype=torch.float16))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert loss(**given | {"student_hidden": given["student_hidden"].bfloat16()})
    with pytest.raises(ValueError, match=r"student_logits must be .* with at least one column"):
        kd_loss(torch.zeros(N, 0), torch.zeros(N, C), torch.zeros(N, dtype=torch.int64))


def test_in_place_of_a_view_of_a_parameter():
    parameter = torch.randn(N * V, requires_grad=True)
    given = arguments(kd_loss) | {"student_logits": parameter.view(N, V)}
    with pytest.raises(ValueError, match="are a leaf of the graph, or lie in one"):
        kd_loss(**given, inplace=True)
