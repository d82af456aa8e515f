"""The command line: quick to start, clear when wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from clinkd import cli
from clinkd.config import load
from clinkd.errors import ClinkdError, ConfigError, DataError, Preempted, SetupError
from clinkd.pipeline import runner

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "open_clip", "spacy", "matplotlib", "deepspeed", "scipy", "numpy")


def imported(arguments):
    """Which heavy packages a start of Python with these arguments imports."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    names = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "clinkd" in names
    return sorted(names.intersection(HEAVY))


@pytest.mark.parametrize(
    "arguments", [("-c", "import clinkd"), ("-c", "import clinkd.cli"), ("-m", "clinkd", "--help")]
)
def test_start_up_is_light(arguments):
    assert imported(arguments) == []


def invoke(*arguments):
    return CliRunner().invoke(cli.app, list(arguments))


@pytest.mark.parametrize(
    "command",
    ["demo", "run", "prepare", "teacher", "pseudo-label", "distill", "correct", "generate",
     "evaluate", "report", "validate", "doctor", "recipes", "data"],
)  # fmt: skip
def test_every_command_teaches(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert len(result.output.splitlines()) > 5


def test_version():
    assert invoke("--version").output.strip() == cli.__version__


def test_recipes(tmp_path):
    listing = invoke("recipes", "ls").output
    assert "demo" in listing
    assert "published-code" in listing
    assert "kd_weight: 0.5" in invoke("recipes", "show", "demo").output
    assert invoke("recipes", "cp", "demo", str(tmp_path)).exit_code == 0
    assert (tmp_path / "demo.yaml").exists()
    again = invoke("recipes", "cp", "demo", str(tmp_path))
    assert isinstance(again.exception, ConfigError)


def test_validate_prints_the_whole_config(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 4\n")
    output = invoke("validate", str(path), "distill.epochs=3").output
    assert "seed: 4" in output
    assert "kd_weight: 0.5" in output


def test_doctor_says_what_each_op_takes():
    output = invoke("doctor").output
    for word in ("rotary", "kd_loss", "torch", "cores", "clinkd._C"):
        assert word in output


def test_doctor_tells_of_one_read_on_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (line,) = [row for row in invoke("doctor").output.splitlines() if "one read" in row]
    assert line.split()[4] == "on"


@pytest.mark.parametrize("command", ["run", "distill", "validate", "plan", "ablate"])
def test_what_is_no_config_says_what_to_write(tmp_path, command):
    wrong = invoke(command, str(tmp_path / "demo-quick.yaml"))
    assert "clinkd recipes cp demo-quick" in str(wrong.exception)
    assert "is a folder, not a config" in str(invoke(command, str(tmp_path)).exception)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert str(tmp_path / "config.yaml") in str(invoke(command, str(tmp_path)).exception)


@pytest.mark.parametrize(
    ("error", "code"),
    [(ClinkdError, 1), (ConfigError, 2), (DataError, 3), (SetupError, 4), (Preempted, 75)],
)
def test_exit_codes(monkeypatch, capsys, error, code):
    def fail():
        raise error("what and how to mend it")

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == code
    assert capsys.readouterr().err == "clinkd: what and how to mend it\n"


def test_a_mistake_is_one_line(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("distil: {}\n")
    done = subprocess.run(
        [sys.executable, "-m", "clinkd", "run", str(path)],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"NO_COLOR": "1"},
    )  # fmt: skip
    assert done.returncode == 2
    assert "did you mean 'distill'" in done.stderr
    assert "Traceback" not in done.stderr


def test_evaluate_a_prediction_file(tmp_path):
    rows = [
        {"id": 0, "image": "ct_a.png", "question": "Where is X?",
         "annotation": "At <box>(10,10),(500,500)</box>.", "response": "(10,10),(500,480)"},
        {"id": 1, "image": "mr_b.png", "question": "What is at <box>(1,2),(3,4)</box>?",
         "annotation": "Lesion.", "response": "A lesion."},
    ]  # fmt: skip
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"id": 2, "ima')
    failed = invoke("evaluate", str(path), "--meteor", "python")
    assert isinstance(failed.exception, DataError)
    assert "p.jsonl:3: not valid JSON" in str(failed.exception)
    result = invoke("evaluate", str(path), "--meteor", "python", "--skip-bad", "--json")
    found = json.loads(result.output)
    assert found["tasks"]["VG"]["score"] == 100
    assert found["tasks"]["ROC"]["score"] == 100
    assert [bad["line"] for bad in found["bad_lines"]] == [3]


def test_evaluate_takes_options_where_they_mean_something(tmp_path):
    (tmp_path / "c.yaml").write_text("{}")
    (tmp_path / "p.jsonl").write_text("")
    wrong = invoke("evaluate", str(tmp_path / "c.yaml"), "--protocol", "strict", "--json")
    assert isinstance(wrong.exception, ConfigError)
    assert "--json, --protocol: of a prediction file" in str(wrong.exception)
    wrong = invoke("evaluate", str(tmp_path / "p.jsonl"), "seed=1")
    assert "is a prediction file: key=value and --update" in str(wrong.exception)
    empty = invoke("evaluate", str(tmp_path / "p.jsonl"), "--protocol", "strict")
    assert isinstance(empty.exception, DataError)
    assert "holds no prediction" in str(empty.exception)


def test_converting_a_file_into_itself_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("")
    done = invoke("data", "convert", str(path), str(tmp_path / "." / "a.jsonl"), "--to", "swift")
    assert "OUT must be another file than IN" in str(done.exception)


def test_a_drawing_that_could_not_be_saved_is_refused_before_the_answer(tmp_path):
    done = invoke("ask", "a.png", "?", "--model", "m", "--show", str(tmp_path / "no" / "o.png"))
    assert "--show must name a .png file in a folder that exists" in str(done.exception)


def test_a_run_folder_that_was_moved_goes_on_where_it_is(monkeypatch, tmp_path):
    outputs = []
    monkeypatch.setattr(runner, "run", lambda config, *_, **__: outputs.append(config.output))
    moved = tmp_path / "moved #2"
    moved.mkdir()
    (moved / "config.yaml").write_text("output: run")
    invoke("generate", str(moved / "config.yaml"))
    (moved / "run.json").write_text("{}")
    invoke("generate", str(moved / "config.yaml"))
    invoke("generate", str(moved / "config.yaml"), "output=elsewhere")
    assert outputs == ["run", str(moved), "elsewhere"]


def test_demo_writes_where_it_is_told_to(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(cli, "_execute", lambda config, overrides, **_: told.append(overrides))
    invoke("demo", "--output", "results #2")
    assert load(ROOT / "configs" / "demo.yaml", told[0]).output == "results #2"
