"""Memory of the CPU: page faults of fresh memory can take longer than a kernel."""

import contextlib
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from clinkd.ops._impl import built, extension

LEAST_BYTES = 4 << 20  # of a tensor for which large pages are worth asking for
# of one whose memory is kept: glibc's malloc gives anything larger back to the system
LEAST_KEPT = 32 << 20
SWITCH = "CLINKD_KEEP_MEMORY"
# up to so many rows MKL without AVX-512 is 1.3 to 3.6 times as fast with the head as first factor
NARROW = 128
# driver by which the host of a virtual machine takes memory and gives it back
_BALLOON = Path("/sys/bus/virtio/drivers/virtio_balloon")
_REPORTING = 5  # virtio 1.2, 5.5.3: the guest tells its host which pages are free


def fresh(shape: Sequence[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a tensor on the device of another one, side by side; nobody has written it yet.

    On the CPU that of 32 MiB and more is kept when the tensor is gone and used again, so that the
    system need not clear it again; it may take the pages meanwhile (MADV_FREE of Linux).

    Args:
        dtype: default: the other one's.
    """
    dtype = dtype or like.dtype
    if not like.is_cpu or torch.compiler.is_compiling():
        return like.new_empty(shape, dtype=dtype)
    bytes = math.prod(shape) * dtype.itemsize
    if bytes < LEAST_KEPT or not _is_kept():
        return large_pages(like.new_empty(shape, dtype=dtype))
    memory = torch.frombuffer(extension().KeptMemory(bytes), dtype=dtype).untyped_storage()
    return torch.empty(0, dtype=dtype, device="cpu").set_(memory).resize_(tuple(shape))


def fresh_like(tensor: Tensor) -> Tensor:
    """The same of a tensor's shape and type."""
    bytes = tensor.nbytes
    if bytes >= LEAST_KEPT:
        return fresh(tensor.shape, tensor)
    found = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    return found if bytes < LEAST_BYTES else large_pages(found)  # a call of a small one is Python


@lru_cache(maxsize=1)
def _is_kept() -> bool:
    return built("KeptMemory") and os.environ.get(SWITCH) != "0"


def release_memory() -> None:
    """Give the system the memory of the CPU that is kept and not in use, see `fresh`.

    It takes the pages itself when it is short of them; until then they count as the process's.
    """
    if built("KeptMemory"):
        extension().release_memory()


def large_pages(tensor: Tensor) -> Tensor:
    """The tensor, which nobody has written yet; on Linux its memory comes in pages of 2 MiB.

    Where the system gives large pages to all or to none, nothing changes. Nothing is asked of a
    virtual machine whose host takes free large pages away: those it has to give back, which takes
    two to four times as long as small ones that the machine still has.
    """
    if torch.compiler.is_compiling():
        return tensor
    if tensor.is_cpu and tensor.nbytes >= LEAST_BYTES and _are_worth_asking():
        extension().large_pages(tensor.data_ptr(), tensor.nbytes)
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


def _is_mkl_on_avx2() -> bool:
    mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return mkl and torch.backends.cpu.get_cpu_capability() == "AVX2"


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` without gradient; on the CPU its result is `fresh` memory.

    Args:
        hidden: [N, C].
        weight: [V, C].
        bias: [V] or None.
    """
    given = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if hidden.device.type != "cpu" or given:  # `out` neither follows the one nor helps the other
        return F.linear(hidden, weight, bias)
    out = fresh((len(hidden), len(weight)), hidden)
    if 1 < len(hidden) <= NARROW and hidden.dtype == torch.float32 and _is_mkl_on_avx2():
        columns = torch.mm(weight, hidden.T, out=fresh((len(weight), len(hidden)), hidden))
        out.copy_(columns.T)
        return out if bias is None else out.add_(bias)
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)
