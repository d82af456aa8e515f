"""metrics.json of a run: models side by side, baselines, verdicts."""

import json

import pytest

from clinkd.data.records import record_from_json
from clinkd.errors import SetupError
from clinkd.evaluate.baselines import mean_box_rows, most_frequent_rows
from clinkd.evaluate.run import evaluate_run, meteor_metric, verdicts
from clinkd.evaluate.text.scene_graph import wordnet_folder


def record(identity, task, answer, *box):
    question = "Where is the liver?" if task == "VG" else "What?"
    return record_from_json(
        {
            "id": f"ct_{identity}",
            "image": "a.png",
            "modality": "ct",
            "task": task,
            "group": f"g{identity[0]}",
            "boxes": [list(box)] if box else [],
            "structure": "liver" if box else "x",
            "conversations": [
                {"from": "human", "value": question},
                {"from": "gpt", "value": f"{answer}{box_text(*box) if box else ''}."},
            ],
        }
    )


def box_text(*c):
    return f"<|box_start|>({c[0]},{c[1]}),({c[2]},{c[3]})<|box_end|>"


TRAIN = [
    record("a1", "VG", "At ", 0, 0, 100, 100),
    record("a2", "VG", "At ", 100, 100, 300, 300),
    record("a3", "ROC", "Liver"),
    record("a4", "ROC", "Liver"),
    record("a5", "ROC", "Spleen"),
]
TEST = [record("b1", "VG", "At ", 50, 50, 200, 200), record("c1", "ROC", "Spleen")]


def test_mean_box_is_the_mean_of_that_structure():
    (row,) = mean_box_rows(TRAIN, TEST)
    assert box_text(50, 50, 200, 200) in row["response"]


def test_most_frequent_answer():
    rows = {row["id"]: row["response"] for row in most_frequent_rows(TRAIN, TEST)}
    assert rows["ct_c1"] == "Liver."


def write(path, answers):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for r, candidates in zip(TEST, answers, strict=True):
        rows.append(
            {
                "id": r.id, "modality": r.modality, "task": r.task, "group": r.group,
                "annotation": r.answer, "response": candidates[-1],
                "boxes": [list(b) for b in r.boxes], "selected": len(candidates) - 1,
                "candidates": [{"text": text, "score": 0.0} for text in candidates],
            }
        )  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_is_scored_side_by_side(tmp_path):
    right = [[f"At {box_text(55, 50, 200, 200)}."], ["Spleen."]]
    wrong = [["?"], ["?"]]
    for name in ("base", "teacher"):
        write(tmp_path / "predictions" / f"{name}.jsonl", wrong)
    write(tmp_path / "predictions" / "distilled.jsonl", right)
    write(tmp_path / "predictions.jsonl", [[w[0], r[0]] for w, r in zip(wrong, right, strict=True)])
    metrics = evaluate_run(
        tmp_path, test_records=TEST, train_records=TRAIN, meteor="python", bootstrap=20
    )
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    scores = {
        n: {t: r["score"] for t, r in m["tasks"].items()} for n, m in metrics["models"].items()
    }
    assert scores["base"] == {"VG": 0, "ROC": 0}
    assert scores["distilled"] == scores["sasg"] == {"VG": 100, "ROC": 100}
    assert scores["corrected"] == {"VG": 0, "ROC": 0}  # the first beam
    assert metrics["selection"]["VG"] == {"first_beam": 0, "chosen": 100, "oracle": 100}
    assert metrics["baselines"]["mean_box"]["tasks"]["VG"]["score"] == 100
    assert metrics["verdicts"][0] == "The final model beats its own base on every task."
    assert any("On VG it does not beat the baseline" in v for v in metrics["verdicts"])
    assert not any("On ROC it does not beat" in v for v in metrics["verdicts"])


def test_a_model_that_is_not_better_is_told():
    task = {"VG": {"score": 5.0}}
    models = {"sasg": {"tasks": task}, "base": {"tasks": task}, "corrected": {"tasks": task}}
    assert "does not beat its own base on VG" in verdicts(models, {}, {"tasks": task})[0]


def test_meteor_choice():
    assert meteor_metric("python") == "meteor_py"
    assert meteor_metric("jar") == "meteor"
    with pytest.raises(ValueError, match="meteor must be auto, jar or python"):
        meteor_metric("java")


def test_a_wrong_wordnet_folder_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("CLINKD_WORDNET", str(tmp_path))
    with pytest.raises(SetupError, match=r"CLINKD_WORDNET=.*there is no index.noun"):
        wordnet_folder()
