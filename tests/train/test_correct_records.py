"""From weak answers to a new version of the data."""

import json

import pytest

from clinkd.data.records import Record, Turn, read_records
from clinkd.errors import DataError, SetupError
from clinkd.train.correction.correct import correct_records, needs_correction, write_round
from clinkd.train.correction.similarity import (
    SentenceSimilarity,
    TokenF1,
    make_similarity,
)
from clinkd.train.correction.versions import count_statuses
from clinkd.train.correctors import Reply
from clinkd.train.correctors.rule import RuleCorrector

BOX = "<|box_start|>(100,100),(300,300)<|box_end|>"
NEAR = "<|box_start|>(110,100),(300,310)<|box_end|>"
FAR = "<|box_start|>(600,600),(700,700)<|box_end|>"


def record(identity, task, answer, boxes=(), **extra):
    turns = (Turn("human", f"<image>\nQuestion {identity}?"), Turn("gpt", answer))
    return Record(identity, (f"{identity}.png",), "ct", task, "g", turns, boxes, None, extra)


VG = record("ct_1", "VG", f"The left femur is at {BOX}.", ((100, 100, 300, 300),))
ROC = record("ct_2", "ROC", "Left femur.")
MIA = record("ct_3", "MIA", "This is an axial CT image of the pelvis.")


class Fixed:
    """A corrector with prepared replies."""

    name = "fixed"

    def __init__(self, *replies):
        self.replies = list(replies)
        self.cases = []

    def correct(self, cases, progress=None):
        self.cases += cases
        return [Reply(None, "no idea") if r is None else Reply(r) for r in self.replies]


@pytest.mark.parametrize(
    ("rec", "answer", "similarity", "reason"),
    [
        (VG, f"The left femur is at {NEAR}.", 1.0, None),
        (VG, f"The left femur is at {FAR}.", 1.0, "IoU 0.00 under 0.5"),
        (VG, "The left femur is at the top.", 1.0, "no box"),
        (VG, f"The left femur is at {FAR}{NEAR}.", 1.0, None),  # each true box is met by one
        (VG, f"The left femur is at {NEAR}.", 0.79, "similarity 0.79 under 0.8"),
        (VG, f"The right femur is at {NEAR}.", 0.9, "left and right differ from the truth's"),
        (VG, " ", 1.0, "no answer"),
        (ROC, "Left femur", 0.8, None),  # 80 % is alike enough
        (ROC, "Right femur.", 0.9, "left and right differ from the truth's"),
        # two true boxes, one of them met
        (record("a", "VG", f"They are at {BOX}{FAR}."), f"At {BOX}.", 1.0, "IoU 0.00 under 0.5"),
        # boxes of the record, where its text has none
        (record("a", "VG", "There.", ((100, 100, 300, 300),)), f"{FAR}", 1.0, "IoU 0.00 under 0.5"),
    ],
)
def test_needs_correction(rec, answer, similarity, reason):
    assert needs_correction(rec, answer, similarity) == reason


def test_limits_are_settings():
    assert needs_correction(VG, f"The left femur is at {NEAR}.", 1.0, 0.8, 0.95) is not None
    assert needs_correction(ROC, "Left femur.", 0.6, threshold=0.5) is None


def test_rules_correct_and_the_version_says_where_from(tmp_path):
    answers = {
        "ct_1": f"The right femur lies at {FAR}.",
        "ct_2": "Left femur.",
        "ct_3": "No idea.",
    }
    found = correct_records(
        [VG, ROC, MIA], answers, corrector=RuleCorrector(), similarity=TokenF1()
    )
    assert [c.id for c in found] == ["ct_1", "ct_3"]
    assert found[0].after == f"The left femur lies at {BOX}."
    assert (found[0].status, found[0].why, found[0].reply) == ("accepted", None, None)
    write_round(tmp_path / "round-1", [VG, ROC, MIA], found)
    lines = (tmp_path / "round-1/corrections.jsonl").read_text().splitlines()
    line = json.loads(lines[0])
    assert line["before"] == answers["ct_1"]
    assert line["truth"] == VG.answer
    assert line["iou"] == 0.0
    assert line["reason"] == "IoU 0.00 under 0.5"
    new = {r.id: r for r in read_records(tmp_path / "round-1/data.jsonl")}
    assert list(new) == ["ct_1", "ct_2", "ct_3"]
    assert new["ct_2"] == ROC
    assert new["ct_1"].answer == found[0].after
    origin = new["ct_1"].extra["correction"]
    assert origin["corrector"] == "rule"
    assert origin["judge"] == "token_f1"
    assert origin["threshold"] == 0.8
    assert origin["truth"] == VG.answer


@pytest.mark.parametrize(
    ("policy", "status", "left"),
    [
        ("truth", "truth", "Left femur."),
        ("keep", "kept", "A femur, on the left."),
        ("skip", "skipped", None),
    ],
)
@pytest.mark.parametrize("reply", ["Right femur.", "Left femur 2.", None])
def test_policies(tmp_path, policy, status, left, reply):
    # a record of an earlier round: its answer is no longer the truth
    earlier = record("ct_2", "ROC", "A femur, on the left.", correction={"truth": "Left femur."})
    found = correct_records(
        [earlier, MIA],
        {"ct_2": "Spleen."},
        corrector=Fixed(reply),
        similarity=TokenF1(),
        policy=policy,
    )
    assert (found[0].status, found[0].truth) == (status, "Left femur.")
    assert found[0].reply == reply
    assert found[0].why is not None
    assert (found[0].why == "no idea") == (reply is None)
    write_round(tmp_path, [earlier, MIA], found)
    new = {r.id: r for r in read_records(tmp_path / "data.jsonl")}
    assert "ct_3" in new
    assert (new["ct_2"].answer if left else new.get("ct_2")) == left
    if left:
        assert new["ct_2"].extra["correction"]["truth"] == "Left femur."


