"""What `pip install .` builds."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(folder, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation",
         "--wheel-dir", str(folder), str(ROOT)],
        capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.slow
def test_wheel_without_cuda(tmp_path):
    # a compiler with an argument, as "ccache g++" is
    done = build(tmp_path, CLINKD_CUDA="0", CXX="env g++")
    assert done.returncode == 0, done.stderr
    assert "building the CPU kernels only" in done.stdout + done.stderr
    assert (
        "would be ignored" not in done.stdout + done.stderr
    )  # a folder that setup.py does not name
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "clinkd/data/sample/train.jsonl", "clinkd/configs/demo.yaml", "clinkd/py.typed",
        "clinkd/report/templates/report.html.j2",
        "clinkd/kernels/prefix_decode_attention.py", "clinkd/ops/reference/kd_loss.py",
    ):  # fmt: skip
        assert wanted in names, wanted
    assert any(name.startswith("clinkd/_C.") for name in names)
    assert not any(name.startswith(("kernels/", "configs/", "tests/", "tools/")) for name in names)

    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import clinkd._C as c; from clinkd.recipes import recipes; "
        "import clinkd.kernels.prefix_decode_attention as k; "
        "print(c.with_cuda, 'demo' in recipes(), 'site' in k.__file__)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert out.stdout.split() == ["False", "True", "True"], out.stderr


@pytest.mark.parametrize("name", ["CC", "CXX"])
def test_no_compiler(name, tmp_path):
    folders = ["--build-lib", tmp_path, "--build-temp", tmp_path]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"CLINKD_CUDA": "0", name: "no-such-compiler -O2"},
    )  # fmt: skip
    assert done.returncode != 0
    assert "there is no no-such-compiler: install gcc and g++, or name" in done.stderr


@pytest.mark.slow
def test_a_wrong_switch_says_so(tmp_path):
    done = build(tmp_path, CLINKD_CUDA="yes")
    assert done.returncode != 0
    assert "CLINKD_CUDA must be 0 or 1, got 'yes'" in done.stdout + done.stderr


@pytest.mark.slow
def test_cuda_asked_for_and_no_nvcc(tmp_path):
    path = os.pathsep.join(
        p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists()
    )
    done = build(tmp_path, CLINKD_CUDA="1", PATH=path)
    assert done.returncode != 0
    assert "CLINKD_CUDA=1, but there is no nvcc on the PATH" in done.stdout + done.stderr
