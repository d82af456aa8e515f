"""How often the CUDA kernels touch their large tensors: as `benchmarks.static.traffic` has it."""

import pytest
import torch
from simt_harness import Schedule, poisoned
from test_simt_kd_loss import Rows
from test_simt_kd_loss import make as make_logits
from test_simt_rotary import fields as rotary_fields
from test_simt_rotary import make as make_heads
from test_simt_topk_kd import launches as topk_launches

pytest.importorskip("triton")
from benchmarks.static.traffic import KD_PASSES, ROTARY_PASSES, TOPK_PASSES
from clinkd.rotary import RotarySpec

DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotary_reads_once_and_writes_once(simt, dtype):
    spec = RotarySpec.mrope(128)
    x, positions = make_heads(spec, (1, 6, 12), dtype)
    out = poisoned(x)
    jobs = [("rotary_cuda", rotary_fields(x, out, positions, spec), Schedule())]
    found = simt("rotary.cu", races=True).passes(jobs, "x", "out")
    assert found == list(ROTARY_PASSES.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("temperature", "divergence", "more"),
    [
        (1.0, "forward_kl", 0), (2.0, "forward_kl", 0), (0.7, "forward_kl", 0),
        (2.0, "reverse_kl", 0), (2.0, "jsd", 1), (2.0, "skew_kl", 1),
    ],
)  # fmt: skip
def test_kd_loss_reads_both_logits_twice_and_writes_once(
    simt, dtype, temperature, divergence, more
):
    """A mixture needs both distributions before its first term: one walk more."""
    z, t, labels, factors = make_logits(3, 5000, 5000, dtype)
    labels[:] = 7
    rows = Rows(z, t, labels, factors, temperature=temperature, divergence=divergence)
    found = simt("kd_loss.cu", races=True).passes(rows.jobs(), "student", "teacher", "grad")
    reads = dict(KD_PASSES)
    for name in ("student", "teacher"):
        reads[name] += more
    # the label's logit is read once more
    assert all(n <= 1.001 * most for n, most in zip(found, reads.values(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_topk_reads_the_logits_twice_and_writes_once(simt, dtype):
    jobs, _ = topk_launches(4800, 16, dtype)
    found = simt("topk_kd.cu", races=True).passes(jobs, "student", "grad")
    # the columns of the teacher are read and written by themselves
    assert all(n <= 1.01 * most for n, most in zip(found, TOPK_PASSES.values(), strict=True))
