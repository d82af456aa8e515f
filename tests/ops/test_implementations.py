"""Which implementation runs on which card, and that a slow one is told of."""

import pytest
import torch

from clinkd.ops import _impl


@pytest.fixture
def card(monkeypatch):
    """A card of some capability, and a build for some."""

    def put(capability, archs):
        _impl._why_no_code.cache_clear()
        _impl._warn_once.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(_impl, "built", lambda name: True)
        monkeypatch.setattr(
            _impl, "extension", lambda: type("Extension", (), {"cuda_archs": archs})
        )

    yield put
    _impl._why_no_code.cache_clear()
    _impl._warn_once.cache_clear()


@pytest.mark.parametrize(
    ("archs", "runs", "does_not"),
    [
        (
            "80;90;120",
            [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 0)],
            [(7, 5), (7, 0)],
        ),
        ("90", [(9, 0), (10, 3), (12, 0)], [(8, 0), (8, 9)]),
        ("86", [(8, 6), (8, 9), (9, 0)], [(8, 0)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0), (12, 0)]),
        ("80;90a", [(8, 0), (9, 0), (10, 0)], [(7, 5)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),  # a family's
        ("75;90a;120", [(7, 5), (8, 0), (9, 0), (10, 0), (12, 1)], [(7, 0)]),
    ],
)
def test_cards_that_the_code_runs_on(card, archs, runs, does_not):
    """PTX, of the first and the last, is for all newer cards; code for those of one generation."""
    device = torch.device("cuda")
    for capability in runs:
        card(capability, archs)
        assert _impl.why_not_native("rotary", "rotary", "cuda", device, torch.float32) is None
    for capability in does_not:
        card(capability, archs)
        why = _impl.why_not_native("rotary", "rotary", "cuda", device, torch.float32)
        assert f"this card is sm_{capability[0]}{capability[1]}" in why
        assert f"CLINKD_CUDA_ARCHS={capability[0]}{capability[1]}" in why


def resolve(dtype=torch.float32, device="cuda"):
    def why_not(impl, device, dtype):
        return _impl.why_not_native("rotary", "rotary", impl, device, dtype)

    known, device = ("auto", "reference", "cpu", "cuda"), torch.device(device)
    return _impl.resolve_impl("auto", known, _impl.native_impl(device), why_not, device, dtype)


def test_plain_torch_on_a_gpu_is_told_of_once(card, recwarn):
    card((7, 5), "80;90;120")
    with pytest.warns(UserWarning, match="runs plain torch on this GPU: .* this card is sm_75"):
        assert resolve() == "reference"
    assert resolve() == "reference"
    assert resolve(torch.float64) == "reference"  # nobody has a kernel for these
    assert resolve(torch.float64, "cpu") == "reference"
    card((8, 0), "80;90;120")
    assert resolve() == "cuda"


def test_a_whole_graph_asks_too(monkeypatch):
    """While it is traced: it has no place for a warning."""
    _impl._warn_once.cache_clear()
    monkeypatch.setattr(_impl, "_why_no_code", lambda device: "this card is sm_75")
    monkeypatch.setattr(_impl, "built", lambda name: True)

    @torch.compile(fullgraph=True, backend="eager")
    def add(x):
        return x + (2.0 if resolve() == "reference" else 1.0)

    with pytest.warns(UserWarning, match="this card is sm_75"):
        assert add(torch.zeros(1)).item() == 2.0


def test_kernels_start_on_the_device_of_their_tensors(monkeypatch):
    class Tensor:
        is_cuda, device = True, torch.device("cuda:1")
        get_device = staticmethod(lambda: 1)

    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or "there")
    assert _impl.on_device(Tensor()) == "there"
    assert entered == [Tensor.device]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    with _impl.on_device(Tensor()), _impl.on_device(torch.ones(1)):
        assert len(entered) == 1
