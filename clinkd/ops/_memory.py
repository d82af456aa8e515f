"""Fresh memory of the CPU: its page faults can take longer than a kernel."""

import contextlib
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clinkd.ops._impl import built, extension

LEAST_BYTES = 4 << 20  # of a tensor for which it is worth asking
# driver by which the host of a virtual machine takes memory and gives it back
_BALLOON = Path("/sys/bus/virtio/drivers/virtio_balloon")
_REPORTING = 5  # virtio 1.2, 5.5.3: the guest tells its host which pages are free


def large_pages(tensor: Tensor) -> Tensor:
    """The tensor, which nobody has written yet; on Linux its memory comes in pages of 2 MiB.

    Where the system gives large pages to all or to none, nothing changes. Nothing is asked of a
    virtual machine whose host takes free large pages away: those it has to give back, which takes
    two to four times as long as small ones that the machine still has.
    """
    if torch.compiler.is_compiling():
        return tensor
    bytes = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and bytes >= LEAST_BYTES and _are_worth_asking():
        extension().large_pages(tensor.data_ptr(), bytes)
    return tensor


@lru_cache(maxsize=1)
def _are_worth_asking() -> bool:
    return built("large_pages") and not host_takes_free_pages()


def host_takes_free_pages(balloon: Path = _BALLOON) -> bool:
    """Whether a device of the balloon's driver, whose folder need not exist, reports free pages."""
    for file in balloon.glob("virtio*/features"):
        with contextlib.suppress(OSError):  # hidden in this container: as if it were not there
            if file.read_text()[_REPORTING : _REPORTING + 1] == "1":
                return True
    return False


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` without gradient; on the CPU its result asks for large pages.

    Args:
        hidden: [N, C].
        weight: [V, C].
        bias: [V] or None.
    """
    given = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if hidden.device.type != "cpu" or given:  # `out` neither follows the one nor helps the other
        return F.linear(hidden, weight, bias)
    out = large_pages(hidden.new_empty(len(hidden), len(weight)))
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)
