"""Table 2's grid: what the cells are, which stages they share, going on, and the table."""

import json

import pytest
from typer.testing import CliRunner

from clinkd.cli import app
from clinkd.config import TrainConfig, check
from clinkd.errors import ConfigError
from clinkd.evaluate.tables import ablation_table, render
from clinkd.pipeline import ablation
from clinkd.pipeline.ablation import CELLS, ablate, cell_config, summarise
from clinkd.pipeline.folder import OWNED
from clinkd.progress import Console

CONFIG = check({"model": {"positions": {"preset": "paper"}}, "generate": {"selection": "clip"}})
LOGGED = {"teacher": "teacher", "distill": "distill", "correct": "correct-1"}


def test_cells_switch_parts_on(tmp_path):
    configs = {cell: cell_config(CONFIG, cell, 3, tmp_path) for cell in CELLS}
    shown = {
        cell: (
            c.model.positions.preset,
            c.distill.kd_weight,
            c.correct.rounds,
            c.generate.selection,
        )
        for cell, c in configs.items()
    }
    assert shown == {
        "base": ("mrope", 0, 0, "beam"),
        "mcg-rope": ("paper", 0, 0, "beam"),
        "kd": ("mrope", 0.5, 0, "beam"),
        "correction": ("mrope", 0, 2, "beam"),
        "sasg": ("mrope", 0, 0, "clip"),
        "all": ("paper", 0.5, 2, "clip"),
    }
    assert {c.seed for c in configs.values()} == {3}


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"model": {"positions": {"preset": "mrope"}}}, r"model\.positions\.preset is 'mrope'"),
        ({"distill": {"kd_weight": 0}}, r"distill\.kd_weight is 0"),
        ({"correct": {"rounds": 0}}, r"correct\.rounds is 0"),
        ({"generate": {"selection": "beam"}}, r"generate\.selection is 'beam'"),
        ({"distill": {"pseudo_labels": "hard"}}, "pseudo_labels: soft"),
    ],
)
def test_a_part_that_is_off_already_is_an_error(tmp_path, tree, key):
    with pytest.raises(ConfigError, match=key):
        cell_config(check(tree), "all", 0, tmp_path)


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_must_differ(tmp_path, seeds):
    with pytest.raises(ConfigError, match="seeds must be different"):
        ablate(CONFIG, Console(quiet=True), tmp_path, seeds)


@pytest.fixture
def done(monkeypatch):
    """Stages that write a file each in place of their work; the list of what was done."""
    from clinkd.pipeline import stages

    calls = []

    def stage(name):
        def work(folder, progress):
            calls.append((folder.path.name, name))
            if name == "distill" and calls[0] == "break":
                raise KeyboardInterrupt
            for pattern in OWNED[name]:
                path = folder.path / pattern.replace("*", "1")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(name, encoding="utf-8")
            if name in LOGGED:
                with open(folder.path / "metrics.jsonl", "a", encoding="utf-8") as log:
                    log.write(json.dumps({"stage": LOGGED[name], "step": 1}) + "\n")
            if name == "evaluate":
                score = 50.0 + folder.config.seed + len(CELLS[folder.path.name])
                task = {"VG": {"metric": "Recall@0.5", "score": score, "n": 1}}
                model = {"label": "x", "tasks": task, "average": score}
                value = json.dumps({"models": {"sasg": model}})
                (folder.path / "metrics.json").write_text(value, encoding="utf-8")
            return name

        return work

    monkeypatch.setattr(stages, "RUN", {name: stage(name) for name in OWNED})
    return calls


