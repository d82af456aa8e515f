"""CLIP scorers: small models of every layout, made on the spot."""

import json
import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

from clinkd.data.images import to_rgb
from clinkd.errors import ConfigError
from clinkd.generate import ClipScorer
from clinkd.generate.scorer import mean_over_images

WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "red", "blue", "square"]
WORDS += ["image", "of", "the", ".", "is"]
VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.25] * 3}


def word_tokenizer(context):
    backend = Tokenizer(WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    backend.post_processor = TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unk>",
        model_max_length=context,
    )


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open_clip")
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**config).state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS})
    )
    return folder


@pytest.fixture(scope="module")
def biomedclip_folder(tmp_path_factory):
    """BiomedCLIP's layout: a BERT text tower, weights in a pickle, the tokenizer beside them."""
    folder = tmp_path_factory.mktemp("biomedclip")
    bert = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    tower = folder / "tower"  # where the text config points; the real one points to the hub
    BertModel(bert).save_pretrained(tower)
    text = {
        "hf_model_name": str(tower),
        "hf_tokenizer_name": str(tower),
        "hf_proj_type": "mlp",
        "hf_pooler_type": "cls_last_hidden_state_pooler",
        "context_length": 12,
    }
    config = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": text}
    model = open_clip.CustomTextCLIP(**json.loads(json.dumps(config)))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    word_tokenizer(12).save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS})
    )
    return folder


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = CLIPConfig(
        text_config=shared
        | {
            "num_attention_heads": 2,
            "vocab_size": len(WORDS),
            "max_position_embeddings": 12,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        vision_config=shared | {"num_attention_heads": 2, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    CLIPProcessor(
        image_processor=CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=word_tokenizer(12),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory):
    """SigLIP as transformers has it: no projection, a head that pools by attention."""
    folder = tmp_path_factory.mktemp("siglip")
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    shared |= {"num_attention_heads": 2}
    text = shared | {"vocab_size": len(WORDS), "max_position_embeddings": 12}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = shared | {"image_size": 32, "patch_size": 16}
    torch.manual_seed(0)
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    SiglipProcessor(
        image_processor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=word_tokenizer(12),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def open_siglip_folder(tmp_path_factory):
    """SigLIP as open_clip has it: a timm tower, texts pooled at the last token, a logit bias."""
    folder = tmp_path_factory.mktemp("open_siglip")
    vision = {"image_size": 224, "timm_model_name": "vit_tiny_patch16_224",
              "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "none"}  # fmt: skip
    text = {"context_length": 16, "vocab_size": 49408, "width": 192, "heads": 2, "layers": 1,
            "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}  # fmt: skip
    config = {"embed_dim": 192, "init_logit_bias": -10, "custom_text": True,
              "vision_cfg": vision, "text_cfg": text}  # fmt: skip
    torch.manual_seed(0)
    arguments = {k: v for k, v in config.items() if k != "custom_text"}
    model = open_clip.CustomTextCLIP(**json.loads(json.dumps(arguments)))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": config, "preprocess_cfg": PREPROCESS})
    )
    return folder


@pytest.fixture(params=["open_clip", "biomedclip", "transformers", "siglip", "open_siglip"])
def scorer(request):
    return ClipScorer.load(str(request.getfixturevalue(f"{request.param}_folder")))


@pytest.fixture
def red():
    return Image.new("RGB", (40, 50), "red")


def test_scores_are_cosines_and_do_not_depend_on_the_batch(scorer, red):
    texts = ["a red square", "the image", "a blue square"]
    together = scorer.score(red, texts)
    assert all(-1.001 <= c <= 1.001 for c in together)
    assert len(set(together)) == 3
    alone = [scorer.score(red, [text])[0] for text in texts]
    assert together == pytest.approx(alone, abs=1e-5)
    assert scorer.score(red, []) == []


def test_local_dir_is_the_same_model(open_clip_folder, red):
    first = ClipScorer.load(f"local-dir:{open_clip_folder}").score(red, ["a red square"])
    assert first == ClipScorer.load(str(open_clip_folder)).score(red, ["a red square"])
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{open_clip_folder}")
    with torch.no_grad():
        text = model.eval().encode_text(open_clip.tokenize(["a red square"], 16), normalize=True)
        image = model.encode_image(preprocess(red)[None], normalize=True)
    assert first == pytest.approx([float(text @ image.T)], abs=1e-5)


def test_boxes_are_not_scored(scorer, red):
    plain, boxed = scorer.score(
        red, ["a red square", "a red square <|box_start|>(1,2),(30,40)<|box_end|>"]
    )
    assert plain == boxed


def test_long_texts_are_scored_by_sentence(scorer, red):
    first = "the image is a square ."
    second = "the image is a red square ."
    text = f"{first} {second} {second}"
    assert scorer.parts(first) == [first.replace(" .", ".")]
    assert len(scorer.parts(text)) == 3
    a, b, whole = scorer.score(red, [first, second, text])
    assert whole == pytest.approx((a + 2 * b) / 3, abs=1e-5)


def test_a_long_sentence_is_scored_to_its_end(scorer, red):
    """The tokenizer would cut it, and texts that differ behind the cut would be as good."""
    start = "the red square is " + "a red square of the image " * 12
    texts = [start + "a blue image", start + "the red of a square"]
    assert "".join(scorer.parts(texts[0])).replace(" ", "") == texts[0].replace(" ", "")
    assert all(scorer.backend.fits(part) for part in scorer.parts(texts[0]))
    first, second = scorer.score(red, texts)
    assert first != second


def test_images_of_every_mode_are_seen_as_a_model_sees_them(open_clip_folder):
    scorer = ClipScorer.load(str(open_clip_folder))
    texts = ["a red square"]
    ramp = np.linspace(0, 4000, 40 * 40).reshape(40, 40)
    grey = Image.fromarray(ramp.astype(np.uint16))
    assert scorer.score(grey, texts) == scorer.score(to_rgb(grey), texts)
    assert scorer.score(grey, texts) != scorer.score(Image.new("RGB", (40, 40), "white"), texts)
    # the same bytes under two palettes are two pictures
    scores = []
    for palette in (range(256), range(255, -1, -1)):
        picture = Image.fromarray((ramp / 16).astype(np.uint8), "L").convert("P")
        picture.putpalette([value for value in palette for _ in range(3)])
        scores += scorer.score(picture, texts)
    assert scores[0] != scores[1]


def test_an_image_is_encoded_once(scorer, red, monkeypatch):
    encoded = []
    image = scorer.backend.image
    monkeypatch.setattr(scorer.backend, "image", lambda x: encoded.append(1) or image(x))
    blue = Image.new("RGB", (40, 50), "blue")
    first = scorer.score(red, ["a red square", "the image"])
    other = scorer.score(blue, ["a red square"])
    assert scorer.score(red.copy(), ["a red square"])[0] == pytest.approx(first[0], abs=1e-6)
    assert other[0] != first[0]
    assert len(encoded) == 2
    for shade in range(70):
        scorer.score(Image.new("RGB", (8, 8), (shade, 0, 0)), ["a"])
    assert len(encoded) == 72
    assert len(scorer._images) <= 64  # whatever the number of questions


def test_several_images_count_alike(open_clip_folder, red):
    scorer = ClipScorer.load(str(open_clip_folder))
    blue = Image.new("RGB", (40, 50), "blue")
    texts = ["a red square", "a blue square"]
    expected = [
        (a + b) / 2 for a, b in zip(*(scorer.score(x, texts) for x in (red, blue)), strict=True)
    ]
    assert mean_over_images(scorer, [red, blue], texts) == pytest.approx(expected, abs=1e-6)


def test_nan_is_passed_on(open_clip_folder, red):
    scorer = ClipScorer.load(str(open_clip_folder))
    with torch.no_grad():
        scorer.backend.model.text_projection.fill_(float("nan"))
    assert math.isnan(scorer.score(red, ["a red square"])[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local-dir:/nowhere", "holds neither open_clip_config.json nor config.json"),
        ("ViT-B-32", "write local-dir:FOLDER, hf-hub:OWNER/MODEL or ARCHITECTURE/PRETRAINED"),
        ("ViT-B-32/nobody", "scorer 'ViT-B-32/nobody' cannot be loaded"),
        ("folder/gone", "scorer 'folder/gone': there is no such folder, and open_clip has no"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ConfigError, match=message):
        ClipScorer.load(name)


def test_a_model_of_another_kind(tmp_path):
    BertModel(
        BertConfig(
            vocab_size=9,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    ).save_pretrained(tmp_path)
    word_tokenizer(12).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="BertModel is no CLIP or SigLIP"):
        ClipScorer.load(str(tmp_path))
