"""`rotary_attention` inside Qwen-VL models: equal to transformers in every mode."""

import copy
import sys

import pytest
import torch
from transformers import StaticCache

from clinkd import models
from clinkd.rotary import PRESETS, PositionConfig

TOLERANCE = 1e-4
layout = sys.modules["clinkd.models.layout"]


def close(actual, expected):
    assert actual.isfinite().all()
    assert (actual - expected).abs().max().item() < TOLERANCE


def fused(model, preset="mrope", attention="fused"):
    return models.apply(copy.deepcopy(model), PositionConfig(preset), attention=attention)


@pytest.fixture
def stock(build_model, family):
    return build_model(family)


def gradients(model, inputs, **more):
    model.train()
    model(**inputs, **more).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        close(found[name], grad)


def labelled(inputs):
    mask = inputs["attention_mask"]
    after_padding = torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0  # predicted by padding
    labels = inputs["input_ids"].masked_fill((mask == 0) | after_padding, -100)
    return inputs | {"labels": labels}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("side", ["right", "left", "none"])
def test_prefill(stock, make_batch, make_single, side, use_cache, calls):
    model = fused(stock)
    inputs = make_single(1) if side == "none" else make_batch(side)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found = model(**inputs, use_cache=use_cache).logits
        expected = stock(**inputs, use_cache=use_cache).logits
    close(found[real], expected[real])
    assert found.isfinite().all()
    # two blocks of the vision tower, two language layers
    assert calls == [(False, True)] * 2 + [(True, side != "none")] * 2


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mode", ["plain", "cache", "reentrant", "not reentrant"])
def test_gradients(stock, make_batch, side, mode):
    model = fused(stock)
    inputs = labelled(make_batch(side))
    if "reentrant" in mode:
        options = {"use_reentrant": mode == "reentrant"}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        if mode == "reentrant":  # as transformers' Trainer does
            model.enable_input_require_grads()
    found = gradients(model, inputs, use_cache=mode == "cache")
    same_gradients(found, gradients(stock, inputs, use_cache=False))


@pytest.mark.parametrize("attention", ["auto", "fused"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_reaches_nothing(build_model, make_batch, side, attention, monkeypatch):
    if attention == "auto":  # the rule of a GPU: right padding without a mask, by SDPA
        monkeypatch.setattr(layout, "is_faster", lambda device, needs_mask: needs_mask)
    model = fused(build_model("qwen2_vl"), attention=attention)
    inputs = make_batch(side)
    real = inputs["attention_mask"].bool()
    words = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    where, _ = model.model.get_rope_index(real.long(), **{k: v for k, v in inputs.items()})
    seen = []
    for filler in (0.0, 3.0):
        embeds = words.masked_fill(~real[..., None], filler).requires_grad_()
        out = model.model.language_model(
            inputs_embeds=embeds,
            position_ids=where,
            attention_mask=inputs["attention_mask"],
            use_cache=False,
        ).last_hidden_state
        assert out.isfinite().all()
        out[real].square().sum().backward()
        assert (embeds.grad[~real] == 0).all()
        seen.append((out[real], embeds.grad[real]))
    for a, b in zip(*seen, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("attention", ["auto", "fused"])
def test_cached_decoding(stock, make_batch, beams, attention):
    inputs = make_batch("left")
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True)
    settings |= dict(num_beams=beams, num_return_sequences=beams, return_dict_in_generate=True)
    expected = stock.generate(**inputs, **settings)
    found = fused(stock, attention=attention).generate(**inputs, **settings)
    assert torch.equal(found.sequences, expected.sequences)
    for a, b in zip(found.logits, expected.logits, strict=True):
        close(a, b)


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_cache_holds_rotated_keys(stock, make_batch, side):
    inputs = make_batch(side)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        found = fused(stock)(**inputs, use_cache=True).past_key_values
        expected = stock(**inputs, use_cache=True).past_key_values
    for a, b in zip(found.layers, expected.layers, strict=True):
        close(a.keys.transpose(1, 2)[real], b.keys.transpose(1, 2)[real])
        close(a.values.transpose(1, 2)[real], b.values.transpose(1, 2)[real])


def test_a_static_cache_is_filled(build_model, make_single, calls):
    stock = build_model("qwen2_vl")
    inputs = make_single(0)
    logits = []
    for model in (stock, fused(stock)):
        past = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
        with torch.no_grad():
            first = model(**inputs, past_key_values=past, use_cache=True).logits
            length = inputs["input_ids"].shape[1]
            ones = torch.ones(1, length + 1, dtype=torch.long)
            then = model(
                input_ids=torch.tensor([[7]]),
                position_ids=torch.full((3, 1, 1), 9),
                attention_mask=ones,
                past_key_values=past,
            ).logits
        logits.append(torch.cat([first, then], dim=1))
    close(logits[1], logits[0])
    assert len(calls) == 4  # not in the step that follows


def pack(model, rows):
    lengths = [row["input_ids"].shape[1] for row in rows]
    ids = torch.cat([row["input_ids"] for row in rows], dim=1)
    segments = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))[None]
    grids = torch.cat([row["image_grid_thw"] for row in rows])
    return {
        "input_ids": ids,
        "position_ids": models.packed_position_ids(model, ids, segments, grids),
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
        "image_grid_thw": grids,
        "mm_token_type_ids": (ids == 10).int(),
    }


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_unpacked(build_model, make_single, family, preset, checkpointing, calls):
    model = fused(build_model(family), preset)
    rows = [make_single(0), make_single(1), make_single(0)]
    inputs = pack(model, rows)
    alone = []
    model.zero_grad()
    for row in rows:
        logits = model(**row, use_cache=False).logits
        logits.square().sum().backward()
        alone.append(logits.detach())
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if checkpointing:  # which turns the cache off
        model.train().gradient_checkpointing_enable()
    calls.clear()
    found = model(**inputs, use_cache=None if checkpointing else False).logits
    assert calls[-2:] == [(True, True)] * 2
    close(found, torch.cat(alone, dim=1))
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        size = expected[name].abs().max().clamp(min=1)
        close(parameter.grad / size, expected[name] / size)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_packed_rows_need_no_word_of_the_cache(family, build_model, make_single, attention):
    """transformers keeps one by default, and does not look for borders then."""
    model = models.apply(build_model(family), PositionConfig("warm"), attention=attention)
    rows = [make_single(0), make_single(1)]
    with torch.no_grad():
        alone = [model(**row).logits for row in rows]
        close(model(**pack(model, rows)).logits, torch.cat(alone, dim=1))


