"""The search gives what transformers' beam search gives, token for token."""

import pytest
import torch
from conftest_generate import (
    VOCABULARY,
    make_model,
    make_other,
    requests_of,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from clinkd.generate import BeamSearcher
from clinkd.generate.cache import PrefixCache
from clinkd.generate.hypotheses import Hypotheses, Rules
from clinkd.models import apply
from clinkd.rotary import PositionConfig


def by_transformers(model, request, **settings):
    """transformers' own answer to one request, prompt cut off: tokens and scores."""
    ids = torch.tensor([request["input_ids"]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
    }
    for name in ("pixel_values", "image_grid_thw"):
        if name in request:
            inputs[name] = request[name]
    out = model.generate(
        **inputs, do_sample=False, return_dict_in_generate=True, output_scores=True, **settings
    )
    stops = model.generation_config.eos_token_id
    rows = []
    for row in out.sequences[:, ids.shape[1] :].tolist():
        ends = [i for i, token in enumerate(row) if token in stops]
        rows.append(row[: ends[0] + 1] if ends else row)
    return rows, getattr(out, "sequences_scores", None)


def compare(model, requests, *, beams, samples, tokens=10, **settings):
    ours = BeamSearcher(
        model, None, beams, samples, tokens, batch_size=settings.pop("batch_size", 3), **settings
    ).generate(requests)
    for request, result in zip(requests, ours, strict=True):
        tokens_, scores = by_transformers(
            model,
            request,
            num_beams=beams,
            num_return_sequences=samples,
            max_new_tokens=tokens,
            **settings,
        )
        assert [c.token_ids for c in result.candidates] == tokens_
        if scores is not None:
            found = torch.tensor([c.score for c in result.candidates])
            torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("beams", [2, 3, 5])
def test_equals_transformers(model, beams):
    compare(model, requests_of(beams), beams=beams, samples=beams)


@pytest.mark.parametrize("early_stopping", [True, "never"])
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0, -1.0])
def test_stopping_rules(early_stopping, length_penalty):
    model = make_model(seed=3, stops=4, scale=0.3)  # flat distributions: stop tokens are likely
    compare(
        model,
        requests_of(11, count=4),
        beams=3,
        samples=2,
        early_stopping=early_stopping,
        length_penalty=length_penalty,
    )


def test_minimum_length():
    model = make_model(seed=5, stops=6, scale=0.2)
    compare(model, requests_of(5, count=4), beams=3, samples=3, min_new_tokens=4)


def test_greedy(model):
    compare(model, requests_of(8), beams=1, samples=1)


@pytest.mark.parametrize("preset", ["paper", "warm", "gap2"])
def test_with_other_positions(preset):
    model = apply(make_model(), PositionConfig(preset, pos_scale=(1.0, 1.0)))
    compare(model, requests_of(21, count=4), beams=3, samples=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(25))
def test_hundreds_of_prompts(seed):
    model = make_model(seed=seed, stops=1 + seed % 4, scale=0.2 + 0.2 * (seed % 5))
    compare(model, requests_of(100 + seed, count=10), beams=3, samples=3, tokens=8, batch_size=4)


def test_a_batch_answers_as_one_at_a_time(model):
    requests = requests_of(31, count=9)
    together = BeamSearcher(model, None, 3, 3, 8, batch_size=4).generate(requests)
    alone = [BeamSearcher(model, None, 3, 3, 8).generate([r])[0] for r in requests]
    for a, b in zip(together, alone, strict=True):
        assert a.id == b.id
        assert [c.token_ids for c in a.candidates] == [c.token_ids for c in b.candidates]


def test_log_probabilities_are_the_models(model):
    request = requests_of(41, count=1, images=(1,))[0]
    (result,) = BeamSearcher(model, None, 3, 3, 6).generate([request])
    for candidate in result.candidates:
        ids = torch.tensor([request["input_ids"] + candidate.token_ids])
        logits = model(
            input_ids=ids,
            mm_token_type_ids=(ids == model.config.image_token_id).int(),
            pixel_values=request["pixel_values"],
            image_grid_thw=request["image_grid_thw"],
        ).logits
        start = len(request["input_ids"]) - 1
        chances = torch.log_softmax(logits[0, start:-1], -1)
        expected = chances.gather(1, torch.tensor(candidate.token_ids)[:, None]).squeeze(1)
        torch.testing.assert_close(
            torch.tensor(candidate.log_probs), expected, rtol=1e-3, atol=1e-3
        )
        assert candidate.score == pytest.approx(sum(candidate.log_probs) / len(candidate.log_probs))


def test_samples_are_reproducible_and_differ(model):
    requests = requests_of(51, count=3)

    def sample(seed, batch_size):
        searcher = BeamSearcher(
            model, None, 1, 4, 8, do_sample=True, temperature=2.0, seed=seed, batch_size=batch_size
        )
        return [[c.token_ids for c in r.candidates] for r in searcher.generate(requests)]

    assert sample(0, 3) == sample(0, 1)
    assert sample(0, 3) != sample(1, 3)
    assert len({tuple(t) for t in sample(0, 3)[0]}) > 1


def test_diverse_groups_differ_at_the_first_step(model):
    (result,) = BeamSearcher(
        model, None, 4, 4, 6, num_beam_groups=4, diversity_penalty=1e4
    ).generate(requests_of(61, count=1))
    assert len({c.token_ids[0] for c in result.candidates}) == 4


