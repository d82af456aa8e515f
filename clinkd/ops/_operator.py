"""Operators that torch knows, called without its dispatcher where nobody watches it.

Torch's way to an operator written in Python takes 0.1 ms and more of the host, for each of the
forward and the backward pass, as much as a small tensor takes on the device. Compilers, tracers,
transforms, modes, tensor subclasses and the profiler see the operator; all else need not pay.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("clinkd", "FRAGMENT")  # type: ignore[no-untyped-call]
_PLAIN = (Tensor, torch.nn.Parameter)
_KINDS = torch._C._TorchDispatchModeKey
_GRAPH_MODES = (_KINDS.FAKE, _KINDS.PROXY, _KINDS.FUNCTIONAL)


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
        schema_of = self._registered._schema
        kinds = [str(argument.type) for argument in schema_of.arguments]
        self._tensors = [place for place, kind in enumerate(kinds) if "Tensor" in kind]
        self._with_gradient: Callable[..., Any] = self._registered
        if save is not None and gradient is not None:
            torch.library.register_autograd(full, gradient, setup_context=save, lib=LIBRARY)
            self._with_gradient = _function(name, run, save, gradient).apply
        elif not schema_of.is_mutable:  # else torch warns, and goes on without

            def none(*_: Any) -> Any:
                raise NotImplementedError(f"{full} has no derivative; its reference has")

            torch.library.register_autograd(full, none, lib=LIBRARY)

    def __call__(self, *arguments: Any) -> Any:
        """Results for all arguments by position.

        Raises:
            NotImplementedError: forward-mode differentiation.
        """
        tensors = [arguments[place] for place in self._tensors]
        if is_watched(*tensors):
            if not _is_compiling() and _is_forward_mode():
                _refuse_tangents(self._registered.name(), tensors)
            return self._registered(*arguments)
        return self.unwatched(*arguments)

    def unwatched(self, *arguments: Any) -> Any:
        """Results where `is_watched` said no of the tensors among the arguments."""
        if torch.is_grad_enabled():
            for place in self._tensors:
                tensor = arguments[place]
                if tensor is not None and tensor.requires_grad:
                    return self._with_gradient(*arguments)
        return self._run(*arguments)


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


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether something sees the operators that are called, or numbers are not where they seem."""
    return is_traced(*tensors) or _dispatch_modes() > 0 or _is_profiling()


def is_traced(*tensors: Tensor | None) -> bool:
    """Whether a call goes into a graph, or a tensor's numbers are not where they seem to be.

    The names are bound once: between passes over memory each look at a module costs a microsecond.
    """
    if (
        _is_compiling()
        or (_dispatch_modes() > 0 and _makes_graph())
        or _are_transforms_active()
        or _tracing_state()
        or _is_forward_mode()
    ):
        return True
    for tensor in tensors:
        if tensor is not None and (type(tensor) not in _PLAIN or tensor.is_meta or tensor.is_neg()):
            return True
    return False


def _makes_graph() -> bool:
    """Whether a mode is on that records operators, or has tensors without numbers."""
    return any(torch._C._get_dispatch_mode(key) is not None for key in _GRAPH_MODES)


def _is_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def _refuse_tangents(name: str, tensors: list[Tensor | None]) -> None:
    for tensor in tensors:
        if tensor is None:
            continue
        _, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
        if tangent is not None:
            raise NotImplementedError(
                f"{name} has no forward-mode derivative; clinkd.ops.reference has"
            )


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`once_differentiable`, which also says no where only saved tensors have a gradient.

    torch's own asks whether the incoming gradients need one, and a loss's does not: a penalty on
    its gradient would count for nothing.
    """
    once = torch.autograd.function.once_differentiable(backward)

    def run(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() and not _is_compiling():
            grads = tuple(None if g is None else g.detach().requires_grad_() for g in grads)
        return once(ctx, *grads)

    return run


def out_of_inference(tensor: Tensor) -> Tensor:
    """The same memory as a tensor that autograd keeps, which one of inference mode is not."""
    if not tensor.is_inference() or torch.is_inference_mode_enabled():
        return tensor
    place = (tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(*place)


_is_compiling = torch.compiler.is_dynamo_compiling  # others who make graphs do it by modes
_dispatch_modes = torch._C._len_torch_dispatch_stack
_are_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_is_profiling = torch._C._autograd._profiler_enabled
