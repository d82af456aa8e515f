"""Specs and positions: against the formulas written as loops, and against transformers."""

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.errors import ConfigError
from clinkd.ops.reference.rotary import angles
from clinkd.rotary import (
    PRESETS,
    PositionConfig,
    RotarySpec,
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


@pytest.mark.parametrize(
    ("family", "spec"),
    [
        ("qwen2_vl", RotarySpec.mrope(128)),
        ("qwen2_5_vl", RotarySpec.mrope(128, (16, 24, 24))),
        ("qwen3_vl", RotarySpec.mrope(128, (24, 20, 20), 5e6, interleaved=True)),
    ],
)
def test_mrope_equals_transformers(family, spec):
    places = torch.tensor(GOLDEN["places"], dtype=torch.float32).T  # [3, tokens]
    _compare(spec, places, GOLDEN["text"][family])
    assert spec.pair_stride == 64


def test_axial_equals_the_vision_tower():
    _compare(
        RotarySpec.axial(80),
        torch.tensor(GOLDEN["patches"], dtype=torch.float32).T,
        GOLDEN["vision"],
    )


def _compare(spec, positions, golden):
    cos, sin = angles(positions, spec, torch.float32)
    # a float32 angle is off by up to its own rounding, which grows with the position
    allowed = 2e-7 * (1 + positions.abs().max(0).values)[:, None]
    for found, name in ((cos, "cos"), (sin, "sin")):
        assert ((found - torch.tensor(golden[name])).abs() <= allowed).all()


# specs


def test_split_has_two_ladders_from_one():
    spec = RotarySpec.split(16, height_dim=6)
    assert spec.axis == (0, 0, 0, 1, 1, 1, 1, 1)
    assert spec.inv_freq[0] == spec.inv_freq[3] == 1.0
    assert spec.inv_freq[1] == pytest.approx(10000 ** (-2 / 6))
    assert spec.inv_freq[4] == pytest.approx(10000 ** (-2 / 10))
    assert spec.pair_stride == 1
    assert RotarySpec.split(16, layout="half").pair_stride == 4


def test_alternate_is_one_ladder():
    spec = RotarySpec.alternate(16)
    assert spec.axis == (0, 1) * 4
    assert spec.inv_freq == RotarySpec.rope(16).inv_freq
    assert spec.pair_stride == RotarySpec.rope(16).pair_stride == 8


def test_partial_rope():
    spec = RotarySpec.rope(32, rotary_dim=12)
    assert spec.pairs == spec.pair_stride == 6
    assert spec.inv_freq[1] == pytest.approx(10000 ** (-2 / 12))


def test_interleaved_sections():
    spec = RotarySpec.mrope(16, (4, 2, 2), interleaved=True)
    assert spec.axis == (0, 1, 2, 0, 1, 2, 0, 0)


def test_specs_come_out_of_a_pickle_known():
    """Another process has not made them: the ops find a spec by its key."""
    code = (
        "import pickle, sys; from clinkd.rotary import RotarySpec;"
        "spec = pickle.loads(sys.stdin.buffer.read());"
        "assert RotarySpec.known[spec.key] == spec"
    )
    given = pickle.dumps(RotarySpec.rope(32, base=777.0))
    subprocess.run([sys.executable, "-c", code], input=given, check=True)


def test_specs_of_tensors_of_numbers():
    """The key is made of the numbers, not of how a tensor writes them: 1.2345e-03."""
    specs = [
        RotarySpec(32, tuple(torch.zeros(16).int()), tuple(torch.full((16,), speed)), 16)
        for speed in (0.001, 0.001 + 1e-8)
    ]
    assert specs[0].key != specs[1].key
    assert specs[0] == RotarySpec(32, (0,) * 16, (torch.tensor(0.001).item(),) * 16, 16)


def test_specs_are_values():
    a, b = RotarySpec.split(64), RotarySpec.split(64)
    assert a == b
    assert hash(a) == hash(b)
    assert a.key == b.key != RotarySpec.split(64, base=1e4 + 1).key
    assert RotarySpec.known[a.key] == a
    assert 0 <= a.key < 2**63


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RotarySpec.split(32, height_dim=32), "height_dim must be even and between"),
        (lambda: RotarySpec.split(32, height_dim=12, layout="half"), "height_dim must be head_dim"),
        (lambda: RotarySpec.split(32, layout="both"), "layout must be 'interleaved' or 'half'"),
        (lambda: RotarySpec.rope(32, layout="both"), "layout must be 'interleaved' or 'half'"),
        (lambda: RotarySpec.rope(32, rotary_dim=34), "rotary_dim must be even"),
        (lambda: RotarySpec.rope(258), "head_dim must be even and from 16 to 256, got 258"),
        (lambda: RotarySpec.rope(15), "head_dim must be even"),
        (lambda: RotarySpec.split(15), "head_dim must be even"),
        (lambda: RotarySpec.rope(32, base=0.0), "base must be a finite number above 0"),
        (lambda: RotarySpec.rope(32, base=float("inf")), "base must be a finite number above 0"),
        (lambda: RotarySpec.mrope(32, (20, -2, -2)), "sections must be three numbers, none below"),
        (lambda: RotarySpec.mrope(32), "sections must be three numbers"),
        (lambda: RotarySpec.axial(30), "head_dim must be a multiple of 4"),
        (lambda: RotarySpec(16, (0,), (1.0, 2.0), 1), "inv_freq must have one speed a pair"),
        (lambda: RotarySpec(16, (0,) * 9, (1.0,) * 9, 1), "axis must have 1 to head_dim / 2 = 8"),
        (lambda: RotarySpec(16, (0,) * 4, (1.0,) * 4, 3), "pair_stride must divide"),
        (lambda: RotarySpec(16, (-1,), (1.0,), 1), "axis must not be negative"),
        (lambda: RotarySpec(16, (0,), (math.nan,), 1), "inv_freq must be finite"),
    ],
)
def test_wrong_specs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("preset", PRESETS)
def test_config_round_trip(preset):
    config = PositionConfig(preset, (1.5, 2), 500.0)
    values = json.loads(json.dumps(config.to_dict()))
    assert PositionConfig.from_dict(values) == config
    assert PositionConfig.from_dict({"preset": preset}) == PositionConfig(preset)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "best"}, "preset must be one of paper, warm, mrope, gap2, got 'best'"),
        ({"pos_scale": (2.0,)}, "pos_scale must be two numbers above 0"),
        ({"pos_scale": (2.0, 0.0)}, "pos_scale must be two numbers above 0"),
        ({"base": -1.0}, "base must be above 0"),
        ({"scale": 1}, "positions have no key 'scale'"),
    ],
)
def test_wrong_configs(values, message):
    with pytest.raises(ConfigError, match=message):
        PositionConfig.from_dict(values)
