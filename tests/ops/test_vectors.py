"""The CPU kernels for narrower vectors than this processor's: what older ones run."""

import os
import shutil
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

# a gradient so large that it is written past the caches is that of its halves, which are not
N, V = 1100, 16384
student, teacher = (torch.randn(N, V).bfloat16() for _ in range(2))
labels, ids = torch.randint(0, V, (N,)), torch.arange(9).expand(N, 9)
for loss in (kd_loss, topk_kd_loss):
    grads = []
    for rows in (slice(None), slice(N // 2), slice(N // 2, None)):
        target = teacher[rows]
        given = (target,)
        if loss is topk_kd_loss:
            given = (target[:, :9], ids[rows], target.float().logsumexp(1))
        leaf = student[rows].clone().requires_grad_()
        loss(leaf, *given, labels[rows], num_items=1).loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], torch.cat(grads[1:])), loss
"""

# a row written past the caches, where that needs instructions that the processor may not have
PAST_CACHES = """
#include <cstdlib>
#include "logit_rows.h"
using namespace clinkd;

template <typename T>
bool wrong() {
  static float block[kBlock];
  T* out = static_cast<T*>(std::aligned_alloc(64, sizeof(T) * kBlock));
  std::memset(static_cast<void*>(out), 0, sizeof(T) * kBlock);
  for (int i = 0; i < kBlock; ++i) block[i] = float(i % 100);
  empty_out<4>(block, kBlock, out, true);
  for (int i = 0; i < kBlock; i += 4)
    for (int j = 0; j < 4; ++j)
      if (load<4>(out + i)[j] != block[i + j]) return true;
  return false;
}
int main() { return wrong<float>() || wrong<BFloat16>() || wrong<Float16>(); }
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


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("flags", [[], ["-U__SSE2__"]], ids=["here", "another processor"])
def test_what_is_written_past_the_caches(flags, tmp_path):
    (tmp_path / "probe.cpp").write_text(PAST_CACHES)
    csrc = Path(__file__).parents[2] / "csrc"
    command = ["g++", "-O1", "-std=c++17", f"-I{csrc}", *flags, "probe.cpp", "-o", "probe"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=120)
    subprocess.run([tmp_path / "probe"], check=True, timeout=60)
