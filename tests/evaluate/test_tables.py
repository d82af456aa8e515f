"""Tables in every format, paired comparison, and the commands around them."""

import csv
import io
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from clinkd.averages import comparable_average
from clinkd.commands import evaluate as command
from clinkd.errors import ConfigError, DataError
from clinkd.evaluate.compare import compare
from clinkd.evaluate.protocols import protocol
from clinkd.evaluate.score import score_model
from clinkd.evaluate.tables import Table, models_by_task, render, tasks_by_modality

NAMES = ("liver", "kidney", "spleen", "lung")


def rows(right):
    """ROC answers to 40 questions over 20 volumes, the first `right` of them true."""
    return [
        {
            "id": f"{('ct', 'mr')[i % 2]}_{i}",
            "task": "ROC",
            "modality": ("ct", "mr")[i % 2],
            "group": f"volume {i // 2}",
            "annotation": NAMES[i % 4],
            "response": NAMES[i % 4] if i < right else "bone",
        }
        for i in range(40)
    ]


def model(right, bootstrap=0):
    rules = protocol("clinkd")
    return score_model(rows(right), rules, label="a_b & c", meteor="meteor_py", bootstrap=bootstrap)


def test_every_format_holds_the_same_numbers():
    table = models_by_task({"x": model(20)}, published=True)
    found = list(csv.reader(io.StringIO(render(table, "csv"))))
    assert found[1] == ["a_b & c", "", "50.0", "", "", "50.0"]
    rows = {row[0]: row[1:] for row in found}
    assert rows["ClinKD (paper, as printed)"] == ["67.51", "82.35", "70.56", "65.69", "71.53"]
    assert rows["ClinKD (paper, recomputed)"] == ["67.65", "82.35", "70.56", "65.3", "71.46"]
    assert rows["BiRD (paper, as printed)"] == ["", "65.33", "", "", "56.66"]
    assert rows["LLaVA-Med (paper)"] == ["0.0", "2.75", "8.18", "11.2", "5.53"]
    assert json.loads(render(table, "json"))["rows"][0]["ROC"] == 50.0
    assert "| a_b & c | – | 50.00 | – | – | 50.00 |" in render(table, "markdown")
    assert r"a\_b \& c & -- & 50.00" in render(table, "latex")
    with pytest.raises(ConfigError, match="markdown, latex, csv, json"):
        render(table, "xls")


def test_no_cell_is_a_formula_in_a_spreadsheet():
    names = ["=1+1", "@x", "+x", "-x", "\t=1", "-1.5", "+2", "a=b"]
    table = Table("", ("name", "score"), tuple((name, -0.5) for name in names))
    found = [row[0] for row in csv.reader(io.StringIO(render(table, "csv")))][1:]
    assert found == ["'=1+1", "'@x", "'+x", "'-x", "'\t=1", "-1.5", "+2", "a=b"]


def test_an_average_over_fewer_tasks_is_a_dash():
    one, two = model(20), model(20)
    two["tasks"]["RC"] = {**two["tasks"]["ROC"], "metric": "SPICE"}
    found = models_by_task({"x": one, "y": two})
    assert [row[-1] for row in found.rows] == [None, 50.0]


def test_modalities_have_their_columns():
    table = tasks_by_modality(model(21))
    assert table.columns == ("Task", "ct", "mr", "Mean of the row", "Score")
    assert table.rows == (("ROC (Recall)", 55.0, 50.0, 52.5, 52.5),)


def test_a_difference_is_found_and_none_is_not():
    rules = protocol("clinkd")
    found = compare(rows(10), rows(30), rules, meteor="meteor_py")["ROC"]
    assert found["difference"] == 50
    low, high = found["ci95"]
    assert 0 < low < 50 < high
    assert found["p"] <= 0.01
    assert len(found["most_different"]) == 10
    same = compare(rows(10), rows(10), rules, meteor="meteor_py")["ROC"]
    assert same["ci95"] == [0, 0]
    assert same["p"] == 1
    assert same["most_different"] == []


def test_other_records_are_an_error():
    with pytest.raises(DataError, match="1 records are in one of the two only"):
        compare(rows(10), rows(10)[1:], protocol("clinkd"), meteor="meteor_py")


def test_interval_holds_the_score_and_repeats():
    first, second = (model(20, bootstrap=300)["tasks"]["ROC"] for _ in range(2))
    assert first == second
    assert first["ci95"][0] < first["score"] < first["ci95"][1]


