"""Export with open (symbolic) sizes, which are known only when the exported graph runs."""

from typing import cast

import torch


def exporting() -> bool:
    """Whether torch.export is running (alone or for ONNX); its graphs should have standard operations only."""
    compiler = torch.compiler
    # torch.compile evaluates is_exporting() as true, too
    return hasattr(compiler, "is_exporting") and compiler.is_exporting() and not compiler.is_dynamo_compiling()


def smaller(a: int, b: int) -> int:
    """The smaller of two sizes, without a branch if one is open."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return cast(int, torch.sym_min(a, b))
    return min(a, b)


def new_size(size: int, least: int) -> int:
    """An open size as a new symbol of at least `least`; any other size unchanged.

    Used for each open size that is the result of a division: otherwise torch spends minutes simplifying nested
    ceilings.
    """
    if not isinstance(size, torch.SymInt):
        return size
    unknown = cast(int, torch.scalar_tensor(size, dtype=torch.int64).item())
    torch._check(unknown >= least)
    return unknown
