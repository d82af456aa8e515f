"""The best candidate is the best by the protocol's own value; labels say what was chosen how."""

import json

import pytest

from clinkd.data.records import record_from_json
from clinkd.evaluate.protocols import PROTOCOLS, measure
from clinkd.evaluate.run import evaluate_run
from clinkd.evaluate.selected import best_rows, labels


def box(*corners):
    return "<|box_start|>({},{}),({},{})<|box_end|>".format(*corners)


LARGE, SMALL = (0, 0, 400, 400), (500, 500, 900, 900)
# by IoU in both directions one box of two counts less than two poor ones; by recall it hits
TASKS = {
    "VG": (
        f"At {box(*LARGE)}{box(*SMALL)}.",
        [f"At {box(0, 0, 200, 390)}{box(500, 500, 700, 890)}.", f"At {box(*LARGE)}."],
    ),
    "ROC": (
        "left kidney",
        [
            "left",
            "This is the kidney, on the left side of the patient, between others of its kind.",
        ],
    ),
    "RC": (
        "A large dark lesion in the liver.",
        ["A large dark in the.", "In this image we see that there is a large dark lesion."],
    ),
    "MIA": (
        "The liver is large. A cyst lies in its left lobe.",
        ["lobe left its in lies cyst A large. is liver The", "A cyst lies in its left lobe."],
    ),
}


def rows(selected=0):
    return [
        {
            "id": f"ct_{task}",
            "task": task,
            "modality": "ct",
            "group": f"g{number}",
            "annotation": truth,
            "response": texts[selected],
            "boxes": [],
            "selected": selected,
            "candidates": [{"text": text, "score": 0.0} for text in texts],
            "error": None,
        }
        for number, (task, (truth, texts)) in enumerate(TASKS.items())
    ]


@pytest.mark.parametrize("name", ["bird", "clinkd", "strict"])
def test_the_bound_is_of_what_the_protocol_values_most(name):
    found = best_rows(rows(), PROTOCOLS[name], meteor="meteor_py", spice=False)
    chosen = {row["task"]: row["selected"] for row in found}
    assert chosen == dict.fromkeys(TASKS, 1)


def test_no_choice_scores_above_the_bound():
    for task in TASKS:
        for selected in (0, 1):
            mine = [row for row in rows(selected) if row["task"] == task]
            best = best_rows(mine, PROTOCOLS["clinkd"], meteor="meteor_py", spice=False)
            ours, bound = (
                measure(task, each, PROTOCOLS["clinkd"], "meteor_py", False).statistics.score()
                for each in (mine, best)
            )
            assert ours <= bound


def test_among_equals_the_closest_to_the_truth_then_the_first():
    (row,) = [row for row in rows() if row["task"] == "ROC"]
    row["candidates"] = [{"text": text} for text in ("liver", "a spleen", "the kidney", "kidney")]
    (best,) = best_rows([row], PROTOCOLS["clinkd"], meteor="meteor_py", spice=False)
    assert best["response"] == "kidney"  # none is right; this is closest
    row["candidates"] = [{"text": text} for text in ("liver", "spleen")]
    (best,) = best_rows([row], PROTOCOLS["clinkd"], meteor="meteor_py", spice=False)
    assert best["response"] == "liver"


def test_rows_without_candidates_stay_empty():
    row = rows()[0] | {"candidates": [], "response": "", "error": "no image"}
    (best,) = best_rows([row], PROTOCOLS["clinkd"], meteor="meteor_py", spice=False)
    assert best["response"] == ""


TEST = [
    record_from_json(
        {
            "id": row["id"],
            "modality": "ct",
            "task": row["task"],
            "group": row["group"],
            "conversations": [
                {"from": "human", "value": "?"},
                {"from": "gpt", "value": row["annotation"]},
            ],
        }
    )
    for row in rows()
]


def scored(folder, selected=0, **settings):
    text = "".join(json.dumps(row) + "\n" for row in rows(selected))
    (folder / "predictions").mkdir(exist_ok=True)
    for name in ("predictions.jsonl", *(f"predictions/{n}.jsonl" for n in _EARLIER)):
        (folder / name).write_text(text, encoding="utf-8")
    return evaluate_run(
        folder,
        test_records=TEST,
        train_records=TEST,
        meteor="python",
        bootstrap=0,
        **settings,
    )


_EARLIER = ("base", "teacher", "distilled")


@pytest.mark.parametrize("selected", [0, 1])
def test_a_run_never_reports_negative_room(tmp_path, selected):
    metrics = scored(tmp_path, selected)
    for task, told in metrics["selection"].items():
        assert told["oracle"] >= max(told["first_beam"], told["chosen"]), task
    assert "left to the best candidate: VG -" not in metrics["verdicts"][-1]


def test_labels_of_the_default_are_as_they_were():
    assert labels() == {
        "base": "Base (before training)",
        "teacher": "Teacher",
        "distilled": "Distilled student",
        "corrected": "Corrected student",
        "sasg": "Corrected student + SASG",
    }


@pytest.mark.parametrize(
    ("rounds", "selection", "last"),
    [
        (0, "clip", "Distilled student + SASG"),
        (0, "beam", "Distilled student, first beam"),
        (2, "beam", "Corrected student, first beam"),
        (2, "mixed", "Corrected student, CLIP mixed with beam scores"),
        (1, "consensus", "Corrected student, consensus of the candidates"),
        (2, "oracle", "Corrected student, oracle (looks at the truth)"),
    ],
)
def test_labels_say_what_was_trained_and_how_answers_were_chosen(tmp_path, rounds, selection, last):
    metrics = scored(tmp_path, rounds=rounds, selection=selection)
    assert metrics["models"]["sasg"]["label"] == last
    corrected = metrics["models"]["corrected"]["label"]
    assert corrected == ("Corrected student" if rounds else "Distilled student, no correction")
    assert metrics["settings"]["selection"] == selection
    assert metrics["settings"]["correction_rounds"] == rounds
    told = any("chosen by the truth" in verdict for verdict in metrics["verdicts"])
    assert told == (selection == "oracle")