def test_accepted_reply_and_what_the_corrector_is_given():
    corrector = Fixed("  The left femur. ")
    found = correct_records(
        [ROC], {"ct_2": "Spleen."}, corrector=corrector, similarity=TokenF1(), least_similarity=0.7
    )
    assert (found[0].status, found[0].after, found[0].why) == ("accepted", "The left femur.", None)
    case = corrector.cases[0]
    assert (case.question, case.answer, case.truth) == ("Question ct_2?", "Spleen.", "Left femur.")


def test_a_hostile_reply_can_be_written_down(tmp_path):
    found = correct_records(
        [ROC], {"ct_2": ""}, corrector=Fixed("\ud800" + "x" * 9000), similarity=TokenF1()
    )
    assert found[0].status == "truth"
    assert len(found[0].reply) == 2000
    write_round(tmp_path, [ROC], found)
    assert json.loads((tmp_path / "corrections.jsonl").read_text())["reply"].startswith("?")


def test_nothing_weak_asks_nobody(tmp_path):
    corrector = Fixed()
    found = correct_records(
        [ROC], {"ct_2": "Left femur."}, corrector=corrector, similarity=TokenF1()
    )
    assert found == []
    assert corrector.cases == []
    write_round(tmp_path, [ROC], found)
    assert read_records(tmp_path / "data.jsonl") == [ROC]
    assert (tmp_path / "corrections.jsonl").read_text() == ""


def test_a_version_is_never_changed(tmp_path):
    found = correct_records(
        [ROC], {"ct_2": "Spleen."}, corrector=Fixed("Left femur."), similarity=TokenF1()
    )
    write_round(tmp_path, [ROC], found)
    write_round(tmp_path, [ROC], found)  # the same again changes nothing
    before = (tmp_path / "data.jsonl").read_bytes()
    with pytest.raises(DataError, match="finished version"):
        write_round(tmp_path, [ROC, MIA], found)
    assert (tmp_path / "data.jsonl").read_bytes() == before


def test_wrong_ids(tmp_path):
    with pytest.raises(DataError, match="'ct_9', but no such record"):
        correct_records([ROC], {"ct_9": "x"}, corrector=Fixed(), similarity=TokenF1())
    found = correct_records([ROC], {"ct_2": ""}, corrector=Fixed("x"), similarity=TokenF1())
    with pytest.raises(DataError, match="correction of 'ct_2', but no such record"):
        write_round(tmp_path, [MIA], found)
    with pytest.raises(DataError, match="two corrections"):
        write_round(tmp_path, [ROC], [*found, *found])


def test_all_left_out_is_an_error(tmp_path):
    found = correct_records(
        [ROC], {"ct_2": ""}, corrector=Fixed(None), similarity=TokenF1(), policy="skip"
    )
    with pytest.raises(DataError, match="every record was left out"):
        write_round(tmp_path, [ROC], found)
    assert not (tmp_path / "data.jsonl").exists()


def test_token_f1():
    judge = make_similarity("token_f1")
    assert judge(["The left femur."], ["left femur"]) == [pytest.approx(0.8)]
    assert judge([f"femur {BOX}", "", "", "a"], [f"femur {FAR}", "", "a", "b"]) == [1, 1, 0, 0]


@pytest.mark.slow
def test_minilm():
    judge = make_similarity("minilm")
    first = ["Left femur.", f"A {BOX}", "", "The image shows a CT scan of the pelvis.", "Colon."]
    second = ["Left femur.", f"A {FAR}", "Colon.", "This is a CT image of the pelvis.", "A dog."]
    same, boxes, empty, alike, unlike = judge(first, second)
    assert (same, boxes, empty) == (1.0, 1.0, 0.0)
    assert alike > 0.8 > 0.5 > unlike
    # a pair is judged the same whatever stands beside it
    assert judge(first[3:4], second[3:4])[0] == pytest.approx(alike, abs=1e-5)
    assert judge([], []) == []
    assert judge.name == "all-MiniLM-L6-v2"


def test_missing_encoder_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("clinkd.train.correction.similarity.find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"clinkd\[demo\].*token_f1"):
        make_similarity("minilm")
    with pytest.raises(SetupError, match="sentence-transformers is not installed"):
        SentenceSimilarity(tmp_path)


def test_an_encoder_that_cannot_be_loaded_names_its_key(monkeypatch):
    def load(*_, **__):
        raise OSError("no network\nmore")

    monkeypatch.setattr("sentence_transformers.SentenceTransformer", load)
    message = r"^correct.similarity=nope: .*\(no network\); give minilm, token_f1 or an .* folder$"
    with pytest.raises(SetupError, match=message):
        make_similarity("nope")


def test_what_failed_its_checks_does_not_count_as_corrected():
    assert count_statuses(["truth"] * 6) == "0 corrected, 6 not (the truth instead)"
    assert count_statuses(["accepted", "skipped"]) == "1 corrected, 1 not (left out)"
    assert count_statuses(["accepted"]) == "1 corrected"


def test_a_reply_that_cannot_be_learned_from():
    """It gives way to the truth, as one that fails its checks does."""
    asked = []

    def why_unfit(record):
        asked.append(record.answer)
        return "too long"

    found = correct_records(
        [ROC], {"ct_2": "Spleen."}, corrector=Fixed(" Left femur. "), similarity=TokenF1(),
        why_unfit=why_unfit,
    )  # fmt: skip
    assert asked == ["Left femur."]
    assert (found[0].status, found[0].after, found[0].why) == ("truth", "Left femur.", "too long")
