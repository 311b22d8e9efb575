"""The C++ kernel for CPUs.

setup.py builds csrc/ into a library with a plain C interface, `library.py` loads it, and `openmp.py` finds the threads
it runs on.

Besides inputs and outputs the kernel needs scratch memory per thread, about 1 MiB in the forward and 4 MiB in the
backward pass (more if 64 columns of a large window and head dimension do not fit), which a thread keeps for its next
call. The backward pass also needs tables of the bias gradient: 4 MiB, or one table ``[2K-1, 2K-1]`` for each head of
each image if that is more.
"""

import ctypes
from collections.abc import Sequence

import torch

from ...registration import Call, CompiledBackend, Gradients, Saved
from . import library, openmp

DTYPES = (torch.float32, torch.bfloat16)


class CPUBackend(CompiledBackend):
    """float32 and bfloat16 on a CPU."""

    dispatch_key = "CPU"
    keeps_lse = False
    pads = True

    def __init__(self, name: str):
        self.library, self.missing = library.load()  # at import, so that torch.compile finds a constant
        super().__init__(name)

    def instruction_set(self) -> str:
        """The instruction set in use: "amx_bf16", "avx512_bf16", "avx512", "avx2" or "baseline".

        With the first two, bfloat16 is multiplied as it is, and attention weights and their gradients are rounded to it
        before their products, which are summed up in float32; with the others bfloat16 is converted to float32.
        "amx_bf16" multiplies in matrix tiles where the kernel size is at most 7.

        Raises:
            RuntimeError: the kernel's library cannot be loaded.
        """
        if self.library is None:
            raise RuntimeError(self.missing)
        name: bytes = self.library.na2d_instruction_set()
        return name.decode()

    def use_instruction_set(self, name: str) -> bool:
        """Switch to another instruction set, for tests; False if this machine or build does not have it."""
        return self.library is not None and self.library.na2d_use_instruction_set(name.encode()) == 0

    def faults(self, device: torch.device) -> list[str]:
        """See `Backend`."""
        return [self.missing] if device.type == "cpu" else []

    def unsupported(
        self, qkv: Sequence[torch.Tensor], rpb: torch.Tensor | None, kernel_size: int, dilation: int, scale: float
    ) -> list[str]:
        """See `Backend`."""
        reasons = super().unsupported(qkv, rpb, kernel_size, dilation, scale)
        if qkv[0].is_meta:
            return reasons  # shapes alone need no library
        if self.missing:
            reasons.append(self.missing)
        if qkv[0].device.type != "cpu":
            reasons.append(f"the tensors are on {qkv[0].device}, the kernel runs on cpu")
        if qkv[0].dtype not in DTYPES:
            reasons.append(f"dtype {qkv[0].dtype} is not one of {', '.join(map(str, DTYPES))}")
        return reasons

    def forward(self, call: Call, out: torch.Tensor, lse: torch.Tensor) -> None:
        """See `CompiledBackend`."""
        problem, _kept = _problem(call)
        library.view(out, problem.out)
        self._run("na2d_forward", problem, out)

    def backward(self, call: Call, grad_out: torch.Tensor, saved: Saved, gradients: Gradients) -> None:
        """See `CompiledBackend`."""
        problem, _kept = _problem(call)
        library.view(grad_out, problem.grad_out)
        for grad, view in zip(
            gradients.qkv.unbind(3), (problem.grad_query, problem.grad_key, problem.grad_value), strict=True
        ):
            library.view(grad, view)
        problem.grad_rpb = None if gradients.rpb is None else gradients.rpb.data_ptr()
        problem.grad_padding = None if gradients.padding is None else gradients.padding.data_ptr()
        self._run("na2d_backward", problem, grad_out)

    def _run(self, function: str, problem: library.Problem, like: torch.Tensor) -> None:
        if getattr(self.library, function)(ctypes.byref(problem)):
            raise MemoryError(f"{function}: no memory for scratch at query shape {list(like.shape)}")


def _problem(call: Call) -> tuple[library.Problem, torch.Tensor | None]:
    """The C struct of a call, and the contiguous float32 rpb it points to, which must be kept alive during the call."""
    query, key, value, rpb, kernel_size, dilation, scale, padding = call
    batch, height, width, heads, head_dim = query.shape
    reach = kernel_size * dilation
    padded = max(height, reach), max(width, reach)
    sizes = batch, *padded, height, width, heads, head_dim
    problem = library.Problem(*sizes, kernel_size, dilation, query.dtype == torch.bfloat16)
    problem.threads, problem.scale = torch.get_num_threads(), scale
    problem.parallel = openmp.parallel()
    library.view(query, problem.query)
    library.view(key, problem.key)
    library.view(value, problem.value)
    if padding is not None:
        library.view_of_pixel(padding[1], problem.key_padding)
        library.view_of_pixel(padding[2], problem.value_padding)
    if rpb is not None:
        rpb = rpb.detach().to(torch.float32).contiguous()
        problem.rpb = rpb.data_ptr()
    return problem, rpb
