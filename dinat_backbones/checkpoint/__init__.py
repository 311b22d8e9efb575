"""Read checkpoints without running code that they carry, and load them into a model without losing anything silently.

    checkpoint = read("dinat_mini_in1k_224.pth")    # path or http(s) address, .pth / .pt / .safetensors
    state = backbone_state(checkpoint)              # the backbone's own keys, whoever wrote the file
    report = load_backbone(model, "dinat_mini_in1k_224.pth")
    load_model(detector, "mask_rcnn_dinat_mini.pth")    # all of it or an error

No framework is needed to read what a framework wrote. `reading.py` reads, `download.py` fetches, `loading.py` puts the
tensors into a model, `fitting.py` changes those that need it, `layouts.py` converts between the programs that
wrote them.
"""

from .download import fetch
from .fitting import resize_rpb
from .layouts import LAYOUTS, convert
from .loading import (
    EMA_WRAPPERS,
    WRAPPERS,
    Report,
    backbone_state,
    load_backbone,
    load_classifier,
    load_model,
)
from .objects import Inert
from .reading import read

__all__ = [
    "EMA_WRAPPERS",
    "LAYOUTS",
    "WRAPPERS",
    "Inert",
    "Report",
    "backbone_state",
    "convert",
    "fetch",
    "load_backbone",
    "load_classifier",
    "load_model",
    "read",
    "resize_rpb",
]
