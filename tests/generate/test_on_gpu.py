"""Beam search on a GPU gives the answers of the CPU."""

import copy

import pytest
import torch
from conftest_generate import make_model, make_request

from clinkd.generate import BeamSearcher

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("beams", [1, 3, 5])
def test_equals_the_cpu(beams, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    model = make_model()
    requests = [
        make_request(torch.Generator().manual_seed(seed), images=seed % 3) for seed in range(9)
    ]
    found, expected = (
        BeamSearcher(m, None, beams, beams, 8, batch_size=4).generate(requests)
        for m in (copy.deepcopy(model).cuda(), model)
    )
    for a, b in zip(found, expected, strict=True):
        assert [c.token_ids for c in a.candidates] == [c.token_ids for c in b.candidates]
        for one, other in zip(a.candidates, b.candidates, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-3)
