"""Operators that torch knows, called without its dispatcher where nobody watches it.

Torch's way to an operator written in Python takes 0.1 ms and more of the host, for each of the
forward and the backward pass, as much as a small tensor takes on the device. Compilers, tracers,
transforms, modes, tensor subclasses and the profiler see the operator; all else need not pay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("clinkd", "FRAGMENT")  # type: ignore[no-untyped-call]
_PLAIN = (Tensor, torch.nn.Parameter)


class Operator:
    """`torch.ops.clinkd.<name>`.

    Args:
        name: of the operator.
        schema: its arguments and results, as `torch.library.define` takes them.
        run: computes the results, which share no memory with each other or an argument.
        fake: gives results of the right shapes and types without numbers.
        save: (ctx, inputs, output) keeps what the gradient needs; None: the operator has none.
        gradient: (ctx, *gradients of the results) gives that of each argument.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        run: Callable[..., Any],
        fake: Callable[..., Any],
        save: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
        gradient: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        full = f"clinkd::{name}"
        torch.library.define(full, schema, lib=LIBRARY)
        torch.library.impl(full, "CompositeExplicitAutograd", run, lib=LIBRARY)
        torch.library.register_fake(full, fake, lib=LIBRARY)
        self._run = run
        self._registered = getattr(torch.ops.clinkd, name).default
        kinds = [str(argument.type) for argument in self._registered._schema.arguments]
        self._tensors = [place for place, kind in enumerate(kinds) if "Tensor" in kind]
        self._with_gradient: Callable[..., Any] = self._registered  # torch says there is none
        if save is not None and gradient is not None:
            torch.library.register_autograd(full, gradient, setup_context=save, lib=LIBRARY)
            self._with_gradient = _function(name, run, save, gradient).apply

    def __call__(self, *arguments: Any) -> Any:
        """Results for all arguments by position."""
        if torch.compiler.is_compiling() or _watched():
            return self._registered(*arguments)
        learns = False
        for place in self._tensors:
            tensor = arguments[place]
            if tensor is None:
                continue
            if type(tensor) not in _PLAIN or tensor.is_meta or tensor.is_neg():
                return self._registered(*arguments)
            learns = learns or tensor.requires_grad
        run = self._with_gradient if learns and torch.is_grad_enabled() else self._run
        return run(*arguments)


def _function(
    name: str,
    run: Callable[..., Any],
    save: Callable[[Any, tuple[Any, ...], Any], None],
    gradient: Callable[..., tuple[Any, ...]],
) -> Any:
    """The operator for autograd alone."""

    def forward(ctx: Any, *inputs: Any) -> Any:  # with a `setup_context` torch looks at signatures
        output = run(*inputs)
        save(ctx, inputs, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    return type(name, (torch.autograd.Function,), methods)


def _watched() -> bool:
    """Whether something sees the operators that are called."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
    )
