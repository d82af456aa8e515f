"""A scorer whose weights are not all there is refused: the libraries would make some up."""

import json

import pytest
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel

from clinkd.errors import ConfigError
from clinkd.generate import ClipScorer

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def open_clip_folder(tmp_path):
    """A configuration alone, as a download that was broken off leaves it."""
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}}
    config["preprocess_cfg"] = {"mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    return tmp_path


def test_a_folder_without_weights(open_clip_folder):
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ClipScorer.load(str(open_clip_folder))


@pytest.mark.parametrize("content", [POINTER, b""], ids=["pointer of Git LFS", "empty"])
@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_weights_that_are_none(open_clip_folder, name, content):
    (open_clip_folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ClipScorer.load(str(open_clip_folder))


def test_some_weights_of_transformers_are_missing(tmp_path, monkeypatch):
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shared |= {"num_attention_heads": 2}
    text = shared | {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
    vision = shared | {"image_size": 32, "patch_size": 16}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("transformers.AutoProcessor.from_pretrained", lambda folder: None)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["text_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"1 tensors are missing, such as .text_projection\.weight"
    ):
        ClipScorer.load(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(POINTER)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        ClipScorer.load(str(tmp_path))
