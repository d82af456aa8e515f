"""Comparisons are of one truth; intervals are of groups, and of one group there is none."""

import json

import pytest

from clinkd.commands.evaluate import _show_pair
from clinkd.errors import DataError
from clinkd.evaluate.compare import compare
from clinkd.evaluate.predictions import read_predictions
from clinkd.evaluate.protocols import protocol
from clinkd.evaluate.score import score_model
from clinkd.evaluate.tables import models_by_task, render

CLINKD = protocol("clinkd")


def rows(count=8, groups=4, right=4):
    return [
        {
            "id": f"ct_{i}",
            "task": "ROC",
            "modality": "ct",
            "group": f"volume {i % groups}",
            "annotation": "liver",
            "response": "liver" if i < right else "bone",
            "boxes": [[1, 2, 30, 40]],
        }
        for i in range(count)
    ]


def against(other, **settings):
    return compare(rows(), other, CLINKD, meteor="meteor_py", bootstrap=50, **settings)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("annotation", "spleen"),
        ("boxes", [[1, 2, 30, 41]]),
        ("modality", "mr"),
        ("group", "another"),
        ("task", "RC"),
    ],
)
def test_another_truth_is_an_error_that_names_the_records(key, value):
    other = [row | ({key: value} if i < 5 else {}) for i, row in enumerate(rows())]
    with pytest.raises(DataError, match=rf"'{key}' differs of ct_0, ct_1, ct_2 and 2 more"):
        against(other)
    with pytest.raises(DataError, match=rf"'{key}' differs of ct_0;"):
        against([rows()[0] | {key: value}, *rows()[1:]])


def test_the_same_boxes_in_another_form_are_the_same_truth():
    ours = [
        row | {"task": "VG", "annotation": f"At {mark[0]}(1,2),(30,40){mark[1]}."}
        for row, mark in zip(rows(2), [("<|box_start|>", "<|box_end|>")] * 2, strict=True)
    ]
    birds = [
        {key: value for key, value in row.items() if key != "boxes"}
        | {"annotation": " At <box>(1,2),(30,40)</box>.\n"}
        for row in ours
    ]
    assert compare(ours, birds, CLINKD, meteor="meteor_py", bootstrap=0)["VG"]["n"] == 2
    regions = [{k: v for k, v in row.items() if k != "boxes"} for row in rows()]
    assert against(regions)["ROC"]["n"] == 8


def test_groups_of_birds_files_are_volumes(tmp_path):
    names = [f"ct_00--SetA--vol{i // 3}--x_{i:04d}.png" for i in range(6)]
    lines = [
        {"id": str(i), "image": f"im/{name}", "question": "?", "annotation": "a", "response": "a"}
        for i, name in enumerate(names)
    ]
    lines.append(lines[0] | {"id": "6", "image": "mr_7.png"})
    lines.append(lines[0] | {"id": "7", "image": "ct_9.nii.gz#axis=2,index=3"})
    lines.append({"id": "ct_00--SetA--vol1--x_0001", "annotation": "a", "response": "a"})
    lines.append(lines[0] | {"id": "9", "group": "mine"})
    path = tmp_path / "bird.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = [row["group"] for row in read_predictions(path, task="ROC").rows]
    volumes = ["ct_00--SetA--vol0"] * 3 + ["ct_00--SetA--vol1"] * 3
    assert found == [*volumes, "mr_7", "ct_9.nii", "ct_00--SetA--vol1", "mine"]


def test_one_group_has_neither_interval_nor_p(capsys):
    one = rows(groups=1)
    model = score_model(one, CLINKD, label="x", meteor="meteor_py", bootstrap=50)
    assert model["tasks"]["ROC"]["ci95"] is None
    assert model["tasks"]["ROC"]["groups"] == 1
    assert "50.00 [one group: no interval]" in render(models_by_task({"x": model}), "markdown")
    pair = compare(one, rows(groups=1, right=8), CLINKD, meteor="meteor_py", bootstrap=50)
    assert pair["ROC"]["ci95"] is None
    assert pair["ROC"]["p"] is None
    _show_pair("a", "b", pair)
    assert "n 8, one group: no interval" in capsys.readouterr().out
    model = score_model(one, CLINKD, label="x", meteor="meteor_py", bootstrap=0)
    assert "one group" not in render(models_by_task({"x": model}), "markdown")


@pytest.mark.parametrize("draws", [7, 1000, 30_000, 200_000])
def test_p_is_never_below_one_in_the_draws(draws, capsys):
    # all the groups differ in one direction: no draw is on the other side
    found = compare(rows(right=0), rows(right=8), CLINKD, meteor="meteor_py", bootstrap=draws)
    assert found["ROC"]["p"] == 1 / draws
    _show_pair("a", "b", found)
    assert ", p 0)" not in capsys.readouterr().out
