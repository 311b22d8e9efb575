"""Export with sizes that are open, that is, known only when the exported graph runs."""

from typing import cast

import torch


def exporting() -> bool:
    """Whether torch.export is at work (alone or for ONNX), whose graphs should hold standard operations only."""
    compiler = torch.compiler
    # torch.compile, too, takes is_exporting() for true
    return hasattr(compiler, "is_exporting") and compiler.is_exporting() and not compiler.is_dynamo_compiling()


def smaller(a: int, b: int) -> int:
    """The smaller of two sizes, without a branch if one is open."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return cast(int, torch.sym_min(a, b))
    return min(a, b)


def new_size(size: int, least: int) -> int:
    """An open size as a new unknown of at least `least`; any other as it is.

    Each open size that is more than a sum gets such a name: torch would spend minutes on simplifying ceilings of
    ceilings.
    """
    if not isinstance(size, torch.SymInt):
        return size
    unknown = cast(int, torch.scalar_tensor(size, dtype=torch.int64).item())
    torch._check(unknown >= least)
    return unknown
