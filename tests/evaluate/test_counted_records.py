"""Which records enter a score, and that the others are told."""

import json
from pathlib import Path

import pytest

from clinkd.commands.evaluate import evaluate_file
from clinkd.evaluate.compare import compare
from clinkd.evaluate.protocols import protocol
from clinkd.evaluate.score import score_model

BOX = "<box>(10,10),(300,200)</box>"


def row(identity, modality, task="ROC", annotation="liver", response="liver"):
    return {
        "id": identity,
        "task": task,
        "modality": modality,
        "group": identity,
        "annotation": annotation,
        "response": response,
    }


def scored(rows, name="clinkd"):
    return score_model(rows, protocol(name), label="", meteor="meteor_py", bootstrap=0)


def test_modalities_that_do_not_count_are_told():
    rows = [row("a", "mri"), row("b", "mri"), row("c", "xray"), row("d", "ct")]
    model = scored(rows, "bird")
    assert model["tasks"]["ROC"]["score"] == 12.5
    (note,) = model["notes"]
    assert "mri (2), xray (1)" in note
    assert "ct (" not in note
    for name in ("clinkd", "strict"):
        assert "notes" not in scored(rows, name)
    assert "notes" not in scored([row("d", "ct")], "bird")


@pytest.mark.parametrize("name", ["bird", "clinkd", "strict"])
def test_grounding_counts_records_with_true_boxes_alone(name):
    with_box = row("a", "ct", "VG", BOX, BOX)
    # in its own modality, which would enter the mean over those present as 0
    without = row("b", "mr", "VG", "It is not there.", BOX)
    model = scored([with_box, without], name)
    told = model["tasks"]["VG"]
    assert told["score"] == (12.5 if name == "bird" else 100)
    assert told["n"] == 1
    assert list(told["modalities"]) == ["ct"]
    assert told["extras"]["count_match"] == 100
    assert model["notes"][0].startswith("1 VG record without a true box")


def test_the_records_own_boxes_count_where_the_protocol_reads_them():
    only_boxes = row("a", "ct", "VG", "There.", BOX) | {"boxes": [[10, 10, 300, 200]]}
    assert scored([only_boxes], "strict")["tasks"]["VG"]["score"] == 100
    model = scored([only_boxes], "clinkd")
    assert model["tasks"] == {}
    assert model["average"] == 0
    assert model["notes"]


def test_a_comparison_leaves_them_out_as_well():
    rows = [row("a", "ct", "VG", BOX, BOX), row("b", "mr", "VG", "Nowhere.", BOX)]
    found = compare(rows, rows, protocol("clinkd"), meteor="meteor_py", bootstrap=0)
    assert (found["VG"]["n"], found["VG"]["first"]) == (1, 100)


def test_the_command_warns(tmp_path: Path, capsys):
    path = tmp_path / "p.jsonl"
    rows = [row("a", "mri"), row("b", "ct")]
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    settings = {"reference": None, "protocol": "bird", "task": None, "meteor": "python"}
    evaluate_file(path, **settings, spice=False, skip_bad=False, as_json=False)
    assert "warning: Protocol bird counts the modalities" in " ".join(
        capsys.readouterr().out.split()
    )
    evaluate_file(path, **settings, spice=False, skip_bad=False, as_json=True)
    assert "mri (1)" in json.loads(capsys.readouterr().out)["notes"][0]