@pytest.fixture
def runs(tmp_path):
    for name, right in (("a", 10), ("b", 30)):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in rows(right))
        (tmp_path / name / "predictions.jsonl").write_text(text, encoding="utf-8")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_compare_prints_tables_and_pairs(runs):
    app = typer.Typer()
    app.command()(command.compare)
    runner = CliRunner()
    found = runner.invoke(app, [*runs, "--meteor", "python"])
    assert found.exit_code == 0, found.output
    assert "ROC Recall: +50.00 (n 40" in found.output
    found = runner.invoke(app, [*runs, "--meteor", "python", "--format", "json", "--published"])
    found = json.loads(found.output)
    assert found["pairs"][runs[1]]["ROC"]["difference"] == 50
    assert found["published"]["rows"][0]["MIA"] == 11.2
    found = runner.invoke(app, [runs[0], runs[0]])
    assert isinstance(found.exception, ConfigError)
    found = runner.invoke(app, [runs[0], runs[1] + "/none"])
    assert isinstance(found.exception, DataError)


def test_compare_writes_one_table_as_csv(runs):
    app = typer.Typer()
    app.command()(command.compare)
    arguments = [*runs, "--meteor", "python", "--format", "csv", "--published"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    table = list(csv.DictReader(io.StringIO(found.stdout)))
    assert all(None not in row and None not in row.values() for row in table)
    at = {(row["model"], row["task"], row["modality"]): row for row in table}
    assert len(at) == len(table)
    second = at[runs[1], "ROC", "all"]
    assert (second["metric"], second["n"], second["score"]) == ("Recall", "40", "75.0")
    assert float(second["low"]) < 75 < float(second["high"])
    assert float(second["difference_low"]) < float(second["difference"]) == 50
    assert 0 < float(second["p"]) < 0.05
    assert at[runs[0], "ROC", "all"]["difference"] == ""
    assert at[runs[1], "ROC", "mr"]["n"] == "20"
    assert at[runs[1], "average", "all"]["score"] == "75.0"
    assert at["ClinKD (paper, as printed)", "average", "all"]["score"] == "71.53"


@pytest.mark.parametrize("form", ["csv", "latex"])
def test_compare_keeps_prose_out_of_a_file_of_tables(runs, form):
    app = typer.Typer()
    app.command()(command.compare)
    found = CliRunner().invoke(app, [*runs, "--meteor", "python", "--format", form])
    assert found.exit_code == 0, found.output
    for prose in (f"{runs[1]} against {runs[0]}:", "ROC Recall: +50.00 (n 40", "truth 'liver'"):
        assert prose not in found.stdout
        assert prose in found.stderr


def test_evaluate_of_a_run_folder_names_its_files(runs):
    run = Path(runs[0])
    (run / "config.yaml").touch()
    (run / "predictions").mkdir()
    (run / "predictions" / "base.jsonl").touch()
    with pytest.raises(ConfigError, match="is a folder") as error:
        command.is_config(run)
    for name in ("config.yaml", "predictions.jsonl", "predictions/base.jsonl"):
        assert str(run / name) in str(error.value)


def test_evaluate_prints_a_count_as_one(tmp_path, capsys):
    path = tmp_path / "p.jsonl"
    sides = [row | {"annotation": "Left lung.", "response": "Left."} for row in rows(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in sides), encoding="utf-8")
    settings = {"reference": None, "protocol": "clinkd", "task": None, "meteor": "python"}
    command.evaluate_file(path, **settings, spice=False, skip_bad=False, as_json=False)
    page = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert "laterality_n 40" in page
    assert "laterality_errors 0.0" in page


@pytest.mark.parametrize("name", ["bird", "clinkd", "strict"])
def test_evaluate_says_on_its_page_what_its_protocol_does(runs, name, capsys):
    command.evaluate_file(
        Path(runs[0]) / "predictions.jsonl",
        reference=None,
        protocol=name,
        task=None,
        meteor="python",
        spice=False,
        skip_bad=False,
        as_json=False,
    )
    page = capsys.readouterr().out
    assert "means over eight modalities" in page
    assert f"protocol {name}:" in page
    assert ("mBMR is the mean of six" in page) == (name != "strict")


def test_an_average_over_fewer_tasks_stands_beside_none():
    model = {"average": 40.0, "tasks": {"VG": {}, "RC": {}}}
    assert comparable_average(model, ["RC"]) == 40.0
    assert comparable_average(model, {"RC": 1, "VG": 1}) == 40.0
    assert comparable_average(model, ["RC", "VG", "MIA"]) is None
    assert comparable_average({}, ["RC"]) is None
