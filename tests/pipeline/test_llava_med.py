"""LLaVA-Med's small test set: its files, n-gram scores, and a judge behind a local server."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import typer
from typer.testing import CliRunner

from clinkd.commands.llava_med import llava_med
from clinkd.errors import ConfigError, DataError, SetupError
from clinkd.evaluate.llava_med import ngram_scores, read_answers, read_questions
from clinkd.pipeline.judge import Judge, judge_scores, read_grades
from clinkd.train.correction.settings import CorrectorSettings

DOMAINS = ("chest_xray", "mri", "histology", "gross", "ct_scan")


def line(number, domain="mri", kind="conversation", **other):
    return {
        "question_id": number,
        "image": "a.jpg",
        "pair_id": "p",
        "text": f"What does figure {number} show?\n<image>",
        "gpt4_answer": f"It shows finding number {number} in the left lung.",
        "fig_caption": "A caption.",
        "in_text_mention": ["The text."],
        "domain": {name: name == domain for name in DOMAINS},
        "type": kind,
        "fig_label": "F1",
    } | other


LINES = [line(1), line(2, "ct_scan"), line(3, "ct_scan", "detailed_description")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path):
    return write(tmp_path / "questions.jsonl", LINES)


def answers(path, texts, key="text"):
    rows = [{"question_id": i, key: text} for i, text in enumerate(texts, start=1)]
    return write(path, rows[::-1])


def test_questions_are_read_without_the_image_mark(questions):
    first, _, last = read_questions(questions)
    assert first.text == "What does figure 1 show?"
    assert (first.domain, last.domain, last.kind) == ("mri", "ct_scan", "detailed_description")
    assert first.mention == "The text."


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"gpt4_answer": None}, "'gpt4_answer' must be a text"),
        ({"domain": dict.fromkeys(DOMAINS, True)}, "one key that is true"),
        ({"question_id": 1}, "question_id 1 comes twice"),
    ],
)
def test_a_question_at_fault_is_named(tmp_path, change, why):
    path = write(tmp_path / "q.jsonl", [line(1), line(2, **change)])
    with pytest.raises(DataError, match=rf"q\.jsonl:2: .*{why}"):
        read_questions(path)


def test_answers_come_in_the_order_of_the_questions(questions, tmp_path):
    asked = read_questions(questions)
    for key in ("text", "response", "answer"):
        path = answers(tmp_path / "a.jsonl", ["one", "two", "three"], key)
        assert read_answers(path, asked) == ["one", "two", "three"]
    with pytest.raises(DataError, match="no answer to 1 questions, as 3"):
        read_answers(answers(path, ["one", "two"]), asked)
    with pytest.raises(DataError, match="question_id 4 is none of the set's"):
        read_answers(answers(path, ["1", "2", "3", "4"]), asked)


def test_ngrams_by_part_with_the_length_stated(questions):
    asked = read_questions(questions)
    said = [asked[0].reference, "", "It shows nothing."]
    found = ngram_scores(asked, said, max_new_tokens=80, meteor="meteor_py")
    assert found["length"] == {"max_new_tokens": 80, "mean_words": 4.0, "most_words": 9}
    assert not found["complete"]
    scores = found["scores"]
    assert {name: part["n"] for name, part in scores.items()} == {
        "all": 3, "conversation": 2, "detailed_description": 1, "ct_scan": 2, "mri": 1,
    }  # fmt: skip
    assert scores["mri"]["mbmr_meteor_py"] == pytest.approx(100, abs=0.01)
    assert 0 < scores["all"]["mbmr_meteor_py"] < 100
    empty = ngram_scores(asked, ["", "", ""], max_new_tokens=80, meteor="meteor_py")
    assert empty["scores"]["all"]["mbmr_meteor_py"] == 0


class Server:
    """Replies what `grade(fields)` says; counts calls."""

    def __init__(self):
        self.seen = []
        self.grade = lambda fields: {"first": 8, "second": 4, "why": "x"}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.seen.append(body)
                reply = outer.grade(json.loads(body["messages"][1]["content"]))
                status = reply if isinstance(reply, int) else 200
                text = reply if isinstance(reply, str) else json.dumps(reply)
                choice = {"message": {"content": text}, "finish_reason": "stop"}
                data = json.dumps({"choices": [choice]}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.01,))
        self.thread.start()


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()
    server.thread.join()


def settings(server, **other):
    url = f"http://127.0.0.1:{server.http.server_port}/v1"
    limits = {"requests_per_minute": 100_000, "timeout": 10, "max_tries": 1}
    return CorrectorSettings(kind="endpoint", url=url, model="m", **limits, **other)


def test_grades_are_relative_to_the_reference_and_paid_for_once(server, questions, tmp_path):
    asked = read_questions(questions)
    said = ["a", "b", "c"]
    server.grade = lambda fields: {"first": 8, "second": 4 if fields["second"] == "a" else 8}
    for _ in range(2):
        judge = Judge(settings(server), cache=tmp_path / "replies.jsonl")
        found = judge_scores(asked, said, judge, max_new_tokens=1024)
    assert len(server.seen) == 3
    assert found["length"]["max_new_tokens"] == 1024
    assert found["scores"]["mri"]["relative"] == 50
    assert found["scores"]["ct_scan"]["relative"] == 100
    assert found["scores"]["all"]["relative"] == pytest.approx(83.33, abs=0.01)
    assert found["scores"]["all"]["reference"] == 8
    sent = json.loads(server.seen[0]["messages"][1]["content"])
    assert set(sent) == {"caption", "mention", "question", "first", "second"}


def test_a_judge_that_prefers_a_place_is_evened_out(server, questions, tmp_path):
    asked = read_questions(questions)
    judge = Judge(settings(server), cache=tmp_path / "replies.jsonl", both_orders=True)
    found = judge_scores(asked, ["a", "b", "c"], judge, max_new_tokens=80)
    assert len(server.seen) == 6
    assert found["scores"]["all"]["relative"] == 100


def test_what_cannot_be_graded_is_listed(server, questions, tmp_path):
    asked = read_questions(questions)
    server.grade = lambda fields: (
        "no idea" if fields["second"] == "b" else {"first": 5, "second": 5}
    )
    judge = Judge(settings(server), cache=tmp_path / "replies.jsonl")
    found = judge_scores(asked, ["a", "b", "c"], judge, max_new_tokens=80)
    assert [row["question_id"] for row in found["failed"]] == ["2"]
    assert found["scores"]["all"]["n"] == 2
    server.grade = lambda fields: {"first": 11, "second": 5}
    judge = Judge(settings(server), cache=tmp_path / "other.jsonl")
    with pytest.raises(SetupError, match=r"graded nothing.*from 1 to 10, got 11"):
        judge_scores(asked, ["a", "b", "c"], judge, max_new_tokens=80)
    server.grade = lambda fields: 401
    with pytest.raises(SetupError, match="refuses: HTTP 401"):
        Judge(settings(server), cache=tmp_path / "third.jsonl").grade(asked, ["a", "b", "c"])


def test_only_an_endpoint_judges(tmp_path):
    with pytest.raises(ConfigError, match="kind: endpoint"):
        Judge(CorrectorSettings(), cache=tmp_path / "c.jsonl")


@pytest.mark.parametrize("text", ["8 9", "[1, 2]", '{"first": 3}', '{"first": true, "second": 1}'])
def test_replies_of_another_form_are_refused(text):
    with pytest.raises(ValueError, match=r"JSON asked for|number from 1 to 10"):
        read_grades(text)
    assert read_grades('```json\n{"first": 3, "second": 9.5}\n```') == (3, 9.5)


def test_the_command_needs_the_length_and_states_it(server, questions, tmp_path):
    app = typer.Typer()
    app.command()(llava_med)
    runner = CliRunner()
    said = str(answers(tmp_path / "a.jsonl", ["one", "two", "three"]))
    assert runner.invoke(app, [str(questions), said]).exit_code == 2
    limit = ["--max-new-tokens", "80"]
    found = runner.invoke(app, [str(questions), said, *limit, "--meteor", "python"])
    assert found.exit_code == 0, found.output
    assert "at most 80 new tokens" in found.output
    assert "not the whole set" in found.output
    url = f"http://127.0.0.1:{server.http.server_port}/v1"
    config = tmp_path / "judge.yaml"
    config.write_text(f"url: {url}\nmodel: m\nrequests_per_minute: 1000\n", encoding="utf-8")
    options = ["--judge", str(config), "--cache", str(tmp_path / "c.jsonl"), "--json"]
    found = runner.invoke(app, [str(questions), said, *limit, *options])
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)["scores"]["all"]["relative"] == 50
    config.write_text("model: m\n", encoding="utf-8")
    found = runner.invoke(app, [str(questions), said, *limit, *options])
    assert isinstance(found.exception, ConfigError)
    assert "needs url and model" in str(found.exception)
