"""The published architectures: 13 backbones with stages and 6 isotropic models."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

_T = TypeVar("_T")


def find(what: str, name: object, known: Mapping[str, _T]) -> _T:
    """`known[name]`; otherwise a ValueError with `what` kind of name is unknown, the nearest and all known ones."""
    if isinstance(name, str) and name in known:
        return known[name]
    near = difflib.get_close_matches(str(name).lower(), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown {what} {name!r}.{hint} Known: {', '.join(known)}")


@dataclass(frozen=True)
class Arch:
    """A backbone of four stages at strides 4, 8, 16 and 32, of width embed_dim times 1, 2, 4 and 8."""

    name: str
    family: str  # "NAT" | "DiNAT" | "DiNAT_s"
    embed_dim: int
    depths: tuple[int, ...]
    mlp_ratio: float
    layer_scale: float | None = None
    kernel_size: int = 7

    @property
    def num_heads(self) -> tuple[int, ...]:
        """Heads of each stage; head_dim is 32 in every backbone."""
        return tuple(self.embed_dim * 2**stage // 32 for stage in range(len(self.depths)))


ARCHS: dict[str, Arch] = {a.name: a for a in (
    #    name             family    width  depths         mlp  layer scale
    Arch("nat_mini",      "NAT",      64, (3, 4, 6, 5),  3.0),
    Arch("nat_tiny",      "NAT",      64, (3, 4, 18, 5), 3.0),
    Arch("nat_small",     "NAT",      96, (3, 4, 18, 5), 2.0, 1e-5),
    Arch("nat_base",      "NAT",     128, (3, 4, 18, 5), 2.0, 1e-5),
    Arch("dinat_mini",    "DiNAT",    64, (3, 4, 6, 5),  3.0),
    Arch("dinat_tiny",    "DiNAT",    64, (3, 4, 18, 5), 3.0),
    Arch("dinat_small",   "DiNAT",    96, (3, 4, 18, 5), 2.0),
    Arch("dinat_base",    "DiNAT",   128, (3, 4, 18, 5), 2.0, 1e-5),
    Arch("dinat_large",   "DiNAT",   192, (3, 4, 18, 5), 2.0),
    Arch("dinat_s_tiny",  "DiNAT_s",  96, (2, 2, 6, 2),  4.0),
    Arch("dinat_s_small", "DiNAT_s",  96, (2, 2, 18, 2), 4.0),
    Arch("dinat_s_base",  "DiNAT_s", 128, (2, 2, 18, 2), 4.0),
    Arch("dinat_s_large", "DiNAT_s", 192, (2, 2, 18, 2), 4.0),
)}  # fmt: skip


@dataclass(frozen=True)
class Isotropic:
    """`depth` equal blocks on one grid of patches. kernel_size None: attention over the whole grid (ViT with rpb)."""

    name: str
    embed_dim: int
    num_heads: int
    drop_path_rate: float
    kernel_size: int | None
    dilation_of_odd_blocks: int | None  # blocks 1, 3, 5, ... counted from 0; the even ones have dilation 1
    depth: int = 12
    mlp_ratio: float = 4.0
    patch_size: int = 16
    img_size: int = 224
    patch_norm: bool = True


ISOTROPIC: dict[str, Isotropic] = {m.name: m for m in (
    #         name                    width heads drop kernel dilation
    Isotropic("nat_isotropic_small",   384, 12, 0.1, 7, 1),
    Isotropic("dinat_isotropic_small", 384, 12, 0.1, 7, 2),
    Isotropic("vitrpb_small",          384, 12, 0.1, None, None),
    Isotropic("nat_isotropic_base",    768, 24, 0.4, 7, 1),
    Isotropic("dinat_isotropic_base",  768, 24, 0.4, 7, 2),
    Isotropic("vitrpb_base",           768, 24, 0.4, None, None),
)}  # fmt: skip


def arch(name: str) -> Arch:
    """The backbone of that name; ValueError with the known names otherwise."""
    if isinstance(name, str) and name in ISOTROPIC:
        raise ValueError(f"{name!r} is an isotropic model, not a backbone with stages: look in ISOTROPIC")
    return find("architecture", name, ARCHS)


def isotropic(name: str, **changes: Any) -> Isotropic:
    """The isotropic model of that name, with some fields changed; ValueError with the known names otherwise."""
    return replace(find("isotropic model", name, ISOTROPIC), **changes)