def test_packed_rows_of_a_batch(build_model):
    """Two rows of text, cut at unlike places; the stock model sees the same borders."""
    stock = build_model("qwen2_vl")
    ids = torch.randint(14, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    index = torch.stack([torch.arange(12) % 5, torch.arange(12) % 8])
    inputs = {"input_ids": ids, "position_ids": index.expand(4, -1, -1), "use_cache": False}
    with torch.no_grad():
        close(fused(stock)(**inputs).logits, stock(**inputs).logits)


@pytest.mark.parametrize("attention", ["auto", "fused"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_sliding_windows(build_model, side, attention, monkeypatch):
    monkeypatch.setattr(layout, "is_faster", lambda device, needs_mask: needs_mask)
    stock = build_model("qwen2_vl", window=6)
    ids = torch.randint(14, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, slice(15, None) if side == "right" else slice(0, 5)] = 0
    real = mask.bool()
    with torch.no_grad():
        expected = stock(input_ids=ids, attention_mask=mask).logits
        found = fused(stock, attention=attention)(input_ids=ids, attention_mask=mask).logits
    close(found[real], expected[real])


@pytest.mark.parametrize("side", ["right", "left"])
def test_rule_of_a_gpu(stock, make_batch, side, monkeypatch, calls):
    """Right padding takes SDPA without a mask, left padding the op."""
    monkeypatch.setattr(layout, "is_faster", lambda device, needs_mask: needs_mask)
    model = fused(stock, attention="auto")
    inputs = labelled(make_batch(side))
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        close(model(**inputs).logits[real], stock(**inputs).logits[real])
    assert len(calls) == (2 if side == "right" else 4)
    same_gradients(gradients(model, inputs), gradients(stock, inputs))


@pytest.mark.parametrize("packed", [False, True])
def test_no_square_mask(build_model, packed):
    """A mask of three rows of 1,024 tokens would be 3 MiB; torch has a buffer of 2."""
    model = fused(build_model("qwen2_vl"), attention="auto")
    ids = torch.randint(14, 60, (3, 1024), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "use_cache": False}
    if packed:
        inputs["position_ids"] = (torch.arange(1024) % 100).expand(4, 3, -1)
    else:
        inputs["attention_mask"] = (torch.arange(1024) > torch.tensor([[5], [-1], [-1]])).long()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        model.model(**inputs).last_hidden_state.sum().backward()
    assert max(e.self_cpu_memory_usage for e in profile.events()) < 3 << 20


def test_autocast(stock, make_batch):
    """The norms of Qwen3-VL give float32 queries beside bfloat16 values."""
    inputs = make_batch("left")
    real = inputs["attention_mask"].bool()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = fused(stock)(**inputs).logits[real].float()
        expected = stock(**inputs).logits[real].float()
    exact = stock(**inputs).logits[real].detach()
    assert (found - exact).abs().max() <= 2 * (expected - exact).abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["left", "right", "cache", "packed"])
def test_triton_in_a_model(stock, make_batch, make_single, mode, monkeypatch):
    """The kernels themselves, in the interpreter."""
    ops = sys.modules["clinkd.ops.rotary_attention"]
    if reason := ops.why_not("triton", torch.device("cpu"), torch.float32):
        pytest.skip(reason)
    model = fused(stock)
    if mode == "packed":
        inputs = pack(model, [make_single(0), make_single(1)])
        inputs["labels"] = inputs["input_ids"]
    else:
        inputs = labelled(make_batch("left" if mode == "left" else "right"))
    expected = gradients(stock, inputs, use_cache=False)
    monkeypatch.setattr(ops, "native_impl", lambda device: "triton")
    same_gradients(gradients(model, inputs, use_cache=mode == "cache"), expected)
