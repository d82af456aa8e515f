"""A check of numbers on a GPU for which no host waits: a later call raises what it found."""

import math
import weakref
from collections import deque

import torch
from torch import Tensor

_asked: deque[tuple[torch.cuda.Event, Tensor, str]] = deque()
_last: list[tuple[weakref.ref[Tensor], int]] = []  # the tensor last asked about, and its version


def check_finite_later(name: str, values: Tensor) -> None:
    """Have the GPU look at numbers, once for the same tensor again and again; raise what is known.

    Args:
        name: of the argument.
        values: floats on a CUDA device.

    Raises:
        ValueError: those of an earlier call were not finite.
    """
    while _asked and _asked[0][0].query():  # type: ignore[no-untyped-call]
        _, found, of = _asked.popleft()
        if not math.isfinite(found.item()):
            _asked.clear()
            raise ValueError(
                f"{of} of an earlier call must be finite, got {found.item()}; with CLINKD_CHECK=1 "
                "in the environment that call itself raises, and says where"
            )
    version = 0 if values.is_inference() else values._version  # such a tensor has none
    seen = bool(_last) and _last[0][0]() is values and _last[0][1] == version
    if seen or values.numel() == 0 or torch.cuda.is_current_stream_capturing():
        return
    _last[:] = [(weakref.ref(values), version)]
    found = torch.empty((), dtype=values.dtype, device="cpu", pin_memory=values.is_cuda)
    with torch.no_grad(), torch.cuda.device(values.device):
        found.copy_(torch.linalg.vector_norm(values, math.inf), non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
    _asked.append((event, found, name))
