"""Which attention `apply` puts into a model, and what happens where the op cannot run."""

import copy
import sys

import pytest
import torch
from transformers import StaticCache

from clinkd import models
from clinkd.errors import ConfigError
from clinkd.rotary import PositionConfig

layout = sys.modules["clinkd.models.layout"]


def close(actual, expected):
    assert actual.isfinite().all()
    assert (actual - expected).abs().max().item() < 1e-4


def fused(model, preset="mrope", attention="fused"):
    return models.apply(copy.deepcopy(model), PositionConfig(preset), attention=attention)


@pytest.mark.parametrize(
    ("device", "needs_mask", "expected"),
    [("cpu", False, True), ("cpu", True, True), ("cuda", True, True), ("cuda", False, False)],
)
def test_rule_of_auto(device, needs_mask, expected):
    assert layout.is_faster(device, needs_mask) is expected


def holes(inputs):
    mask = inputs["attention_mask"].clone()
    mask[:, 2] = 0
    return inputs | {"attention_mask": mask}


def square(inputs):
    length = inputs["input_ids"].shape[1]
    mask = torch.ones(length, length, dtype=torch.bool).tril().expand(1, 1, -1, -1)
    return inputs | {"attention_mask": mask}


@pytest.mark.parametrize(
    ("change", "message"),
    [(holes, "zeros between the tokens of a row"), (square, r"attention_mask is not \[B, S\]")],
)
def test_masks_of_another_kind(build_model, make_single, change, message, calls):
    """`fused` says why it cannot; `auto` leaves them to transformers."""
    stock = build_model("qwen2_vl")
    inputs = make_single(0)
    where, _ = stock.model.get_rope_index(**inputs)
    inputs = change(inputs) | {"position_ids": where}
    kept = inputs["attention_mask"].reshape(-1)[: where.shape[-1]].bool()
    if change is square:
        kept = torch.ones_like(kept)
    with torch.no_grad(), pytest.raises(RuntimeError, match=f"cannot run here: .*{message}"):
        fused(stock)(**inputs)
    calls.clear()
    with torch.no_grad():
        found = fused(stock, attention="auto")(**inputs).logits
        close(found[0, kept], stock(**inputs).logits[0, kept])
    assert calls == [(False, True)] * 2  # of the vision tower alone


def test_fused_runs_or_raises(build_model, make_single):
    stock = build_model("qwen2_vl")
    inputs = make_single(0)
    for impl in ("reference", "eager"):
        with pytest.raises(ConfigError, match="attention='fused' has kernels alone"):
            models.apply(stock, PositionConfig("mrope"), impl, attention="fused")
    with pytest.raises(ConfigError, match="attention must be one of auto, fused, sdpa"):
        models.apply(stock, PositionConfig("mrope"), attention="flash")
    model = fused(stock).train()
    model.config.text_config.attention_dropout = 0.1
    with pytest.raises(RuntimeError, match=r"no attention dropout, 0.1 is asked for"):
        model(**inputs)
    model.eval()(**inputs)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="attn_implementation is 'eager', not 'sdpa'"):
        model(**inputs)
    with torch.no_grad():
        auto = fused(stock, attention="auto")
        auto.set_attn_implementation("eager")
        close(auto(**inputs).logits, stock(**inputs).logits)


def test_applied_again_and_restored(build_model, make_single, calls):
    model = build_model("qwen2_vl")
    text = model.model.language_model
    for attention, hooks, runs in (("fused", 1, 4), ("auto", 1, 4), ("sdpa", 1, 0)):
        models.apply(model, PositionConfig("mrope"), attention=attention)
        again = copy.deepcopy(model)
        assert len(text._forward_pre_hooks) == hooks
        for each in (model, again):
            calls.clear()
            each(**make_single(0))
            assert len(calls) == runs
    models.restore(again)
    models.apply(model, PositionConfig("mrope"), attention="fused")
    models.restore(model)
    assert not text._forward_pre_hooks
    assert not hasattr(text, "attention")
    assert not hasattr(model.model.visual.blocks[0].attn, "attention")


def test_sdpa_steps_over_a_static_cache_in_one_graph(build_model):
    """The cache's length is a tensor, by which a graph cannot branch."""
    text = fused(build_model("qwen2_vl"), attention="sdpa").model.language_model

    def step(past, tokens, positions):
        given = {"inputs_embeds": tokens, "position_ids": positions, "past_key_values": past}
        return text(**given).last_hidden_state

    start = torch.ones(1, 9, 64), torch.arange(9).expand(3, 1, 9)
    following = torch.ones(1, 1, 64), torch.full((3, 1, 1), 9)
    found = []
    with torch.no_grad():
        for run in (step, torch.compile(step, backend="eager", fullgraph=True)):
            past = StaticCache(config=text.config, max_cache_len=16)
            step(past, *start)
            found.append(run(past, *following))
    close(*found)


def test_loaded_with_a_choice(build_model, make_single, tmp_path, calls):
    build_model("qwen2_vl").save_pretrained(tmp_path)
    models.load(tmp_path, attention="sdpa")(**make_single(0))
    assert not calls
    models.load(tmp_path, attention="fused")(**make_single(0))
    assert len(calls) == 4
