"""Fresh memory of the CPU: its page faults can take longer than a kernel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clinkd.ops._impl import built, extension

LEAST_BYTES = 4 << 20  # of a tensor for which it is worth asking


def large_pages(tensor: Tensor) -> Tensor:
    """The tensor, which nobody has written yet; on Linux its memory comes in pages of 2 MiB.

    Where the system gives large pages to all or to none, nothing changes.
    """
    if torch.compiler.is_compiling():
        return tensor
    bytes = tensor.numel() * tensor.element_size()
    if tensor.device.type == "cpu" and bytes >= LEAST_BYTES and built("large_pages"):
        extension().large_pages(tensor.data_ptr(), bytes)
    return tensor


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` without gradient; on the CPU its result has large pages.

    Args:
        hidden: [N, C].
        weight: [V, C].
        bias: [V] or None.
    """
    given = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    if hidden.device.type != "cpu" or given:  # `out` neither follows the one nor helps the other
        return F.linear(hidden, weight, bias)
    out = large_pages(torch.empty(len(hidden), len(weight), dtype=hidden.dtype))
    if bias is None:
        return torch.mm(hidden, weight.T, out=out)
    return torch.addmm(bias, hidden, weight.T, out=out)
