"""The scorer is made once, and anew where another one is chosen later."""

import pytest

from clinkd import generate
from clinkd.config import check
from clinkd.pipeline.folder import RunFolder
from clinkd.pipeline.scorer import ready_scorer


@pytest.fixture
def ready(tmp_path, monkeypatch):
    """Readies the scorer of some settings; what was trained, looked for and read for it."""
    done = []
    monkeypatch.setattr(
        generate, "train_clip", lambda *_, steps, **__: done.append(f"trained {steps}")
    )
    monkeypatch.setattr(generate.ClipScorer, "load", lambda name: done.append(name))

    def start(**settings):
        done.clear()
        config = check({"output": str(tmp_path / "run"), "generate": settings})
        with RunFolder.open(config, update=True) as folder:
            ready_scorer(folder, lambda: done.append("read") or [], lambda *_: None)
        return list(done)

    return start


def test_a_scorer_is_made_once(ready):
    assert ready(scorer_steps=7) == ["read", "trained 7"]
    assert ready(scorer_steps=7) == []


def test_none_is_made_that_nobody_asks(ready):
    assert ready(selection="beam") == []
    assert ready(selection="consensus") == []
    assert ready(selection="clip", scorer_steps=5) == ["read", "trained 5"]


def test_one_that_was_cut_off_is_not_taken_for_the_one_before(ready, monkeypatch):
    ready(scorer_steps=7)

    def cut_off(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generate, "train_clip", cut_off)
        with pytest.raises(KeyboardInterrupt):
            ready(scorer_steps=8)
    assert ready(scorer_steps=7) == ["read", "trained 7"]


def test_another_one_is_made_or_looked_for(ready):
    ready(scorer_steps=7)
    assert ready(scorer_steps=8) == ["read", "trained 8"]
    assert ready(scorer="hf-hub:some/clip") == ["hf-hub:some/clip"]
    assert ready(scorer="hf-hub:some/clip") == []
    assert ready(scorer_steps=8) == ["read", "trained 8"]
