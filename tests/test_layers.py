"""Imports point down, and importing the ops needs torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "clinkd"

# what each part may import of clinkd; EVERYBODY is for all of them
BELOW = {
    "ops": {"ops", "rotary", "positions", "kernels", "_C"},
    "models": {"models", "ops", "rotary", "positions", "config", "data"},
    "data": {"data"},
    "train": {"train", "models", "ops", "data", "config", "rotary", "generate", "recipes"},
    "generate": {"generate", "models", "ops", "data", "rotary"},
    "evaluate": {"evaluate", "data", "generate", "config", "progress"},
    "report": {"report", "evaluate", "data", "config", "progress", "pipeline"},
    "pipeline": {"pipeline", "train", "models", "generate", "evaluate", "report", "data", "config",
                 "progress", "positions", "rotary"},
}  # fmt: skip
EVERYBODY = {"averages", "errors", "_version"}


def imports(path):
    """Parts of clinkd that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
            if node.module == "clinkd":
                names = [f"clinkd.{alias.name}" for alias in node.names]
        for name in names:
            if name.startswith("clinkd."):
                yield name.split(".")[1]


@pytest.mark.parametrize("part", sorted(BELOW))
def test_imports_point_down(part):
    for path in (PACKAGE / part).rglob("*.py"):
        up = set(imports(path)) - BELOW[part] - EVERYBODY - {"__version__"}
        assert not up, f"{path.relative_to(ROOT)} imports {sorted(up)}"


def test_kernels_know_nothing_above_them():
    for path in (ROOT / "kernels").glob("*.py"):
        assert set(imports(path)) <= {"kernels"}, path


def test_sources_of_csrc_know_no_torch():
    for path in (ROOT / "csrc").iterdir():
        text = path.read_text(encoding="utf-8")
        assert "torch/" not in text
        assert "ATen" not in text


def test_ops_import_with_torch_alone():
    code = (
        "import sys; "
        "sys.modules.update(dict.fromkeys(['triton', 'transformers', 'clinkd._C', 'numpy'])); "
        "import clinkd.ops"  # None in sys.modules: an import of it fails
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_modules_stay_small():
    for folder in ("clinkd", "kernels", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
