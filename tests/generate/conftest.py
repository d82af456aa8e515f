"""Fixtures of the generation tests; their makers are in conftest_generate.py."""

import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from conftest_generate import make_model


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture
def picture():
    return Image.effect_noise((90, 70), 60).convert("RGB")
