"""Detectron2's checkpointer with safe reading and with backbone files of any layout."""

from collections import OrderedDict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint import DetectionCheckpointer

from ... import backbone, zoo
from ...checkpoint import fetch, load_backbone, read
from ...checkpoint.loading import tensors, unwrap
from ...files import atomic_write


class Checkpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, but files are read without running code that they carry (see `checkpoint.read`).

    A file without any of the model's own names, such as an ImageNet checkpoint or a backbone of another framework, is
    loaded into the backbone by `checkpoint.load_backbone`: bias tables of another kernel size are resized, another
    architecture is an error. Any other file is loaded as Detectron2 does it.

    Args:
        model, save_dir, checkpointables: see `DetectionCheckpointer`.
        allow_pickle: use Python's own unpickler, which runs any code in the file. Only for trusted files.

    `missing` has the names of the model's parameters that were not in the file loaded last.
    """

    missing: tuple[str, ...] = ()

    def __init__(self, model: torch.nn.Module, save_dir: str = "", *, allow_pickle: bool = False, **kwargs: Any):
        super().__init__(model, save_dir, **kwargs)
        self.allow_pickle = allow_pickle

    def load(self, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As `DetectionCheckpointer.load`; an http(s) address is downloaded once by `checkpoint.fetch`.

        Raises:
            FileNotFoundError: no such file; the message has the address if the name is that of a published one.
            ValueError: see `read` and `load_backbone`.
        """
        scheme = urlparse(path).scheme if path else ""
        if scheme in ("http", "https"):
            path = str(fetch(path))
        elif path and not scheme and not Path(path).is_file():
            raise FileNotFoundError(f"checkpoint {path} is not there{_published_address(Path(path))}")
        return super().load(path, *args, **kwargs)

    def save(self, name: str, **kwargs: Any) -> None:
        """As `DetectionCheckpointer.save`; a process that is killed meanwhile leaves no half file under the name."""
        if not self.save_dir or not self.save_to_disk or "://" in self.save_dir:
            super().save(name, **kwargs)
            return
        file = Path(self.save_dir, f"{name}.pth")
        self.logger.info(f"Saving checkpoint to {file}")
        parts = {key: part.state_dict() for key, part in self.checkpointables.items()}
        with atomic_write(file) as partial:
            torch.save({"model": self.model.state_dict(), **parts, **kwargs}, partial)
        self.tag_last_checkpoint(file.name)

    def _load_file(self, filename: str) -> dict[str, Any]:
        checkpoint = read(filename, allow_pickle=self.allow_pickle)
        state = tensors(checkpoint)
        dinat = next((module for module in self.model.modules() if isinstance(module, backbone.BackboneBase)), None)
        if dinat is not None and not self.model.state_dict().keys() & state.keys():
            load_backbone(dinat, filename, allow_pickle=self.allow_pickle, logger=self.logger)
            loaded = set(dinat.parameters())
            self.missing = tuple(name for name, value in self.model.named_parameters() if value not in loaded)
            return {"model": {}}
        # Mask2Former renames tensors of a state dict without versions in `_metadata`, as if older code had written it
        versioned = OrderedDict(state)
        metadata = getattr(unwrap(checkpoint), "_metadata", None)
        versioned._metadata = self.model.state_dict()._metadata if metadata is None else metadata  # type: ignore[attr-defined]
        checkpoint.pop("matching_heuristics", None)  # Detectron2's loading by similar names, for backbones alone
        return checkpoint | {"model": versioned}

    def _load_model(self, checkpoint: dict[str, Any]) -> Any:
        if not checkpoint["model"]:
            return None
        incompatible = super()._load_model(checkpoint)
        self.missing = tuple(name for name, _ in self.model.named_parameters() if name in incompatible.missing_keys)
        return incompatible


def _published_address(path: Path) -> str:
    """The end of a message, since the published configs name converted copies of the published files."""
    address = next((url for url in zoo.PRETRAINED.values() if Path(urlparse(url).path).stem == path.stem), None)
    return f"; the published one needs no conversion: set MODEL.WEIGHTS to {address}" if address else ""
