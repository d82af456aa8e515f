"""What a round of correction takes over from the one before."""

from types import SimpleNamespace

import pytest

from clinkd.config import check
from clinkd.data.files import read_jsonl, write_jsonl
from clinkd.data.records import Record, Turn, read_records, write_records
from clinkd.pipeline import stages
from clinkd.pipeline.folder import RunFolder
from clinkd.pipeline.tasks import AnswerTask
from clinkd.train.correction.similarity import TokenF1
from clinkd.train.correctors import Reply

TRUTH, BETTER = "The left kidney is seen here.", "A left kidney is seen here."


class Once:
    """A corrector that corrects the first case it ever sees, and nothing after it."""

    name = "once"

    def __init__(self):
        self.left = 1

    def correct(self, cases, progress=None):
        replies = [Reply(BETTER) if i < self.left else Reply(None, "no") for i in range(len(cases))]
        self.left = 0
        return replies


@pytest.mark.parametrize(
    ("policy", "learnt"), [("truth", [TRUTH, TRUTH]), ("keep", [BETTER, TRUTH])]
)
def test_keep_is_what_the_round_before_left(tmp_path, monkeypatch, policy, learnt):
    tree = {"correct": {"policy": policy, "similarity": "token_f1"}, "output": str(tmp_path)}
    folder = RunFolder(tmp_path, check(tree))
    turns = (Turn("human", "Which organ is it?"), Turn("gpt", TRUTH))
    folder.data("train").parent.mkdir()
    write_records(folder.data("train"), [Record(n, (), "ct", "ROC", n, turns) for n in "ab"])

    def answer(_, task, __):
        if isinstance(task, AnswerTask):
            write_jsonl(task.output, [{"id": n, "response": "A liver."} for n in "ab"])

    monkeypatch.setattr(stages, "run_task", answer)
    monkeypatch.setattr(stages, "fit_check", lambda *_: SimpleNamespace(why_not=lambda _: None))
    corrector, similarity = Once(), TokenF1()
    for round_ in (1, 2):
        stages._round(folder, round_, "start", corrector, similarity, lambda *_: None)
    first, second = (read_records(folder.correction(k) / "data.jsonl") for k in (1, 2))
    assert [record.answer for record in first] == [BETTER, TRUTH]
    assert [record.answer for record in second] == learnt
    lines = list(read_jsonl(folder.correction(2) / "corrections.jsonl"))
    assert {line["truth"] for line in lines} == {TRUTH}
