"""Trade time for memory: keep no intermediates of a function, run it again in the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def recomputed(
    fn: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], parameters: Sequence[Tensor] = ()
) -> tuple[Tensor, ...]:
    """Return ``fn(*inputs)`` and keep only its inputs for backward passes of every order.

    `torch.utils.checkpoint` bounds the first backward pass only: if that pass is itself recorded, as forces
    in training are, the record holds every recomputed intermediate. Here the backward pass is a recomputed
    function again.

    Args:
        fn: deterministic function of the inputs and the parameters.
        inputs: tensors passed to fn.
        parameters: leaf tensors that fn reads by other ways.
    """
    if torch.compiler.is_compiling():
        return fn(*inputs)  # the compiler chooses itself what to keep
    device = inputs[0].device.type
    if torch.is_autocast_enabled(device):
        dtype, exact = torch.get_autocast_dtype(device), fn

        def fn(*args: Tensor) -> tuple[Tensor, ...]:
            with torch.autocast(device, dtype=dtype):
                return exact(*args)

    return _Recomputed.apply(fn, len(inputs), *inputs, *parameters)


class _Recomputed(torch.autograd.Function):
    """A function of n inputs and of parameters, all given; see `recomputed`."""

    @staticmethod
    def forward(
        ctx: Any, fn: Callable[..., tuple[Tensor, ...]], n: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.fn, ctx.n = fn, n
        ctx.save_for_backward(*tensors)
        return fn(*tensors[:n])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        fn, n = ctx.fn, ctx.n
        inputs, parameters = ctx.saved_tensors[:n], ctx.saved_tensors[n:]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        used = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]

        def vjp(*args: Tensor) -> tuple[Tensor, ...]:
            record = torch.is_grad_enabled()
            with torch.enable_grad():
                x = args[:n] if record else _leaves(args[:n])
                roots = [(*x, *parameters)[i] for i in wanted]
                outputs = fn(*x)
                return torch.autograd.grad(
                    [outputs[i] for i in used], roots, args[n:], create_graph=record, materialize_grads=True
                )

        args = (*inputs, *(cotangents[i] for i in used))
        found = (
            _Recomputed.apply(vjp, len(args), *args, *parameters) if torch.is_grad_enabled() else vjp(*args)
        )
        gradients: list[Tensor | None] = [None] * len(ctx.saved_tensors)
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return None, None, *gradients


def _leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