def test_stages_in_common_are_done_once_and_nothing_twice(done, tmp_path):
    result = ablate(CONFIG, Console(quiet=True), tmp_path, [0, 2])
    counts = {stage: sum(name == stage for _, name in done) // 2 for stage in OWNED}  # a seed
    assert counts == {
        "prepare": 2,  # M-RoPE and MCG-RoPE
        "teacher": 2,
        "pseudo-label": 2,
        "distill": 4,  # base, + MCG-RoPE, + KD, all
        "correct": 5,  # base and SASG leave it out alike
        "generate": 6,
        "evaluate": 6,
        "report": 0,
    }
    seed = tmp_path / "seed-0"
    shared, own = (seed / cell / "teacher" for cell in ("sasg", "base"))
    assert shared.stat().st_ino == own.stat().st_ino
    log = (seed / "sasg" / "metrics.jsonl").read_text(encoding="utf-8")
    stages = [json.loads(line)["stage"] for line in log.splitlines()]
    assert stages == ["teacher", "distill", "correct-1"]
    assert result == json.loads((tmp_path / "ablation.json").read_text(encoding="utf-8"))
    base = result["cells"]["base"]["scores"]["VG"]
    assert base == {"values": [50.0, 52.0], "mean": 51.0, "sd": 1.41}
    before = len(done)
    assert ablate(CONFIG, Console(quiet=True), tmp_path, [0, 2]) == result
    assert len(done) == before


def test_an_ablation_that_was_cut_off_goes_on(done, tmp_path, monkeypatch):
    done.append("break")
    with pytest.raises(KeyboardInterrupt):
        ablate(CONFIG, Console(quiet=True), tmp_path, [0])
    done.clear()
    ablate(CONFIG, Console(quiet=True), tmp_path, [0])
    assert done[0] == ("base", "distill")


def test_cells_of_another_config_are_kept_unless_told(done, tmp_path):
    ablate(CONFIG, Console(quiet=True), tmp_path, [0])
    other = CONFIG.model_copy(update={"teacher": TrainConfig(epochs=9)})
    done.clear()
    with pytest.raises(ConfigError, match=r"different: teacher\.epochs.*give --update"):
        ablate(other, Console(quiet=True), tmp_path, [0])
    assert done == []
    ablate(other, Console(quiet=True), tmp_path, [0], update=True)
    assert ("base", "teacher") in done


@pytest.mark.parametrize(
    ("arguments", "machines", "message"),
    [
        (["seed=3"], "", "'seed=3': each cell has its own; give --output and --seeds"),
        (["output=x"], "1", "'output=x': each cell has its own"),
        ([], "2", "ablate works on one machine: unset NNODES"),
    ],
)
def test_the_command_takes_nothing_that_it_would_not_use(
    tmp_path, monkeypatch, arguments, machines, message
):
    (tmp_path / "c.yaml").write_text("data: {train: none.jsonl}", encoding="utf-8")
    monkeypatch.setenv("NNODES", machines)
    result = CliRunner().invoke(app, ["ablate", str(tmp_path / "c.yaml"), *arguments])
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_copies_where_there_are_no_links(done, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(ablation.os, "link", refuse)
    ablate(CONFIG, Console(quiet=True), tmp_path, [0])
    shared, own = (tmp_path / "seed-0" / cell / "teacher" for cell in ("sasg", "base"))
    assert shared.read_text(encoding="utf-8") == own.read_text(encoding="utf-8")
    assert shared.stat().st_ino != own.stat().st_ino


def test_the_table_has_means_deviations_and_gains():
    def model(score):
        return {"tasks": {"VG": {"metric": "Recall@0.5", "score": score}}, "average": score}

    scores = {cell: {0: model(10.0), 1: model(12.0)} for cell in CELLS}
    scores["all"] = {0: model(20.0), 1: model(20.0)}
    table = ablation_table(summarise(scores), published=True)
    rows = {row[0]: row for row in table.rows}
    assert rows["All four"] == ("All four", "20.00 ± 0.00", *[None] * 3, "20.00 ± 0.00", "+9.00")
    assert rows["BiRD + SASG (derived: 56.66 and the gain of 0.67)"][-2:] == (57.33, "+0.67")
    for form in ("markdown", "latex", "csv", "json"):
        assert "11.00" in render(table, form)
    one = ablation_table(summarise({cell: {0: model(1.0)} for cell in CELLS}))
    assert one.rows[0][1] == "1.00"
