"""Positions inside Qwen-VL models: equal to transformers where they must be, in every mode."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

from clinkd import models
from clinkd.errors import ConfigError
from clinkd.rotary import PRESETS, PositionConfig

TOLERANCE = 1e-4
IMPLS = ("auto", "reference", "eager")


def close(actual, expected):
    assert (actual - expected).abs().max().item() < TOLERANCE


def generate(model, inputs, **more):
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return model.generate(
        **inputs, **settings, **more, return_dict_in_generate=True, output_logits=True
    )


@pytest.fixture
def stock(build_model, family):
    return build_model(family)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", ["right", "left"])
def test_mrope_prefill_equals_transformers(stock, make_batch, side, impl):
    model = models.apply(copy.deepcopy(stock), PositionConfig("mrope"), impl)
    inputs = make_batch(side)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        close(model(**inputs).logits[real], stock(**inputs).logits[real])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_mrope_gradients_equal_transformers(stock, make_batch, checkpointing):
    model = models.apply(copy.deepcopy(stock), PositionConfig("mrope"))
    inputs = make_batch()
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for each in (stock, model):
        each.train()
        if checkpointing and each is model:
            each.gradient_checkpointing_enable()
        each(**inputs, use_cache=False).loss.backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        close(found[name], grad)


@pytest.mark.parametrize("beams", [1, 3])
def test_mrope_cached_decoding_equals_transformers(stock, make_batch, beams):
    model = models.apply(copy.deepcopy(stock), PositionConfig("mrope"))
    inputs = make_batch("left")
    expected = generate(stock, inputs, num_beams=beams, num_return_sequences=beams)
    found = generate(model, inputs, num_beams=beams, num_return_sequences=beams)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        close(a, b)


def test_mrope_with_a_video_equals_transformers(stock):
    ids = torch.tensor([[5, 12] + [11] * 12 + [13, 7, 8]])
    if stock.config.model_type == "qwen3_vl":  # frames stand apart, with their times between
        ids = torch.tensor([[5, 12] + [11] * 6 + [13, 6, 12] + [11] * 6 + [13, 7, 8]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 11).int() * 2,
        "video_grid_thw": torch.tensor([[2, 4, 6]]),
        "pixel_values_videos": torch.randn(48, 3 * 2 * 14 * 14),
    }
    with torch.no_grad():
        expected = stock(**inputs).logits
        close(
            models.apply(copy.deepcopy(stock), PositionConfig("mrope"))(**inputs).logits, expected
        )
    with pytest.raises(ConfigError, match="have no rule for videos"):
        models.apply(stock, PositionConfig("warm"))(**inputs)


def test_a_video_in_a_packed_row_is_refused(build_model):
    """Its tokens would be placed as if they were words."""
    model = models.apply(build_model("qwen2_vl"), PositionConfig("mrope"))
    ids = torch.tensor([[5, 12, 11, 11, 13, 7]])
    with pytest.raises(ConfigError, match="packed rows have no rule for videos"):
        models.packed_position_ids(model, ids, torch.zeros_like(ids))


def test_warm_leaves_text_bit_identical(stock):
    ids = torch.randint(14, 60, (2, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stock(input_ids=ids).logits
        warm = models.apply(copy.deepcopy(stock), PositionConfig("warm"), "eager")
        assert torch.equal(warm(input_ids=ids).logits, expected)
        for impl in ("auto", "reference"):
            mrope = models.apply(copy.deepcopy(stock), PositionConfig("mrope"), impl)
            warm = models.apply(copy.deepcopy(stock), PositionConfig("warm"), impl)
            assert torch.equal(warm(input_ids=ids).logits, mrope(input_ids=ids).logits)


def test_presets_differ_where_there_is_an_image(build_model, make_single):
    inputs = make_single(1)
    with torch.no_grad():
        logits = [
            models.apply(build_model("qwen2_vl"), PositionConfig(preset))(**inputs).logits
            for preset in PRESETS
        ]
        logits.append(
            models.apply(build_model("qwen2_vl"), PositionConfig("warm", (1.0, 1.0)))(
                **inputs
            ).logits
        )
    for i, a in enumerate(logits):
        for b in logits[:i]:
            assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_cached_decoding_equals_one_pass(build_model, make_batch, family, preset):
    model = models.apply(build_model(family), PositionConfig(preset))
    inputs = make_batch("left")
    found = generate(model, inputs, suppress_tokens=[10, 11])
    new = found.sequences.shape[1] - inputs["input_ids"].shape[1]
    grown = dict(inputs, input_ids=found.sequences)
    ones = torch.ones(2, new, dtype=torch.long)
    grown["attention_mask"] = torch.cat([inputs["attention_mask"], ones], dim=1)
    grown["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, new))
    with torch.no_grad():
        expected = model(**grown).logits[:, -new - 1 : -1]
    close(torch.stack(found.logits, dim=1), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_forward_continues_from_a_cache(build_model, make_batch, preset):
    model = models.apply(build_model("qwen2_vl"), PositionConfig(preset))
    inputs = make_batch("left")
    with torch.no_grad():
        expected = model(**inputs).logits[:, -3:]
        cut = dict(inputs, **{k: inputs[k][:, :-3] for k in ("input_ids", "mm_token_type_ids")})
        cut["attention_mask"] = inputs["attention_mask"][:, :-3]
        start = model(**cut, use_cache=True)
        found = model(
            input_ids=inputs["input_ids"][:, -3:],
            attention_mask=inputs["attention_mask"],
            past_key_values=start.past_key_values,
        ).logits
    close(found, expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_packed_equals_unpacked(build_model, make_batch, make_single, family, preset):
    model = models.apply(build_model(family), PositionConfig(preset))
    rows = [make_single(0), make_single(1)]
    lengths = [row["input_ids"].shape[1] for row in rows]
    ids = torch.cat([row["input_ids"] for row in rows], dim=1)
    segments = torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor(lengths))[None]
    grids = torch.cat([row["image_grid_thw"] for row in rows])
    pixels = torch.cat([row["pixel_values"] for row in rows])
    positions = models.packed_position_ids(model, ids, segments, grids)
    with torch.no_grad():
        packed = model(
            input_ids=ids,
            position_ids=positions,
            pixel_values=pixels,
            image_grid_thw=grids,
            mm_token_type_ids=(ids == 10).int(),
            use_cache=False,
        ).logits
        alone = [model(**row).logits for row in rows]
    close(packed, torch.cat(alone, dim=1))


@pytest.mark.parametrize("preset", PRESETS)
def test_round_trip_through_a_folder(build_model, make_single, family, preset, tmp_path):
    config = PositionConfig(preset, (1.5, 2.0))
    model = models.apply(build_model(family), config)
    model.save_pretrained(tmp_path)
    again = models.load(tmp_path, positions=PositionConfig("warm" if preset != "warm" else "mrope"))
    assert models.positions_of(again.config) == config
    with torch.no_grad():
        assert torch.equal(again(**make_single(1)).logits, model(**make_single(1)).logits)


def test_load_without_saved_positions(build_model, tmp_path):
    build_model("qwen2_vl").save_pretrained(tmp_path)
    assert models.positions_of(models.load(tmp_path).config) == PositionConfig("mrope")
    gap = PositionConfig("gap2")
    assert models.positions_of(models.load(tmp_path, positions=gap).config) == gap


def test_positions_come_from_where_the_weights_do(build_model, make_single, tmp_path):
    """A hub name has revisions, a repository subfolders."""
    gap = PositionConfig("gap2")
    model = models.apply(build_model("qwen2_vl"), gap)
    model.save_pretrained(tmp_path / "student")
    models.apply(copy.deepcopy(model), PositionConfig("mrope")).config.save_pretrained(tmp_path)
    again = models.load(tmp_path, subfolder="student")
    assert models.positions_of(again.config) == gap
    with torch.no_grad():
        assert torch.equal(again(**make_single(1)).logits, model(**make_single(1)).logits)


def test_missing_weights_are_not_made_up(build_model, tmp_path):
    build_model("qwen2_vl").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"1 tensors are missing, such as .*up_proj\.weight"):
        models.load(tmp_path)


def test_apply_again_and_restore(stock, make_single):
    inputs = make_single(0)
    with torch.no_grad():
        expected = stock(**inputs).logits
        paper = models.apply(copy.deepcopy(stock), PositionConfig("paper"))
        wanted = paper(**inputs).logits
        model = models.apply(stock, PositionConfig("gap2"))
        assert torch.equal(models.apply(model, PositionConfig("paper"))(**inputs).logits, wanted)
        assert torch.equal(models.restore(model)(**inputs).logits, expected)
        assert models.positions_of(model.config) is None
        assert not hasattr(model.model.language_model.layers[0].self_attn, "rotary")


def test_state_dict_keeps_its_keys(stock):
    before = list(stock.state_dict())
    assert list(models.apply(stock, PositionConfig("paper")).state_dict()) == before


def test_bfloat16_keeps_positions_exact(build_model, make_single):
    model = models.apply(build_model("qwen2_vl"), PositionConfig("warm")).to(torch.bfloat16)
    inputs = dict(make_single(1))
    seen = []
    rotary = model.model.language_model.rotary_emb
    rotary.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(**inputs)
    exact, _ = model.model.get_rope_index(**inputs)
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], exact[1:])
    assert (exact % 1 == 0.5).any()
    with pytest.raises(TypeError, match="position_ids must be float32 or integers"):
        rotary(torch.zeros(1, 2, 64), torch.zeros(3, 1, 2, dtype=torch.bfloat16))


def test_errors(build_model):
    model = build_model("qwen2_vl")
    with pytest.raises(ConfigError, match="impl must be one of"):
        models.apply(model, PositionConfig(), impl="tpu")
    with pytest.raises(ConfigError, match="no interleaved layout"):
        models.apply(model, PositionConfig("paper"), impl="eager")
    model.config.text_config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ConfigError, match="rope_type 'dynamic' changes"):
        models.apply(model, PositionConfig("warm"))
    model.config.model_type = "llama"
    with pytest.raises(ConfigError, match="can be applied to qwen2_vl"):
        models.apply(model)


def test_a_model_saved_whole(stock, make_batch, tmp_path):
    model = models.apply(stock, PositionConfig("warm"))
    inputs = make_batch("right")
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_refused_model_is_left_as_it_was(stock, make_single):
    inputs = make_single(0)
    with torch.no_grad():
        expected = stock(**inputs).logits
        stock.model.visual.config.num_heads = 4  # heads of 8 components, too small for the op
        with pytest.raises(ValueError, match="head_dim must be even and from 16"):
            models.apply(stock, PositionConfig("warm"))
        assert torch.equal(stock(**inputs).logits, expected)
