"""Which backend runs a call of the op."""

import logging
from collections.abc import Sequence

import torch

from .backends import BACKENDS
from .backends.base import Backend

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()  # (backend, device type)
_warned: set[tuple[str, str]] = set()


def choose_backend(
    qkv: Sequence[torch.Tensor],
    rpb: torch.Tensor | None,
    kernel_size: int,
    dilation: int,
    scale: float,
    name: str | None,
) -> Backend:
    """The backend that runs a call: the one named, or the first in the order of `BACKENDS` that supports the call.

    Args:
        qkv, rpb, kernel_size, dilation, scale: a call that has passed `check_call`; see `Backend.unsupported`.
        name: a key of `BACKENDS`; None for the first backend that is automatic on this device and supports the call.

    Raises:
        ValueError: unknown `name`.
        RuntimeError: the named backend does not support the call, with all its reasons; or no backend does.
    """
    device = qkv[0].device
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(f"backend={name!r} is unknown; choose one of {sorted(BACKENDS)} or None")
        reasons = BACKENDS[name].unsupported(qkv, rpb, kernel_size, dilation, scale)
        if reasons:
            raise RuntimeError(f"backend={name!r} cannot run this call: {'; '.join(reasons)}")
        return BACKENDS[name]
    skipped: list[tuple[str, list[str]]] = []
    for name, candidate in BACKENDS.items():
        if not candidate.automatic(device):
            continue
        reasons = candidate.unsupported(qkv, rpb, kernel_size, dilation, scale)
        if not reasons:
            if not torch.compiler.is_compiling():
                _report(name, device, skipped)
            return candidate
        skipped.append((name, reasons))
    raise RuntimeError(f"no backend runs this call: {skipped}")


def _report(name: str, device: torch.device, skipped: list[tuple[str, list[str]]]) -> None:
    """Log the choice once; warn once if a faster backend was skipped because of a fault of its installation."""
    if (name, device.type) not in _logged:
        _logged.add((name, device.type))
        logger.debug("backend %r runs the calls on %s", name, device.type)
    for other, reasons in skipped:
        if set(reasons) <= set(BACKENDS[other].faults(device)) and (other, device.type) not in _warned:
            _warned.add((other, device.type))
            logger.warning("backend %r runs instead of %r, which is faster: %s", name, other, "; ".join(reasons))
