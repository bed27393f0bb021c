"""What a quantization has finished, so that the same command goes on after a kill: a file per layer."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from spectra_jax.checksum import dotted
from spectra_jax.weights.form import describe, skeleton


class Layers:
    """Finished layers of one quantization, in a folder beside its output that other settings do not share."""

    def __init__(self, out: Path, decides: Mapping[str, Any]):
        """`decides`: everything, JSON-ready, that the numbers depend on."""
        mark = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        self.folder = out.with_name(f".{out.name}.{mark[:16]}.layers")
        self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, layer: int, parameters: PyTree, errors: Mapping[str, float]) -> None:
        """Keeps one layer: it is there whole, or not."""
        leaves = {dotted(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(parameters)}
        half = self._path(layer).with_suffix(".part")
        about = {"forms": describe(parameters), "errors": dict(errors)}
        save_file(leaves, half, metadata={"about": json.dumps(about)})
        half.rename(self._path(layer))

    def load(self, layer: int, like: PyTree) -> tuple[PyTree, dict[str, float]] | None:
        """A kept layer as numpy arrays, and its errors; None where there is none, or none that can be read.

        Args:
          like: the parameters of the layer before quantization.
        """
        if not self._path(layer).exists():
            return None
        try:
            with safe_open(self._path(layer), framework="numpy") as file:
                about = json.loads(file.metadata()["about"])
                arrays = {name: [file.get_tensor(name)] for name in file.keys()}
        except (OSError, SafetensorError):
            return None
        tree = skeleton(about["forms"], arrays, like, lambda entry, leaf: entry[0])
        tree = jax.tree_util.tree_map_with_path(lambda path, leaf: arrays[dotted(path)][0], tree)
        return tree, about["errors"]

    def remove(self) -> None:
        """When the output stands."""
        shutil.rmtree(self.folder)

    def _path(self, layer: int) -> Path:
        return self.folder / f"{layer:04}.safetensors"