def test_equals_a_left_padded_batch_of_transformers(model):
    requests = requests_of(81, count=4, images=(1, 2))
    longest = max(len(r["input_ids"]) for r in requests)
    ids = torch.tensor([[0] * (longest - len(r["input_ids"])) + r["input_ids"] for r in requests])
    pads = torch.tensor([longest - len(r["input_ids"]) for r in requests])
    assert pads.max() > 0
    out = model.generate(
        input_ids=ids,
        attention_mask=(torch.arange(longest) >= pads[:, None]).long(),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=torch.cat([r["pixel_values"] for r in requests]),
        image_grid_thw=torch.cat([r["image_grid_thw"] for r in requests]),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=8,
        do_sample=False,
    )[:, longest:]
    results = BeamSearcher(model, None, 3, 3, 8).generate(requests)
    ours = [c.token_ids for r in results for c in r.candidates]
    for tokens, row in zip(ours, out.tolist(), strict=True):
        assert row[: len(tokens)] == tokens
        assert set(row[len(tokens) :]) <= {0}  # padding behind the stop token


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("preset", [None, "warm", "mrope"])
def test_other_families(family, preset):
    model = make_other(family)
    if preset is not None:
        model = apply(model, PositionConfig(preset, pos_scale=(1.0, 1.0)))
    compare(model, requests_of(91, count=4), beams=3, samples=3)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("applied", [False, True])
def test_autocast(family, applied):
    model = make_model() if family == "qwen2_vl" else make_other(family)
    if applied:
        model = apply(model, PositionConfig("mrope"))
    searcher = BeamSearcher(model, None, 3, 1, 4)
    requests = requests_of(95, count=3)
    expected = searcher.generate(requests)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = searcher.generate(requests)
    for a, b in zip(found, expected, strict=True):
        assert a.candidates[0].score == pytest.approx(b.candidates[0].score, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torchs_default_dtype_does_not_matter(model, dtype):
    """Programs set it to make a model in it; scores and positions would round."""
    ids = torch.arange(400) % 70 + 5
    request = {"id": "long", "input_ids": ids}
    (expected,) = BeamSearcher(model, None, 3, 3, 4).generate([request])
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        (found,) = BeamSearcher(model, None, 3, 3, 4).generate([request])
    finally:
        torch.set_default_dtype(before)
    assert found == expected


def test_nothing_in_a_step_waits_for_the_device(model):
    """Fake tensors on a GPU know no values: whatever asked for one would raise."""
    rules = Rules(
        hypotheses=4,
        max_new_tokens=6,
        length_penalty=1.0,
        early_stopping=True,
        stop_ids=(1, 2),
        min_new_tokens=2,
        groups=2,
        diversity_penalty=0.5,
    )
    text = model.config.get_text_config()
    with FakeTensorMode(allow_non_fake_inputs=True):
        device = torch.device("cuda")
        with pytest.raises(DataDependentOutputException):
            bool(torch.zeros(2, device=device).any())
        search = Hypotheses(2, rules, device)
        cache = PrefixCache(2, 4, prefix=9, steps=6, device=device)
        for slot in range(2):
            keys = [torch.zeros(2, 9, 16, device=device)] * text.num_hidden_layers
            cache.admit(slot, keys, keys)
            search.admit(slot)
        parents, tokens, over = search.advance(torch.zeros(2, 4, VOCABULARY, device=device))
        cache.begin_step(parents)
        query, key = (torch.zeros(8, heads, 1, 16, device=device) for heads in (4, 2))
        cache.update(key, key, 0)
        assert cache.attend(query, 0, 0.25).shape == (8, 1, 4, 16)
        assert over.device.type == tokens.device.type == "cuda"


def test_slots_are_taken_up_again(model, monkeypatch):
    """Prompts enter as soon as others leave, and no question changes by it."""
    sharp = make_model(seed=3, stops=40, scale=0.3)  # answers end early, at different steps
    entered = []
    admit = PrefixCache.admit
    monkeypatch.setattr(
        PrefixCache, "admit", lambda self, slot, *kv: (entered.append(slot), admit(self, slot, *kv))
    )
    compare(sharp, requests_of(12, count=12), beams=3, samples=3, batch_size=4)
    assert entered[:4] == [0, 1, 2, 3]
    assert len(entered) == 12
    assert set(entered[4:]) <= {0, 1, 2, 3}


def test_prompt_is_stored_once(model):
    keys = [torch.randn(2, 30, 16) for _ in range(2)]
    cache = PrefixCache(1, 3, prefix=30, steps=4, device=torch.device("cpu"))
    cache.admit(0, keys, keys)
    assert cache.prefix_bytes == 2 * 2 * 2 * 30 * 16 * 4  # layers, k and v, heads, P, D, fp32
    places = 30 + 3 * 4
    assert cache.nbytes == 2 * 2 * 2 * places * 16 * 4  # layers, k and v, heads, places, D, fp32


def test_a_prompt_whose_scores_are_nan_fails_alone():
    model = make_model()
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[77] = float("nan")
    prompts = [[5, 6, 7], [5, 77, 7], [8, 6, 7]]
    requests = [{"id": str(ids), "input_ids": ids} for ids in prompts]
    for settings in ({}, {"do_sample": True}):
        results = BeamSearcher(model, None, 2, 2, 5, **settings).generate(requests)
        assert [len(r.candidates) for r in results] == [2, 0, 2]
        assert "scores are not finite" in results[1].error
