"""What a later stage would stumble over is found in the first one."""

from importlib.util import find_spec

import pytest
from PIL import Image

from clinkd import models
from clinkd.config import check
from clinkd.data.collate import AnswerDataset
from clinkd.data.records import Record, Turn
from clinkd.errors import ConfigError, DataError, SetupError
from clinkd.evaluate.text import jars
from clinkd.models.demo import build_model, build_processor
from clinkd.pipeline import preflight
from clinkd.pipeline.steps import load_model
from clinkd.rotary import PositionConfig
from clinkd.train.checkpoint import save_model
from clinkd.train.correction import similarity

LOCAL = {"similarity": "token_f1", "corrector": {"kind": "local", "model": "none"}}
LIGHT = {"correct": {"rounds": 0}, "generate": {"selection": "beam"}}


TURNS = (Turn("human", "What?"), Turn("gpt", "That."))


def record(name, task="ROC"):
    return Record(
        id=name, images=(f"{name}.png",), task=task, modality="CT", group=name,
        conversations=TURNS,
    )  # fmt: skip


@pytest.fixture
def without(monkeypatch):
    """Packages that are not installed."""

    def hide(*names):
        found = lambda name: None if name in names else find_spec(name)  # noqa: E731
        monkeypatch.setattr(preflight, "find_spec", found)

    return hide


@pytest.mark.parametrize(
    ("tree", "error", "message"),
    [
        ({"model": {"adapter": {"kind": "lora"}}}, SetupError, r"lora needs peft.*clinkd\[lora\]"),
        ({"model": {"adapter": {"kind": "qlora"}}}, SetupError, "qlora needs peft"),
        ({"evaluate": {"meteor": "jar"}}, SetupError, "METEOR and SPICE need Java"),
        ({"log": {"wandb": "mine"}}, SetupError, "log.wandb needs its package"),
        ({"generate": {"scorer": "nonexist"}}, ConfigError, "scorer 'nonexist': write local-dir"),
        (
            {
                "correct": {
                    "similarity": "token_f1",
                    "corrector": {"kind": "local", "model": "none"},
                }
            },
            SetupError,
            "none holds no text model",
        ),
    ],
)
def test_parts_that_are_missing(without, monkeypatch, tree, error, message):
    without("peft", "bitsandbytes", "wandb")
    monkeypatch.setattr(jars, "which", lambda name: None)
    with pytest.raises(error, match=message):
        preflight.require_parts(check(LIGHT | tree), [])


def test_the_sentence_encoder_is_looked_for_not_loaded(monkeypatch):
    config = check(LIGHT | {"correct": {"similarity": "minilm"}})
    monkeypatch.setattr(similarity, "SentenceSimilarity", None)
    preflight.require_parts(config, [])
    monkeypatch.setattr(similarity, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match="not installed: pip install"):
        preflight.require_parts(config, [])


def test_a_parser_is_needed_where_it_parses(monkeypatch):
    def missing():
        raise SetupError("no parser")

    monkeypatch.setattr(preflight, "require_parser", missing)
    preflight.require_parts(check(LIGHT), [record("a")])
    with pytest.raises(SetupError, match="no parser"):
        preflight.require_parts(check(LIGHT), [record("a", "RC")])


@pytest.fixture(scope="module")
def processor():
    return build_processor(["What is it? A thin image."] * 9, 400, 56 * 56, 128 * 128)


@pytest.mark.parametrize("preset", ["paper", "mrope"])
def test_an_image_too_long_for_its_width(tmp_path, processor, preset):
    """With a spacing of 2, one row of 20 patches would begin before the text in front of it."""
    Image.new("RGB", (800, 40)).save(tmp_path / "thin.png")
    Image.new("RGB", (80, 60)).save(tmp_path / "usual.png")
    usual, both = (
        AnswerDataset([record(name) for name in names], tmp_path, processor, 1)
        for names in (["usual"], ["usual", "thin"])
    )
    positions = PositionConfig(preset)
    preflight.require_places(usual, positions)
    if preset == "mrope":
        preflight.require_places(both, positions)
        return
    with pytest.raises(DataError, match=r"record 'thin': image 'thin.png' is too long.*at most"):
        preflight.require_places(both, positions)


def test_a_checkpoints_own_ladders_stay(tmp_path, processor):
    size = check({"model": {"demo": {"layers": 1, "width": 32, "vision_layers": 1}}}).model.demo
    model = models.apply(build_model(processor, size, 0), PositionConfig("paper", base=1e6))
    save_model(tmp_path, model, processor)
    loaded, _ = load_model(check({"model": {"positions": {"preset": "paper"}}}), str(tmp_path))
    assert models.positions_of(loaded.config).base == 1e6


def test_the_runs_positions_whatever_the_checkpoint_was_trained_with(tmp_path, processor):
    size = check({"model": {"demo": {"layers": 1, "width": 32, "vision_layers": 1}}}).model.demo
    model = models.apply(build_model(processor, size, 0), PositionConfig("paper"))
    save_model(tmp_path, model, processor)
    for preset in ("mrope", "paper"):
        config = check({"model": {"positions": {"preset": preset}}})
        loaded, _ = load_model(config, str(tmp_path))
        assert models.positions_of(loaded.config).preset == preset
