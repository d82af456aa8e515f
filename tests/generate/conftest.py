"""Fixtures of the generation tests; their makers are in conftest_generate.py."""

import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))

from conftest_generate import make_demo, make_model, make_processor, make_records


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture
def picture():
    return Image.effect_noise((90, 70), 60).convert("RGB")


@pytest.fixture(scope="session")
def processor():
    return make_processor()


@pytest.fixture(scope="session")
def demo(processor):
    return make_demo(processor)


@pytest.fixture
def data(tmp_path):
    return tmp_path, make_records(tmp_path)
