"""Positions: against the formulas written as loops, and against transformers."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.rotary import (
    gap_positions,
    mcg_positions,
    qwen_positions,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rotary.json").read_text())
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def mcg_by_loop(tokens, grids, scale):
    """Equations of the paper, one token after another. tokens: True at image tokens."""
    found, position, images = [], 0, iter(grids)
    i = 0
    while i < len(tokens):
        if not tokens[i]:
            found.append((position, position))
            position, i = position + 1, i + 1
            continue
        h, w = next(images)
        before = position - 1
        lambda1 = before + (w * h + 1 - scale[0] * (h + 1)) / 2
        lambda2 = before + (w * h + 1 - scale[1] * (w + 1)) / 2
        for v1 in range(1, h + 1):
            for v2 in range(1, w + 1):
                found.append((scale[0] * v1 + lambda1, scale[1] * v2 + lambda2))
        position, i = position + h * w, i + h * w
    return found, position


def qwen_by_loop(tokens, grids, gap):
    found, position, images = [], 0, iter(grids)
    i = 0
    while i < len(tokens):
        if not tokens[i]:
            found.append((position,) * 3)
            position, i = position + 1, i + 1
            continue
        h, w = next(images)
        start = position + gap
        found += [(start, start + y, start + x) for y in range(h) for x in range(w)]
        position, i = start + max(h, w) + gap, i + h * w
    return found, position


@st.composite
def rows(draw):
    """Token kinds and grids of several rows: text runs between images."""
    batch = []
    for _ in range(draw(st.integers(1, 3))):
        images = draw(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), max_size=3))
        tokens = [False] * draw(st.integers(0, 4))
        for h, w in images:
            tokens += [True] * (h * w) + [False] * draw(st.integers(0, 3))
        batch.append((tokens, images))
    return batch


def pad(batch, side):
    """Image mask, attention mask, grids."""
    length = max(1, *(len(tokens) for tokens, _ in batch)) + 1
    image = torch.zeros(len(batch), length, dtype=torch.bool)
    attention = torch.zeros(len(batch), length, dtype=torch.long)
    for i, (tokens, _) in enumerate(batch):
        start = 0 if side == "right" else length - len(tokens)
        image[i, start : start + len(tokens)] = torch.tensor(tokens, dtype=torch.bool)
        attention[i, start : start + len(tokens)] = 1
    return image, attention, [grids for _, grids in batch]


@settings(max_examples=60, deadline=None)
@given(batch=rows(), side=st.sampled_from(["left", "right"]), scale=st.sampled_from([0.5, 1.0]))
def test_mcg_equals_the_equations(batch, side, scale):
    image, attention, grids = pad(batch, side)
    positions, following = mcg_positions(
        image, grids, pos_scale=(scale, scale), attention_mask=attention
    )
    assert positions.dtype == torch.float32
    assert positions.shape == (2, *image.shape)
    for i, (tokens, images) in enumerate(batch):
        expected, after = mcg_by_loop(tokens, images, (scale, scale))
        found = positions[:, i, attention[i].bool()].T
        assert torch.equal(found, torch.tensor(expected, dtype=torch.float32).reshape(-1, 2))
        assert following[i] == after == len(tokens)
        assert not positions[:, i, ~attention[i].bool()].any()


@settings(max_examples=60, deadline=None)
@given(batch=rows(), side=st.sampled_from(["left", "right"]), gap=st.sampled_from([0, 1]))
def test_qwen_and_gap_equal_a_loop(batch, side, gap):
    image, attention, grids = pad(batch, side)
    build = gap_positions if gap else qwen_positions
    positions, following = build(image, grids, attention_mask=attention)
    for i, (tokens, images) in enumerate(batch):
        expected, after = qwen_by_loop(tokens, images, gap)
        found = positions[:, i, attention[i].bool()].T
        assert torch.equal(found, torch.tensor(expected, dtype=torch.float32).reshape(-1, 3))
        assert following[i] == after


@settings(max_examples=40, deadline=None)
@given(batch=rows(), rule=st.sampled_from([mcg_positions, qwen_positions, gap_positions]))
def test_packed_rows_restart(batch, rule):
    batch = [(tokens, grids) for tokens, grids in batch if tokens]
    more = {"pos_scale": (1.0, 1.0)} if rule is mcg_positions else {}
    joined = [token for tokens, _ in batch for token in tokens]
    if not joined:
        return
    segments = [i for i, (tokens, _) in enumerate(batch) for _ in tokens]
    positions, following = rule(
        torch.tensor([joined]),
        [[grid for _, grids in batch for grid in grids]],
        segments=torch.tensor([segments]),
        **more,
    )
    alone = [rule(torch.tensor([tokens]), [grids], **more) for tokens, grids in batch]
    assert torch.equal(positions, torch.cat([p for p, _ in alone], dim=2))
    assert following.item() == alone[-1][1].item()


def test_published_gap_of_two():
    """4 text, 2 x 2 image, 3 text: 0…3, 5…6, 8…, as the authors' code gives."""
    image = torch.tensor([[False] * 4 + [True] * 4 + [False] * 3])
    positions, _ = gap_positions(image, [[(2, 2)]])
    assert positions[1, 0].tolist() == [0, 1, 2, 3, 5, 5, 6, 6, 8, 9, 10]
    assert positions[2, 0].tolist() == [0, 1, 2, 3, 5, 6, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("n", [16, 17])
def test_lambda_is_an_integer_only_for_odd_areas(n):
    image = torch.ones(1, n * n, dtype=torch.bool)
    positions, following = mcg_positions(image, [[(n, n)]])
    whole = bool((positions % 1 == 0).all())
    assert whole == (n % 2 == 1)
    assert following.item() == n * n
    # the image lies in the middle of the room that it takes from the text: -1 to n * n
    middle = (positions[0].min() + positions[0].max()) / 2
    assert middle.item() == (-1 + n * n) / 2


def test_decoding_continues():
    image = torch.tensor([[False, True, True, True, True, False, False]])
    full, _ = mcg_positions(image, [[(2, 2)]])
    part, following = mcg_positions(image[:, :6], [[(2, 2)]])
    assert torch.equal(full[:, :, :6], part)
    assert full[0, 0, 6] == following


def test_negative_gap():
    image = torch.ones(1, 10, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"gap -3.5\): use at most \(1.222, inf\)"):
        mcg_positions(image, [[(10, 1)]])
    mcg_positions(image, [[(10, 1)]], pos_scale=(1.2, 2.0))


@pytest.mark.parametrize("scale", [(0.0, 1.0), (1.0, -1.0), (float("nan"), 1.0), (1.0,)])
def test_scales_that_are_none(scale):
    with pytest.raises(ValueError, match="pos_scale must be two finite numbers above 0"):
        mcg_positions(torch.ones(1, 4, dtype=torch.bool), [[(2, 2)]], pos_scale=scale)


def test_an_image_over_two_segments():
    image = torch.tensor([[False, True, True, True, True, False]])
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    with pytest.raises(ValueError, match="in one row and one segment"):
        mcg_positions(image, [[(2, 2)]], segments=segments)


def test_wrong_inputs():
    image = torch.tensor([[False, True, True, False]])
    with pytest.raises(TypeError, match="image_mask must be bool"):
        mcg_positions(image.int(), [[(1, 2)]])
    with pytest.raises(ValueError, match=r"image_mask must be \[B, S\]"):
        mcg_positions(image[0], [[(1, 2)]])
    with pytest.raises(ValueError, match="grids must have one list a row, 1, got 2"):
        mcg_positions(image, [[(1, 2)], []])
    with pytest.raises(ValueError, match=r"grids\[0\] must cover .* 4 patches for 2 tokens"):
        mcg_positions(image, [[(2, 2)]])
    with pytest.raises(ValueError, match=r"grids\[0\] must cover .* 0 patches for 2 tokens"):
        mcg_positions(image, [[]])
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, S\]"):
        mcg_positions(image, [[(1, 2)]], attention_mask=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"segments must be \[B, S\]"):
        mcg_positions(image, [[(1, 2)]], segments=torch.ones(2, 4))
    torn = torch.tensor([[True, False, True, False]])
    with pytest.raises(ValueError, match="tokens of each image together"):
        mcg_positions(torn, [[(1, 2)]])
    with pytest.raises(ValueError, match="at least 1 by 1"):
        mcg_positions(torch.zeros(1, 4, dtype=torch.bool), [[(0, 2)]])


def test_empty_rows():
    positions, following = mcg_positions(torch.zeros(2, 0, dtype=torch.bool), [[], []])
    assert positions.shape == (2, 2, 0)
    assert following.tolist() == [0, 0]


# against transformers


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_equal_transformers(family, side):
    golden = GOLDEN["index"][family][side]
    attention = torch.tensor(golden["attention_mask"])
    grids = [tuple(grid) for grid in GOLDEN["grids"]]
    positions, following = qwen_positions(
        torch.tensor(golden["image_mask"]).bool(),
        [grids[:1], grids[1:3], grids[3:], []],
        attention_mask=attention,
    )
    assert positions.tolist() == golden["positions"]
    assert (following - attention.sum(1)).tolist() == golden["deltas"]
