"""The CPU kernels for narrower vectors than this processor's: what older ones run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

NARROW = """
import sys
import torch
from clinkd import _C
from clinkd.ops import kd_loss, rotary, topk_kd_loss
from clinkd.rotary import RotarySpec

assert _C.vector_width == int(sys.argv[1])
for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)):
    torch.manual_seed(0)
    student, teacher = (torch.randn(5, 2101).mul(4).to(dtype) for _ in range(2))
    labels = torch.tensor([3, -100, 2100, 1024, 0])
    top, ids = teacher.float().topk(7)
    lse = (teacher.float() / 1.5).logsumexp(1)
    for divergence in ("forward_kl", "reverse_kl", "jsd", "skew_kl"):
        for temperature, softcap in ((2.0, None), (1.5, 30.0)):
            options = {"temperature": temperature, "softcap": softcap, "divergence": divergence}
            runs = [(kd_loss, (teacher[:, :2077], labels), options)]
            if divergence in ("forward_kl", "reverse_kl"):
                runs.append((topk_kd_loss, (top, ids, lse, labels), options))
            for loss, given, options in runs:
                found = []
                for impl in ("cpu", "reference"):
                    leaf = student.clone().requires_grad_()
                    value = loss(leaf, *given, **options, impl=impl)
                    value.loss.backward()
                    found.append((value.ce.detach(), value.kd.detach(), leaf.grad))
                for a, b in zip(*found):
                    message = f"{loss} {options}"
                    assert torch.allclose(a.float(), b.float(), rtol=close, atol=close), message
    x, positions = torch.randn(2, 7, 3, 48).to(dtype), torch.rand(2, 2, 7) * 1000
    partial = RotarySpec.rope(48, rotary_dim=20)
    for spec in (RotarySpec.split(48), partial, RotarySpec.alternate(48)):
        found = rotary(x, positions, spec, impl="cpu")
        expected = rotary(x, positions, spec, impl="reference")
        assert torch.allclose(found.float(), expected.float(), rtol=close, atol=close), spec
"""


@pytest.mark.parametrize("width", [4, 8])
def test_narrower_vectors(width):
    _C = pytest.importorskip("clinkd._C")
    if _C.vector_width < width:
        pytest.skip(f"this processor has no vectors of {width} floats")
    environment = {**os.environ, "CLINKD_VECTORS": str(width)}
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", NARROW, str(width)]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
