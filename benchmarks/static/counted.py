"""Bytes that a step moves, counted from the tensor operations it runs, on tensors without data.

Every operation reads its inputs once and writes its outputs once; views are free. That is the least
that it can move: a softmax of a long row reads it more than once.
"""

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "_scaled_mm": (0, 1)}
_FILLS = {"zeros", "zeros_like", "new_zeros", "zero_", "full", "full_like", "fill_", "ones_like"}
_NOTHING = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class Counter(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        moved: bytes read and written.
        products: multiplications and additions of matrix products.
        elements: elements that other operations work on.
        most: largest number of bytes held at a time, of what was made since it was entered.
    """

    def __init__(self) -> None:
        super().__init__()
        self.moved = self.products = self.elements = self.held = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in given}
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func._schema.name.split("::")[1]
        writes_given = func._schema.is_mutable
        if made and not writes_given:
            made = [t for t in made if t.untyped_storage()._cdata not in storages]
            if not made:  # a view
                return out
        for tensor in made:
            self._hold(tensor)
        if name in _NOTHING:
            return out
        reads = 0 if name in _FILLS else sum(map(_bytes, given))
        self.moved += reads + sum(map(_bytes, made))
        if name in _PRODUCTS:
            first, second = (args[i] for i in _PRODUCTS[name])
            self.products += 2 * first.shape[0] * first.shape[1] * second.shape[1]
        else:
            self.elements += max((t.numel() for t in [*given, *made]), default=0)
        return out

    def kernel(self, reads: list[Tensor], writes: list[Tensor], passes: int = 1) -> None:
        """Count a kernel that is not run, by what its source loads and stores."""
        self.moved += sum(map(_bytes, [*reads, *writes]))
        self.elements += passes * max(t.numel() for t in [*reads, *writes])

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def _bytes(tensor: Tensor) -> int:
    """What reading it once takes; an expanded tensor is as large as its storage."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
