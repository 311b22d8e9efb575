"""The op in torch: `torch.ops.dinat_backbones.na2d_NAME` and `na2d_NAME_backward` for each compiled backend.

Schema, checks, Meta, autograd and autocast are the same for all of them and are defined here; a backend supplies the
two kernels. `torch.compile` sees one node per direction, and direct calls of an op are checked, too. The formula for
torch's FLOP counter is in `flops.py`, because importing that counter takes half a second.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from . import autocast, transforms
from .backends.base import Backend
from .checks import check_call, check_like_query, check_lse
from .padding import crop, pad_qkv

# qkv: either query, key and value, [B, H, W, heads, head_dim] each, or all in one, [B, H, W, 3, heads, head_dim].
# padding: None, or what qkv is outside of the map, [3, heads, head_dim]; see `CompiledBackend.pads`.
_CALL = "Tensor[] qkv, Tensor? rpb, int kernel_size, int dilation, float scale, Tensor? padding=None"
# lse: the logarithm of the softmax's denominator, [B, H, W, heads] in float32; empty where the backward kernel does not
# need it.
_FORWARD = f"({_CALL}) -> (Tensor out, Tensor lse)"
# out and lse: None unless the backend keeps lse. The gradients of query, key and value are one tensor, so that a packed
# qkv gets its gradient without a copy.
_GRADIENTS = "(Tensor grad_qkv, Tensor grad_rpb, Tensor grad_padding)"
_BACKWARD = f"(Tensor grad_out, Tensor? out, Tensor? lse, {_CALL}) -> {_GRADIENTS}"

_library = torch.library.Library("dinat_backbones", "DEF")


class Call(NamedTuple):
    """The arguments of a kernel, checked; for shapes see `neighborhood_attention_2d`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    rpb: torch.Tensor | None
    kernel_size: int
    dilation: int
    scale: float
    padding: torch.Tensor | None = None


class Saved(NamedTuple):
    """Results of the forward pass for the backward kernel; None unless `keeps_lse`."""

    out: torch.Tensor | None
    lse: torch.Tensor | None


class Gradients(NamedTuple):
    """What the backward kernel fills (`qkv`) and adds to (the others: zeros in float32)."""

    qkv: torch.Tensor  # [B, H, W, 3, heads, head_dim]
    rpb: torch.Tensor | None  # [heads, 2K-1, 2K-1]
    padding: torch.Tensor | None  # [2, heads, head_dim], of key and value; None unless the backend `pads`


