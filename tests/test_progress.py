"""Lines, bars and tables of the terminal."""

import io
from typing import Any

import pytest

from clinkd.progress import Console, format_seconds, results_table, stage_line


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1 min 00 s"),
        (185, "3 min 05 s"),
        (7620, "2 h 07 min"),
        (7199.9, "2 h 00 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_stage_lines() -> None:
    assert stage_line("teacher", "27 records", 12.3).plain.split() == [
        "✓",
        "teacher",
        "12",
        "s",
        "27",
        "records",
    ]
    assert stage_line("teacher", status="skipped").plain.split() == ["=", "teacher", "unchanged"]
    assert "unchanged; 27" in stage_line("teacher", "27 records", status="skipped").plain
    assert "\n" not in stage_line("teacher", "two\nlines").plain
    with pytest.raises(ValueError, match="status must be one of done, skipped, failed, got 'x'"):
        stage_line("teacher", status="x")


def work(console: Console) -> None:
    with console.stage("teacher") as update:
        for done in range(4):
            update(done, 3, "loss [red]1.0")
    console.stage_done("teacher", "27 [records]", 12.3)


def test_a_file_gets_one_line_a_stage() -> None:
    file = io.StringIO()
    console = Console(file)
    work(console)
    console.stage_skipped("prepare")
    console.stage_failed("distill", "no space", 3)
    assert not console.animated
    lines = file.getvalue().splitlines()
    assert len(lines) == 3
    assert lines[0].endswith("27 [records]")
    assert "\x1b" not in file.getvalue()


def test_a_terminal_gets_bars_and_colours() -> None:
    file = Terminal()
    console = Console(file)
    work(console)
    assert console.animated
    assert "\x1b[1;32m✓" in file.getvalue()
    assert "loss [red]1.0" in file.getvalue()  # notes are no markup


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    file = Terminal()
    Console(file).stage_done("teacher", "", 1)
    assert "32m" not in file.getvalue()


def test_a_dumb_terminal_and_forced_colours_get_no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not Console(io.StringIO()).animated
    monkeypatch.setenv("TERM", "dumb")
    assert not Console(Terminal()).animated


def test_quiet_says_nothing() -> None:
    file = Terminal()
    work(Console(file, quiet=True))
    assert file.getvalue() == ""


def test_an_ascii_stream_does_not_fail() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", write_through=True)
    Console(stream).stage_done("a", "b", 1)
    assert raw.getvalue().startswith(b"? a")


def model(label: str, score: float) -> dict[str, Any]:
    result = {"metric": "Recall@0.5", "score": score, "n": 9, "ci95": [score - 2, score + 2]}
    return {"label": label, "tasks": {"VG": result}, "average": score}


def test_results_hold_scores_intervals_and_verdicts() -> None:
    file = io.StringIO()
    metrics = {
        "models": {"base": model("Base", 3.0), "sasg": model("Final [x]", 61.25)},
        "baselines": {"mean_box": model("Mean box", 31.0) | {"average": None}},
        "verdicts": ["It beats its base."],
    }
    Console(file).results(metrics)
    text = file.getvalue()
    for part in (
        "Base",
        "3.0 (1–5)",
        "Final [x]",
        "61.2 (59–63)",
        "Mean box",
        "It beats its base.",
    ):
        assert part in text
    assert results_table(metrics).row_count == 3


@pytest.mark.parametrize("metrics", [{}, {"models": {}}, {"models": {"a": {}}}])
def test_a_table_of_nothing_is_no_crash(metrics: dict[str, Any]) -> None:
    Console(io.StringIO()).results(metrics)
