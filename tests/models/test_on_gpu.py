"""The models with our ops on a GPU against stock transformers on the CPU."""

import copy

import pytest
import torch

from clinkd import models
from clinkd.models.layout import ATTENTIONS
from clinkd.rotary import PositionConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
IGNORED = -100


@pytest.fixture(autouse=True)
def whole_float32(monkeypatch):
    """Convolutions round to TF32 unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(stock, attention, preset="mrope"):
    return models.apply(copy.deepcopy(stock), PositionConfig(preset), attention=attention).cuda()


def moved(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


def close(actual, expected):
    assert actual.isfinite().all()
    allowed = 1e-4 * max(1.0, expected.abs().max().item())
    assert (actual.cpu() - expected).abs().max().item() < allowed


def learn(model, inputs):
    """Loss, and gradient of every parameter."""
    loss = model.train()(**inputs, use_cache=False).loss
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), grads


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_loss_and_gradients(build_model, family, make_batch, make_single, side, attention):
    stock = build_model(family)
    model = on_gpu(stock, attention)
    inputs = make_single(1) if side == "none" else make_batch(side)
    mask = inputs["attention_mask"]
    first = torch.nn.functional.pad(mask, (1, 0))[:, :-1] == 0  # predicted by padding
    inputs["labels"] = inputs["input_ids"].masked_fill((mask == 0) | first, IGNORED)
    loss, grads = learn(model, moved(inputs))
    expected_loss, expected = learn(stock, inputs)
    close(loss, expected_loss)
    assert grads.keys() == expected.keys()
    for name, grad in expected.items():
        close(grads[name], grad)


@pytest.mark.parametrize("preset", ["mrope", "paper", "gap2"])
def test_packed_equals_unpacked(build_model, family, make_single, preset):
    model = on_gpu(build_model(family), "fused", preset)
    rows = [moved(make_single(i)) for i in (0, 1, 0)]
    lengths = torch.tensor([row["input_ids"].shape[1] for row in rows], device="cuda")
    ids = torch.cat([row["input_ids"] for row in rows], dim=1)
    segments = torch.repeat_interleave(torch.arange(3, device="cuda"), lengths)[None]
    grids = torch.cat([row["image_grid_thw"] for row in rows])
    with torch.no_grad():
        found = model(
            input_ids=ids,
            position_ids=models.packed_position_ids(model, ids, segments, grids),
            pixel_values=torch.cat([row["pixel_values"] for row in rows]),
            image_grid_thw=grids,
            mm_token_type_ids=torch.cat([row["mm_token_type_ids"] for row in rows], dim=1),
            use_cache=False,
        ).logits
        alone = torch.cat([model(**row, use_cache=False).logits for row in rows], dim=1)
    close(found, alone.cpu())


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation(build_model, family, make_batch, attention, beams):
    stock = build_model(family)
    inputs = make_batch("left")
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams}
    found = on_gpu(stock, attention).generate(**moved(inputs), **options)
    assert found.cpu().tolist() == stock.generate(**inputs, **options).tolist()
