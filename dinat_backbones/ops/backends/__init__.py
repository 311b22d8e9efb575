"""The backends of the op."""

from .base import Backend
from .cpu import CPUBackend
from .exportable import ExportableBackend
from .natten_backend import NattenBackend
from .reference import ReferenceBackend
from .tiled import TiledBackend
from .triton_backend import TritonBackend

# In order of preference; ops/dispatch.py takes the first that supports a call.
BACKENDS: dict[str, Backend] = {
    "exportable": ExportableBackend(),
    "cpu": CPUBackend("cpu"),
    "triton": TritonBackend("triton"),
    "natten": NattenBackend(),
    "tiled": TiledBackend(),
    "reference": ReferenceBackend(),
}
