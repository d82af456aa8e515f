"""`clinkd ask` says what is wrong before it computes, and never leaves half a picture."""

from types import SimpleNamespace

import pytest
import transformers
from PIL import Image
from transformers import Qwen2Config, Qwen2Model

from clinkd.commands import ask as command
from clinkd.errors import ConfigError, DataError
from clinkd.generate.scorer import ClipScorer


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def answered(monkeypatch):
    text = "<|box_start|>(100,100),(500,500)<|box_end|>"
    found = [(SimpleNamespace(text=text, score=0.0), None)]
    calls = []
    monkeypatch.setattr(command, "_answer", lambda *_: (calls.append(1), (found, 0))[1])
    return calls


def ask(picture, show):
    command.ask(picture, "?", "m", None, 3, 80, None, show, False)


def test_a_folder_named_like_a_picture_is_told_before_the_work(picture, tmp_path, monkeypatch):
    calls = answered(monkeypatch)
    (tmp_path / "out.png").mkdir()
    with pytest.raises(
        ConfigError, match=r"--show must name a \.png file; .*out\.png' is a folder"
    ):
        ask(picture, tmp_path / "out.png")
    assert calls == []


def test_a_drawing_is_written_whole_or_not_at_all(picture, tmp_path, monkeypatch):
    answered(monkeypatch)
    show = tmp_path / "out.png"
    ask(picture, show)
    before = show.read_bytes()
    with Image.open(show) as drawn:
        assert drawn.size == (520, 390)

    def half(self, file, *_):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(KeyboardInterrupt):
        ask(picture, show)
    assert show.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "out.png"]


def test_a_model_with_one_tower_is_no_scorer(tmp_path, monkeypatch):
    """Qwen2-VL has image features and no text features."""
    model = Qwen2Model(
        Qwen2Config(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            intermediate_size=8,
        )
    )
    model.get_image_features = lambda **_: None
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: (model, {}))
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda *_, **__: None)
    with pytest.raises(ConfigError, match="Qwen2Model is no CLIP or SigLIP"):
        ClipScorer.load(str(tmp_path))


def test_an_image_too_thin_for_the_model_is_named(tmp_path, monkeypatch):
    calls = answered(monkeypatch)
    Image.new("RGB", (402, 2)).save(tmp_path / "thin.png")
    with pytest.raises(DataError, match=r"image 'thin\.png' is 402 × 2: over 200 times as long"):
        ask(tmp_path / "thin.png", None)
    assert calls == []
