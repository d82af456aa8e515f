"""The small CLIP model that is trained where no pretrained one is at hand."""

import pytest
import torch
from PIL import Image

from clinkd.data.records import Record, Turn
from clinkd.generate import ClipScorer, clip_train, train_clip


@pytest.fixture
def colours(tmp_path):
    """Pictures of four colours, each with its own sentence."""
    records = []
    for index, name in enumerate(("red", "blue", "green", "white") * 2):
        Image.new("RGB", (32, 32), name).save(tmp_path / f"{index}.png")
        turns = (Turn("human", "<image>what?"), Turn("gpt", f"A {name} square."))
        records.append(Record(str(index), (f"{index}.png",), "ct", "MIA", "g", turns))
    return records


def test_a_trained_scorer_tells_pictures_apart(colours, tmp_path):
    rows = []
    train_clip(colours, tmp_path, tmp_path / "clip", steps=30, batch_size=8, log=rows.append)
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert [r["stage"] for r in rows] == ["clip"] * 3
    scorer = ClipScorer.load(f"local-dir:{tmp_path / 'clip'}")
    texts = [f"A {name} square." for name in ("red", "blue", "green", "white")]
    for index, name in enumerate(("red", "blue", "green", "white")):
        cosines = scorer.score(Image.new("RGB", (48, 32), name), texts)
        assert max(range(4), key=cosines.__getitem__) == index


def test_training_is_deterministic_and_leaves_the_random_state(colours, tmp_path):
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_clip(colours, tmp_path, tmp_path / name, steps=2, batch_size=4, seed=seed)
    a, b, c = ((tmp_path / n / "open_clip_model.safetensors").read_bytes() for n in "abc")
    assert a == b != c
    assert torch.equal(before, torch.random.get_rng_state())


def test_nothing_to_train_on(tmp_path):
    with pytest.raises(ValueError, match="at least 2 records with one image and an answer"):
        train_clip([], tmp_path, tmp_path / "clip")


def test_one_image_teaches_nothing(colours, tmp_path):
    """No two of its answers may stand in a batch: every loss would be 0."""
    records = [Record(r.id, ("0.png",), "ct", "MIA", "g", r.conversations) for r in colours]
    with pytest.raises(ValueError, match="with different images and different answers"):
        train_clip(records, tmp_path, tmp_path / "clip")


def test_no_more_images_are_read_than_trained_on(colours, tmp_path, monkeypatch):
    read = []
    load = clip_train.load_image
    monkeypatch.setattr(clip_train, "load_image", lambda *a: (read.append(a), load(*a))[1])
    train_clip(colours, tmp_path, tmp_path / "clip", steps=2, batch_size=2)
    assert len(set(read)) == len(read) <= 4