class CompiledBackend(Backend):
    """A backend with kernels of its own. Creating an instance registers its ops."""

    takes_packed_qkv = True
    dispatch_key: str  # of torch's dispatcher, under which the kernels run
    keeps_lse: bool  # whether the backward kernel needs `out` and `lse`
    pads = False  # whether the kernels take `padding`, and with it maps smaller than kernel size times dilation

    def __init__(self, name: str):
        self.name = name
        _library.define(f"na2d_{name}{_FORWARD}")
        _library.define(f"na2d_{name}_backward{_BACKWARD}")
        self.op: torch._ops.OpOverload = getattr(torch.ops.dinat_backbones, f"na2d_{name}").default
        self.backward_op: torch._ops.OpOverload = getattr(torch.ops.dinat_backbones, f"na2d_{name}_backward").default
        implementations: list[tuple[torch._ops.OpOverload, Callable[..., Any], str]] = [
            (self.op, self._run_forward, self.dispatch_key),
            (self.op, self._forward_meta, "Meta"),
            (self.op, self._differentiable, "Autograd"),
            (self.op, self._autocast, "AutocastCPU"),
            (self.op, self._autocast, "AutocastCUDA"),
            (self.op, self._refuse_transforms, "FuncTorchBatched"),
            (self.backward_op, self._run_backward, self.dispatch_key),
            (self.backward_op, self._backward_meta, "Meta"),
        ]
        for op, function, key in implementations:
            _library.impl(op, function, key)

    @abstractmethod
    def forward(self, call: Call, out: torch.Tensor, lse: torch.Tensor) -> None:
        """The forward kernel: fills `out` and, if `keeps_lse`, `lse`. The batch is not empty."""

    @abstractmethod
    def backward(self, call: Call, grad_out: torch.Tensor, saved: Saved, gradients: Gradients) -> None:
        """The backward kernel: computes `gradients`. The batch is not empty."""

    def unsupported(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> list[str]:
        """See `Backend`; subclasses add their reasons."""
        return [transforms.REASON] if transforms.active() else []

    def attention(
        self,
        qkv: Sequence[torch.Tensor],
        rpb: torch.Tensor | None,
        kernel_size: int,
        dilation: int,
        scale: float,
        padding: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Backend`."""
        out: torch.Tensor = self.op(qkv, rpb, kernel_size, dilation, scale, padding)[0]
        return out

    # ---- what torch's dispatcher calls

    def _run_forward(
        self,
        qkv: list[torch.Tensor],
        rpb: torch.Tensor | None,
        kernel_size: int,
        dilation: int,
        scale: float,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        call = self._checked(qkv, rpb, kernel_size, dilation, scale, padding)
        out, lse = self._new_outputs(call.query)
        if out.numel():
            self.forward(call, out, lse)
        return out, lse

    def _run_backward(
        self,
        grad_out: torch.Tensor,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        qkv: list[torch.Tensor],
        rpb: torch.Tensor | None,
        kernel_size: int,
        dilation: int,
        scale: float,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        call = self._checked(qkv, rpb, kernel_size, dilation, scale, padding)
        self._check_saved(grad_out, out, lse, call.query)
        grad_qkv = self._new_grad_qkv(call.query)

        def zeros(like: torch.Tensor | None) -> torch.Tensor:
            return call.query.new_zeros(0 if like is None else like.shape, dtype=torch.float32)

        of_rpb, of_padding = zeros(rpb), zeros(padding)
        if grad_qkv.numel():
            gradients = Gradients(
                grad_qkv, None if rpb is None else of_rpb, None if padding is None else of_padding[1:]
            )
            self.backward(call, grad_out, Saved(out, lse), gradients)
        return (
            grad_qkv,
            of_rpb if rpb is None else of_rpb.to(rpb.dtype),
            of_padding if padding is None else of_padding.to(padding.dtype),
        )

    def _forward_meta(
        self,
        qkv: list[torch.Tensor],
        rpb: torch.Tensor | None,
        kernel_size: int,
        dilation: int,
        scale: float,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        check_call(qkv, rpb, kernel_size, dilation, padding)
        return self._new_outputs(split(qkv)[0])

    def _backward_meta(
        self,
        grad_out: torch.Tensor,
        out: torch.Tensor | None,
        lse: torch.Tensor | None,
        qkv: list[torch.Tensor],
        rpb: torch.Tensor | None,
        kernel_size: int,
        dilation: int,
        scale: float,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        check_call(qkv, rpb, kernel_size, dilation, padding)
        query = split(qkv)[0]
        self._check_saved(grad_out, out, lse, query)

        def empty(like: torch.Tensor | None) -> torch.Tensor:
            return query.new_empty(0, dtype=torch.float32) if like is None else like.new_empty(like.shape)

        return self._new_grad_qkv(query), empty(rpb), empty(padding)

    def _differentiable(
        self,
        qkv: list[torch.Tensor],
        rpb: torch.Tensor | None,
        kernel_size: int,
        dilation: int,
        scale: float,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if transforms.active():
            raise RuntimeError(f"{self.op}: {transforms.REASON}")
        wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (*qkv, rpb, padding) if t is not None)
        result: tuple[torch.Tensor, torch.Tensor]
        if wanted:
            settings = kernel_size, dilation, scale
            result = _Attention.apply(self, rpb, padding, *settings, *qkv)  # type: ignore[no-untyped-call]
        else:
            with torch._C._AutoDispatchBelowAutograd():
                result = self.op(qkv, rpb, kernel_size, dilation, scale, padding)
        return result

    def _autocast(
        self,
        qkv: list[torch.Tensor],
        rpb: torch.Tensor | None,
        kernel_size: int,
        dilation: int,
        scale: float,
        padding: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        qkv = [autocast.cast(tensor) for tensor in qkv]
        padding = None if padding is None else autocast.cast(padding)
        with torch.autocast(qkv[0].device.type, enabled=False):
            result: tuple[torch.Tensor, torch.Tensor] = self.op(qkv, rpb, kernel_size, dilation, scale, padding)
        return result

    def _refuse_transforms(self, *call: Any) -> tuple[torch.Tensor, torch.Tensor]:
        raise RuntimeError(f"{self.op}: {transforms.REASON}")

    # ---- shared by these

    def _checked(
        self,
        qkv: list[torch.Tensor],
        rpb: torch.Tensor | None,
        kernel_size: int,
        dilation: int,
        scale: float,
        padding: torch.Tensor | None = None,
    ) -> Call:
        """The arguments as a `Call`; ValueError if they are invalid, RuntimeError if this backend cannot run them."""
        check_call(qkv, rpb, kernel_size, dilation, padding)
        reasons = self.unsupported(qkv, rpb, kernel_size, dilation, scale)
        if padding is not None and not self.pads:
            reasons.append("its kernels do not pad")
        if reasons:
            raise RuntimeError(f"{self.op} cannot run this call: {'; '.join(reasons)}")
        return Call(*split(qkv), rpb, kernel_size, dilation, scale, padding)

    def _check_saved(
        self, grad_out: torch.Tensor, out: torch.Tensor | None, lse: torch.Tensor | None, query: torch.Tensor
    ) -> None:
        check_like_query("grad_out", grad_out, query)
        if self.keeps_lse:
            if out is None or lse is None:
                raise ValueError(f"{self.backward_op} needs out and lse of the forward pass")
            check_like_query("out", out, query)
            check_lse(lse, query)

    def _new_outputs(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        lse = query.new_empty(query.shape[:-1] if self.keeps_lse else 0, dtype=torch.float32)
        return query.new_empty(query.shape), lse

    def _new_grad_qkv(self, query: torch.Tensor) -> torch.Tensor:
        batch, height, width, heads, head_dim = query.shape
        return query.new_empty((batch, height, width, 3, heads, head_dim))


def split(qkv: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value, views of the packed tensor if it is one."""
    query, key, value = qkv if len(qkv) == 3 else qkv[0].unbind(3)
    return query, key, value


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        backend: CompiledBackend,
        rpb: torch.Tensor | None,
        padding: torch.Tensor | None,
        kernel_size: int,
        dilation: int,
        scale: float,
        *qkv: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = backend.op(qkv, rpb, kernel_size, dilation, scale, padding)
        ctx.save_for_backward(rpb, padding, *((out, lse) if backend.keeps_lse else (None, None)), *qkv)
        ctx.mark_non_differentiable(lse)
        ctx.backend, ctx.settings = backend, (kernel_size, dilation, scale)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor, grad_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rpb, padding, out, lse, *qkv = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            grad_rpb, grad_padding, *grads = _differentiable_gradients(grad_out, rpb, padding, qkv, *ctx.settings)
        else:
            saved = grad_out, out, lse
            grad_qkv, grad_rpb, grad_padding = ctx.backend.backward_op(*saved, qkv, rpb, *ctx.settings, padding)
            grads = [grad_qkv] if len(qkv) == 1 else grad_qkv.unbind(3)
        of_optional = None if rpb is None else grad_rpb, None if padding is None else grad_padding
        return None, *of_optional, None, None, None, *grads


def _differentiable_gradients(
    grad_out: torch.Tensor,
    rpb: torch.Tensor | None,
    padding: torch.Tensor | None,
    qkv: list[torch.Tensor],
    kernel_size: int,
    dilation: int,
    scale: float,
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of rpb, padding and qkv in plain operations, so that they can be differentiated again."""
    from .backends import tiled  # here, because the backends import this module

    call = split(pad_qkv(qkv, padding, kernel_size * dilation)), rpb, kernel_size, dilation, scale
    out = crop(tiled.plain_attention(*call), *grad_out.shape[1:3])
    arguments = rpb, padding, *qkv
    inputs = [t for t in arguments if t is not None and t.requires_grad]
    # with maps of their full size, no output depends on the padding
    found = iter(torch.autograd.grad(out, inputs, grad_out, create_graph=True, materialize_grads=True))
    return tuple(next(found) if t is not None and t.requires_grad else None for t in arguments)
