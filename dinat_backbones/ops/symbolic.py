"""Open (symbolic) sizes, which are known only when an exported or compiled graph runs.

A branch on one of them would bind the graph to the sizes that take the same branch: another graph for the others under
`torch.compile`, an error in `torch.export`.
"""

from typing import cast

import torch

# Before this version, dynamo cannot trace torch's functions that ask about open sizes: its graphs depend on branches.
DYNAMO_DECIDES = torch.__version__ >= "2.7"


def exporting() -> bool:
    """Whether torch.export is running (alone or for ONNX); its graphs should have standard operations only."""
    compiler = torch.compiler
    # torch.compile evaluates is_exporting() as true, too
    return hasattr(compiler, "is_exporting") and compiler.is_exporting() and not compiler.is_dynamo_compiling()


def known(comparison: bool) -> bool:
    """Whether a comparison of sizes is true: of fixed sizes its value, of open ones whether it is true for all."""
    decides = DYNAMO_DECIDES if torch.compiler.is_dynamo_compiling() else isinstance(comparison, torch.SymBool)
    if not decides:
        return bool(comparison)
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # here, because it imports sympy

    return statically_known_true(comparison)


def smaller(a: int, b: int) -> int:
    """The smaller of two sizes, without a branch if one is open."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return cast(int, torch.sym_min(a, b))
    return min(a, b)  # dynamo replaces it by sym_min


def larger(a: int, b: int) -> int:
    """The larger of two sizes, without a branch if one is open."""
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return cast(int, torch.sym_max(a, b))
    return max(a, b)  # dynamo replaces it by sym_max


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
