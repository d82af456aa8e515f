"""`clinkd ask`: the answer, its boxes, and what is refused."""

import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner

from clinkd.commands.ask import ask, draw_boxes
from clinkd.errors import ConfigError, DataError
from clinkd.train.checkpoint import save_model


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, demo, processor):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, demo, processor)
    return folder


def invoke(*arguments):
    app = Typer()
    app.command()(ask)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_ask_prints_answer_and_boxes(model_folder, data, monkeypatch):
    root, _ = data
    text = "The liver. <|box_start|>(100,200),(300,400)<|box_end|>"
    monkeypatch.setattr("clinkd.generate.beam._decode", lambda *_: text)
    drawn = root / "drawn.png"
    done = invoke(
        root / "1.png", "Where is the liver?", "--model", model_folder, "--show", drawn,
        "--max-new-tokens", 4,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [text, "box: 100, 200, 300, 400", f"drawn: {drawn}"]
    with Image.open(drawn) as image:
        assert min(image.size) >= 256


def test_ask_lists_every_candidate(model_folder, data):
    root, _ = data
    done = invoke(
        root / "1.png", "What?", "--model", model_folder, "--all", "--beams", 2,
        "--max-new-tokens", 4,
    )  # fmt: skip
    assert done.stdout.count("score -") == 2
    assert sum(line.startswith("* ") for line in done.stdout.splitlines()) == 1


def test_ask_refuses(model_folder, data):
    root, _ = data
    for arguments, error, message in (
        ((root / "none.png", "?", "--model", model_folder), DataError, "does not exist"),
        ((root / "1.png", "?", "--model", root), ConfigError, "cannot be loaded"),
        ((root / "1.png", "?", "--model", root), ConfigError, "the folder holds no model"),
        (
            (root / "1.png", "?", "--model", model_folder.parent / "none"),
            ConfigError,
            "cannot be loaded: there is no such folder; models are in",
        ),
        (
            (root / "1.png", "?", "--model", model_folder, "--show", "a.jpg"),
            ConfigError,
            "must name a .png file",
        ),
    ):
        done = invoke(*arguments)
        assert isinstance(done.exception, error)
        assert message in str(done.exception)


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (100, 50))
    drawn = draw_boxes(image, [(0, 0, 500, 1000)])
    assert image.getpixel((0, 0)) == (0, 0, 0)
    assert drawn.size == (500, 250)
    middle = drawn.width // 2
    assert drawn.getpixel((0, 100)) != (0, 0, 0)
    assert drawn.getpixel((middle - 1, 100)) != (0, 0, 0)
    assert drawn.getpixel((middle + 20, 100)) == (0, 0, 0)
