"""A look at numbers, once for the same tensor; on a GPU no host waits, and a later call raises."""

import math
import threading
import weakref
from collections import deque

import torch
from torch import Tensor

from clinkd.ops._checks import checking

_lock = threading.Lock()  # models may answer in several threads
_asked: deque[tuple[torch.cuda.Event, Tensor, str]] = deque()
# tensors last looked at, the last one first, and their versions: a model's layers are given the
# same positions
_seen: tuple[tuple[weakref.ref[Tensor], int], ...] = ()


def check_finite(name: str, values: Tensor) -> None:
    """Raise where a number is not finite: on the CPU and with CLINKD_CHECK=1 here, else later.

    Args:
        name: of the argument.
        values: floats on the CPU or on a CUDA device.

    Raises:
        ValueError: these, or those of an earlier call on a GPU, are not finite.
    """
    if values.is_cuda and not checking():
        check_finite_later(name, values)
    elif not _is_seen(values) or values.is_inference():
        if not math.isfinite(values.sum().item()):
            for place in (~values.isfinite()).nonzero()[:1].tolist():
                value = values[tuple(place)].item()
                raise ValueError(f"{name} must be finite, got {value} at {place}")
        _remember(values)


def check_finite_later(name: str, values: Tensor) -> None:
    """Have the GPU look at numbers; raise what is known of earlier ones."""
    if torch.cuda.is_current_stream_capturing():  # which a question to the device would end
        return
    if _asked:
        with _lock:
            _raise_known()
    if values.numel() == 0 or _is_seen(values):
        return
    _remember(values)
    found = torch.empty((), dtype=values.dtype, device="cpu", pin_memory=values.is_cuda)
    with torch.no_grad(), torch.cuda.device(values.device):
        found.copy_(torch.linalg.vector_norm(values, math.inf), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
    _asked.append((event, found, name))


def _raise_known() -> None:
    while _asked and _asked[0][0].query():  # type: ignore[no-untyped-call]
        _, found, of = _asked.popleft()
        if not math.isfinite(found.item()):
            _asked.clear()
            raise ValueError(
                f"{of} of an earlier call must be finite, got {found.item()}; with CLINKD_CHECK=1 "
                "in the environment that call itself raises, and says where"
            )


def _version(values: Tensor) -> int:
    return 0 if values.is_inference() else values._version  # such a tensor has none


def _is_seen(values: Tensor) -> bool:
    for ref, version in _seen:
        if ref() is values:
            return version == _version(values)
    return False


def _remember(values: Tensor) -> None:
    global _seen
    _seen = ((weakref.ref(values), _version(values)), *_seen[:7])
