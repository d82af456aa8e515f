"""What a searcher refuses: settings, and requests, each for itself."""

import numpy as np
import pytest
import torch
from conftest_generate import IMAGE_TOKEN, make_model, requests_of
from PIL import Image
from transformers import Qwen2VLForConditionalGeneration

from clinkd.generate import BeamSearcher, inputs
from clinkd.models import apply
from clinkd.rotary import PositionConfig


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": list(range(2, 80)) * 7}, "exceed the model's context of 512"),
        ({"image_grid_thw": torch.tensor([[1, 2, 2]])}, "image tokens, its images make 1"),
        ({"input_ids": []}, "prompt is empty"),
        ({"input_ids": [[5, 6], [7, 8]]}, "must be one prompt, got shape (2, 2)"),
        ({"pixel_values": torch.zeros(3, 1176)}, "pixel_values hold 3 patches"),
        ({"input_ids": [5, 91, 6]}, "has a video"),
        ({"input_ids": [5, 120]}, "input_ids must be 0 to 119"),
    ],
)
def test_a_bad_request_fails_alone(model, change, message):
    good = requests_of(71, count=2, images=(1,))
    bad = {k: v for k, v in good[0].items() if "input_ids" not in change or k == "id"} | change
    bad["id"] = "bad"
    results = BeamSearcher(model, None, 3, 3, 5).generate([good[0], bad, good[1]])
    assert message in results[1].error
    assert results[1].candidates == []
    assert all(len(r.candidates) == 3 and r.error is None for r in (results[0], results[2]))


def test_an_image_without_a_place_fails_alone():
    """One row of 20 patches would begin before the text in front of it."""
    model = apply(make_model(), PositionConfig("warm"))
    good = requests_of(71, count=2, images=(1,))
    ids = [5, *[IMAGE_TOKEN] * 20, 6]
    thin = {"id": "thin", "input_ids": ids, "pixel_values": torch.zeros(80, 1176)}
    thin["image_grid_thw"] = torch.tensor([[1, 2, 40]])
    results = BeamSearcher(model, None, 3, 3, 5).generate([good[0], thin, good[1]])
    assert "pos_scale (2.0, 2.0) puts patches of a 1 by 20 image before" in results[1].error
    assert all(len(r.candidates) == 3 for r in (results[0], results[2]))


def test_a_prompt_beyond_a_sliding_window_fails_alone(model):
    """The shared prefix is seen whole, which layers with windows have not learnt."""
    config = make_model().config
    config.text_config.use_sliding_window = True
    config.text_config.sliding_window = 20
    config.text_config.layer_types = ["full_attention", "sliding_attention"]
    windowed = Qwen2VLForConditionalGeneration(config).eval()
    windowed.load_state_dict(model.state_dict())
    requests = [{"id": str(n), "input_ids": list(range(2, 2 + n))} for n in (15, 16)]
    inside, beyond = BeamSearcher(windowed, None, 3, 3, 5).generate(requests)
    assert "16 tokens and 5 new ones exceed the window of 20" in beyond.error
    (expected, _) = BeamSearcher(model, None, 3, 3, 5, stop_ids=[]).generate(requests)
    assert [c.token_ids for c in inside.candidates] == [c.token_ids for c in expected.candidates]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 17}, "num_beams must be 1 to 16, got 17"),
        ({"num_beams": 2, "num_samples": 3}, "num_samples must be 1 to 2, got 3"),
        ({"num_beams": 3, "num_beam_groups": 2}, "num_beam_groups must divide"),
        ({"num_beam_groups": 0}, "num_beam_groups must divide"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"batch_size": 0}, "batch_size must be 1 to"),
        ({"early_stopping": "Never"}, "early_stopping must be False, True or 'never'"),
    ],
)
def test_settings_are_checked(model, settings, message):
    with pytest.raises(ValueError, match=message):
        BeamSearcher(model, None, **settings)


def test_a_question_that_is_no_text_fails_alone(demo, processor):
    requests = [{"question": "What is this?"}, {"question": None}]
    good, bad = BeamSearcher(demo, processor, 2, 2, 3).generate(requests)
    assert good.error is None
    assert bad.error == "question must be a text, got None"


@pytest.mark.parametrize("question", ["", " \n"])
def test_an_empty_question_fails_alone(demo, processor, question):
    requests = [{"question": "What is this?"}, {"question": question}]
    good, bad = BeamSearcher(demo, processor, 2, 2, 3).generate(requests)
    assert good.error is None
    assert bad.error == "question must not be empty"


def test_no_processor(model):
    (result,) = BeamSearcher(model, None).generate([{"id": "a", "question": "what?"}])
    assert "needs a processor" in result.error


def test_sixteen_bits_of_grey_are_stretched_not_clipped(monkeypatch):
    """PIL's own way to RGB makes white of all above 255."""
    seen = []

    def encode(processor, turns, images, system):
        seen.extend(images)
        raise ValueError("enough")

    monkeypatch.setattr(inputs, "encode_prompt", encode)
    grey = Image.fromarray(np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8))
    searcher = BeamSearcher(make_model(), object(), 1, 1, 2, stop_ids=[1])
    (result,) = searcher.generate([{"id": "a", "image": grey, "question": "?"}])
    assert result.error == "enough"
    values = np.asarray(seen[0])
    assert values.shape == (8, 8, 3)
    assert (values[..., 0].min(), values[..., 0].max()) == (0, 255)
    assert len(np.unique(values)) == 64
