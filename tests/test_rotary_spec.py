"""Rotary specs and position configs as values: their ladders, keys and limits."""

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clinkd.errors import ConfigError
from clinkd.ops.reference.rotary import angles
from clinkd.rotary import (
    PRESETS,
    PositionConfig,
    RotarySpec,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "rotary.json").read_text())


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
        ({"pos_scale": 2.0}, "pos_scale must be two numbers above 0, got 2.0"),
        ({"pos_scale": ["a", "b"]}, "pos_scale must be two numbers above 0"),
        ({"pos_scale": (2.0, 0.0)}, "pos_scale must be two numbers above 0"),
        ({"base": -1.0}, "base must be above 0"),
        ({"scale": 1}, "positions have no key 'scale'"),
    ],
)
def test_wrong_configs(values, message):
    with pytest.raises(ConfigError, match=message):
        PositionConfig.from_dict(values)
