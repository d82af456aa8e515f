"""Hostile replies of a judge are listed, not counted; the cache is where the command says."""

import json

import pytest
import typer
from typer.testing import CliRunner

from clinkd.commands.llava_med import llava_med
from clinkd.errors import SetupError
from clinkd.evaluate.llava_med import read_questions
from clinkd.pipeline import judge as judges
from clinkd.pipeline.judge import Judge, judge_messages, judge_scores, read_grades
from clinkd.train.correction.settings import CorrectorSettings
from clinkd.train.correctors.cache import ReplyCache, StoredReply, reply_key

DEEP = '{"first": ' + "[" * 100_000 + "}"
NESTED = '{"first": ' + "[" * 900 + "]" * 900 + ', "second": 1}'


@pytest.mark.parametrize("reply", [DEEP, NESTED, "[" * 100_000, '{"first": 9' + "9" * 5000 + "}"])
def test_a_reply_of_brackets_is_refused(reply):
    with pytest.raises(ValueError, match=r"not the JSON asked for|from 1 to 10, got a list"):
        read_grades(reply)


@pytest.fixture
def questions(tmp_path):
    rows = [
        {
            "question_id": i,
            "text": "What is shown?",
            "gpt4_answer": "A chest.",
            "type": "conversation",
            "domain": {"mri": True},
        }
        for i in range(2)
    ]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def settings(**other):
    return CorrectorSettings(kind="endpoint", url="http://127.0.0.1:9/v1", model="m", **other)


def stored(path, asked, said, replies):
    """A cache that holds these replies, as an earlier start left it."""
    made = settings()
    with ReplyCache(path) as cache:
        for question, answer, reply in zip(asked, said, replies, strict=True):
            key = reply_key(
                judge=judges.VERSION,
                model=made.model,
                messages=judge_messages(question, answer, swapped=False),
                temperature=made.temperature,
                max_tokens=made.max_tokens,
                json_mode=made.json_mode,
                parameters=made.parameters,
            )
            cache.put(key, StoredReply(reply))
    return path


def test_a_stored_reply_of_brackets_does_not_end_each_restart(questions, tmp_path):
    asked = read_questions(questions)
    replies = [DEEP, '{"first": 8, "second": 4}']
    cache = stored(tmp_path / "c.jsonl", asked, ["a", "b"], replies)
    judge = Judge(settings(offline=True), cache=cache)
    found = judge_scores(asked, ["a", "b"], judge, max_new_tokens=80)
    assert [row["question_id"] for row in found["failed"]] == ["0"]
    assert found["scores"]["all"] == {
        "n": 1,
        "reference": 8,
        "answer": 4,
        "relative": 50,
        "quotient_of_means": 50,
    }


def test_the_option_names_the_cache_before_the_file(questions, tmp_path):
    asked = read_questions(questions)
    answers = tmp_path / "a.jsonl"
    answers.write_text(
        "".join(json.dumps({"question_id": i, "text": "a"}) + "\n" for i in range(2)),
        encoding="utf-8",
    )
    good = stored(tmp_path / "good.jsonl", asked, ["a"] * 2, ['{"first": 8, "second": 4}'] * 2)
    config = tmp_path / "judge.yaml"
    config.write_text(
        f"url: http://127.0.0.1:9/v1\nmodel: m\noffline: true\ncache: {tmp_path / 'none.jsonl'}\n",
        encoding="utf-8",
    )
    app = typer.Typer()
    app.command()(llava_med)
    command = [str(questions), str(answers), "--max-new-tokens", "80", "--judge", str(config)]
    found = CliRunner().invoke(app, [*command, "--cache", str(good), "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["scores"]["all"]["relative"] == 50
    found = CliRunner().invoke(app, command)
    assert isinstance(found.exception, SetupError)
    assert "none.jsonl" in str(found.exception)
