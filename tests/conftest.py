"""What all tests share."""

import os
import socket

import pytest

# before anything imports triton, which transformers does: its own library is decorated at import
if "TRITON_INTERPRET" not in os.environ:
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def free_port():
    """A TCP port that nobody listens on."""
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.fixture
def empty_is_nan(monkeypatch):
    """Memory that nobody has written holds NaN, so that an output that no kernel wrote is seen."""
    import torch

    def poisoned(empty):
        def run(*args, **kwargs):
            out = empty(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        return run

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    monkeypatch.setattr("clinkd.ops._memory._is_kept", lambda: False)
