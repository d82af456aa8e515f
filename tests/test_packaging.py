"""What `pip install .` builds."""

import os
import re
import shutil
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


NVCC = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
  *--list-gpu-arch*) {listed} ;;
  *--dryrun*) echo '#$ TOP={folder}' >&2 ;;
esac
"""


@pytest.fixture
def toolkit(tmp_path):
    """Builds from a copy of the sources with an nvcc that knows these architectures."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libcudart_static.a").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "source" / "csrc").mkdir(parents=True)
    (tmp_path / "source" / "csrc" / "one.cu").touch()
    usual, setup = 'USUAL = "/usr/local/cuda"', (ROOT / "setup.py").read_text()
    assert usual in setup
    nowhere = setup.replace(usual, f'USUAL = "{tmp_path / "usual"}"')
    (tmp_path / "source" / "setup.py").write_text(nowhere)
    nothing = shutil.which("true")

    def run(known, **environment):
        listed = "".join(f"echo compute_{arch}; " for arch in known) or "exit 1"
        log, nvcc = tmp_path / "log", tmp_path / "bin" / "nvcc"
        nvcc.write_text(NVCC.format(log=log, listed=listed, folder=tmp_path))
        nvcc.chmod(0o755)
        folders = ["--build-lib", "out", "--build-temp", "temporary"]
        away = [p for p in os.environ["PATH"].split(os.pathsep) if not (Path(p) / "nvcc").exists()]
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", *folders],
            cwd=tmp_path / "source", capture_output=True, text=True, check=False,
            env=os.environ | {"CC": nothing, "CXX": nothing, "PATH": os.pathsep.join(away)}
            | {"CUDA_HOME": str(tmp_path), "CLINKD_CUDA": "1"} | environment,
        )  # fmt: skip
        lines = log.read_text().splitlines() if log.exists() else []
        return done, next((line for line in lines if "one.cu" in line), "")

    return run


@pytest.mark.parametrize(
    ("known", "asked", "codes"),
    [
        ((75, 80, 90, 100, 120), "", ["sm_80", "sm_90", "sm_120", "compute_80", "compute_120"]),
        ((80, 90), "", ["sm_80", "sm_90", "compute_80", "compute_90"]),  # nvcc before 12.8
        ((), "", ["sm_80", "sm_90", "sm_120", "compute_80", "compute_120"]),  # it lists none
        ((80, 86), "86", ["sm_86", "compute_86"]),
        ((80, 90), "80,90a", ["sm_80", "sm_90a", "compute_80", "compute_90a"]),
    ],
)
def test_architectures_that_nvcc_knows(toolkit, known, asked, codes):
    _, line = toolkit(known, CLINKD_CUDA_ARCHS=asked)
    assert re.findall(r",code=(\w+)", line) == codes


@pytest.mark.parametrize(
    ("known", "asked", "why"),
    [
        ((50, 70), "", "knows none of sm_80, 90, 120: a CUDA toolkit of 11.8 or newer"),
        ((80, 90), "90;120", "nvcc knows no 120, only 80, 90"),
    ],
)
def test_architectures_that_nvcc_does_not_know(toolkit, known, asked, why):
    done, line = toolkit(known, CLINKD_CUDA_ARCHS=asked)
    assert done.returncode != 0
    assert not line
    assert why in done.stderr


@pytest.mark.slow
def test_a_wrong_switch_says_so(tmp_path):
    done = build(tmp_path, CLINKD_CUDA="yes")
    assert done.returncode != 0
    assert "CLINKD_CUDA must be 0 or 1, got 'yes'" in done.stdout + done.stderr


def test_cuda_asked_for_and_no_nvcc(toolkit, tmp_path):
    done, _ = toolkit((), CUDA_HOME=str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert "CLINKD_CUDA=1, but there is no nvcc on the PATH, in CUDA_HOME" in done.stderr


def test_nvcc_in_its_usual_place(toolkit, tmp_path):
    (tmp_path / "usual").symlink_to(tmp_path)
    _, line = toolkit((80, 90), CUDA_HOME=str(tmp_path / "nowhere"))
    assert ",code=sm_90" in line
