"""`clinkd data`: what a person types, and what they see."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from clinkd.commands.data import app
from clinkd.data.records import read_records
from clinkd.data.stats import describe, quantiles
from clinkd.errors import ConfigError, DataError


def invoke(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def bird(tmp_path):
    """Twelve rows in BiRD's format, two pairs each, with their images."""
    rows = []
    for n in range(12):
        stem = f"{('ct', 'mr')[n % 2]}_00--Set--Case_{n // 2}--x_{n}"
        Image.new("RGB", (64, 32), (n, 0, 0)).save(tmp_path / f"{stem}.png")
        rows.append({
            "id": stem,
            "conversations": [
                [f"Picture 1: <img>{stem}.png</img>\nWhere is it?", "At <box>(1,2),(30,40)</box>."],
                ["What do you see?", "A picture of the abdomen."],
            ],
        })  # fmt: skip
    path = tmp_path / "bird.json"
    path.write_text(json.dumps(rows), "utf-8")
    return path


@pytest.fixture
def records(bird):
    path = bird.with_name("all.jsonl")
    assert invoke("convert", bird, path, "--from", "bird").exit_code == 0
    return path


def test_convert_and_check(bird, records):
    assert len(read_records(records)) == 24
    done = invoke("check", records)
    assert (done.exit_code, done.stdout) == (0, "no faults\n")


def test_convert_to_pixels_and_back(records, tmp_path):
    out, back = tmp_path / "s.json", tmp_path / "back.jsonl"
    options = ("--pixels", "original")
    done = invoke("convert", records, out, "--to", "sharegpt", "--boxes", "qwen2.5", *options)
    assert done.stdout == f"{out}: 24 records\n"
    assert '{\\"bbox_2d\\": [0, 0, 2, 1]}' in out.read_text()
    args = ("--from", "sharegpt", "--from-boxes", "qwen2.5", *options)
    assert invoke("convert", out, back, *args).exit_code == 0
    assert [r.id for r in read_records(back)] == [r.id for r in read_records(records)]


def test_convert_stops_at_faults_unless_told(bird, tmp_path):
    rows = json.loads(bird.read_text())
    rows[3]["conversations"] = [["q"]]
    bird.write_text(json.dumps(rows))
    out = tmp_path / "out.jsonl"
    done = invoke("convert", bird, out, "--from", "bird")
    assert isinstance(done.exception, DataError)
    assert "1 faults in" in str(done.exception)
    assert f"{bird}[3]: " in done.stderr
    assert not out.exists()
    done = invoke("convert", bird, out, "--from", "bird", "--skip-faulty")
    assert done.stdout == f"{out}: 22 records, 1 left out\n"


@pytest.mark.parametrize("source", ["llava", "bird", "clinkd"])  # two of them name the row
def test_a_file_of_another_format_is_told_once(records, tmp_path, source):
    swift = tmp_path / "swift.jsonl"
    assert invoke("convert", records, swift, "--to", "swift").exit_code == 0
    rows = [json.loads(line) for line in swift.read_text().splitlines()]
    for row in rows:
        del row["task"]
    swift.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = invoke("convert", swift, tmp_path / "x.json", "--from", source)
    assert isinstance(done.exception, DataError)
    fault, hint = done.stderr.splitlines()
    assert fault.startswith(f"{swift}: all 24 rows: ")
    assert hint == "its first row can be read with --from sharegpt or swift"


def test_check_lists_faults_and_exits_with_3(records):
    lines = records.read_text().splitlines()
    lines[0] = lines[0].replace('"VG"', '"V"')
    lines[5] = lines[5].replace(".png", ".PNG")
    records.write_text("\n".join(lines) + "\n" + lines[2][:50])
    done = invoke("check", records)
    assert done.exit_code == 3
    assert [line.split(": ")[0] for line in done.stderr.splitlines()] == [
        f"{records}:{n}" for n in (1, 6, 25)
    ]
    assert done.stdout == "3 faults\n"
    done = invoke("check", records, "--json", "--decode")
    assert done.exit_code == 3
    assert len(json.loads(done.stdout)["faults"]) == 3


def test_check_two_splits(records, tmp_path):
    done = invoke("check", records, records)
    assert done.exit_code == 3
    assert done.stdout == "24 faults\n"
    assert "stands in the training split too" in done.stderr


def test_split(records, tmp_path):
    folder = tmp_path / "parts"
    done = invoke("split", records, folder, "--test", "0.3", "--valid", "0.2", "--seed", "4")
    assert done.exit_code == 0
    parts = [read_records(folder / f"{p}.jsonl") for p in ("train", "test", "valid")]
    assert sum(map(len, parts)) == 24
    args = ("--root", tmp_path, "--decode")
    assert invoke("check", folder / "train.jsonl", folder / "test.jsonl", *args).exit_code == 0
    done = invoke("split", records, folder)
    assert isinstance(done.exception, ConfigError)
    assert "exists already" in str(done.exception)


def test_stats(records, bird):
    facts = json.loads(invoke("stats", records, "--json").stdout)
    assert facts == json.loads(invoke("stats", bird, "--from", "bird", "--json").stdout)
    assert facts["counts"] == {
        "ct": {"VG": 6, "ROC": 0, "RC": 0, "MIA": 6},
        "mr": {"VG": 6, "ROC": 0, "RC": 0, "MIA": 6},
    }
    assert (facts["records"], facts["images"], facts["boxes"]) == (24, 12, 12)
    assert facts["box_area_percent"]["median"] == pytest.approx(0.11, abs=0.001)
    assert facts["answer_words"]["max"] == 5
    shown = invoke("stats", records).stdout
    assert "24 records on 12 image files" in shown
    assert "box area percent" in shown


def test_stats_of_nothing_and_of_repetitions(records):
    assert describe([])["box_area_percent"] is None
    assert describe(read_records(records) * 2)["duplicate_questions"] == 24
    assert quantiles(range(101)) == {
        "min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100, "mean": 50
    }  # fmt: skip


@pytest.mark.parametrize("suffix", [".json", ".parquet"])
@pytest.mark.parametrize("command", ["check", "split"])
def test_other_files_are_told_how_to_become_lines(records, tmp_path, command, suffix):
    path = tmp_path / f"other{suffix}"
    assert invoke("convert", records, path).exit_code == 0
    done = invoke(command, path, *([tmp_path / "parts"] if command == "split" else []))
    assert isinstance(done.exception, ConfigError)
    lines = path.with_suffix(".jsonl")
    assert f"clinkd data convert {path} {lines}" in str(done.exception)
    assert invoke("convert", path, lines).exit_code == 0
    assert read_records(lines) == read_records(records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--from", "coco"), "unknown format 'coco'"),
        (("--to", "coco"), "unknown format 'coco'"),
        (("--boxes", "quad"), "unknown boxes 'quad'; expected one of qwen2, box"),
        (("--task", "VQA"), "task must be one of VG"),
        (("--pixels", "all"), "pixels must be 'resized' or 'original'"),
    ],
)
def test_wrong_words(records, tmp_path, arguments, message):
    done = invoke("convert", records, tmp_path / "out.json", *arguments)
    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("command", ["convert", "check", "stats", "split"])
def test_help_teaches_by_example(command):
    done = invoke(command, "--help")
    assert done.exit_code == 0
    assert f"  clinkd data {command} " in done.stdout


def test_help_imports_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, clinkd.commands.data, clinkd.data.formats, clinkd.data.checks; "
        "print([m for m in ('torch', 'transformers', 'pydicom', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
