"""What tuning a few weights (train/spiel.py) added to a model, as a small file: 8 bytes for each of them.

For each stack of block matrices, `NAME.counts` (L,) int32 says how many weights of a layer differ, `NAME.indices`
int32 which, in the flattened matrix, and `NAME.values` float32 what is added, layer after layer. The sum has the very
bits of the tuned model, on the very model that the tuning began with: the file holds its checksums, and the config of
the tuned run. It is an .npz archive.
"""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from spectra_jax import config as configs
from spectra_jax.checksum import dotted
from spectra_jax.errors import UserError
from spectra_jax.made import refuse_existing, write_made
from spectra_jax.model.matrices import MATRICES
from spectra_jax.model.parameters import block_matrices, plain, with_matrices
from spectra_jax.serve.load import Loaded, load
from spectra_jax.stored import parse_checkpoint
from spectra_jax.train.start import dense
from spectra_jax.train.workdir import read_config, read_fingerprint

Entries = tuple[Int[np.ndarray, "L"], Int[np.ndarray, "K"], Float[np.ndarray, "K"]]


def extract(start: str, tuned: str, out: Path | str) -> str:
    """Writes what `tuned` adds to `start`, both WORKDIR[@STEP]; says how many weights that is.

    Raises:
      UserError: no such checkpoint; another shape; something other than block matrices differs; a difference that is
        no float32, as full fine-tuning makes them; or `out` is there.
    """
    out = Path(out)
    refuse_existing(out)
    old, new = load(start, latent=None), load(tuned, latent=None)
    before, after = _on_host(old), _on_host(new)
    _refuse_others(before, after, start, tuned)
    matrices, arrays, total = block_matrices(after), {}, 0
    for key, w in block_matrices(before).items():
        entries = difference(w, matrices[key], ".".join(key))
        arrays |= {f"{'.'.join(key)}.{name}": part for name, part in zip(("counts", "indices", "values"), entries)}
        total += entries[1].size
    workdir, _ = parse_checkpoint(tuned)
    about = {
        "start": start, "checksums": _checksums(before), "step": new.step, "fingerprint": read_fingerprint(workdir),
        "config": configs.to_dict(read_config(workdir)),
        "record": {key: value for key, value in new.record.items() if key not in ("arrays", "forms", "step")},
    }
    half = out.with_name(f".{out.name}.part")
    try:
        with open(half, "wb") as file:
            np.savez(file, about=np.frombuffer(json.dumps(about).encode(), np.uint8), **arrays)
        half.rename(out)
    finally:
        half.unlink(missing_ok=True)
    return f"{out}: {total:,} weights of block matrices differ; {out.stat().st_size:,} bytes"


def apply(start: str, delta: Path | str, out: Path | str) -> Path:
    """Writes the run `out`: `start` with what the file `delta` adds, bit for bit the tuned model.

    Raises:
      UserError: no such checkpoint; the file is damaged, or was taken from another start; or `out` is there.
    """
    delta, out = Path(delta), Path(out)
    refuse_existing(out)
    about, entries = _read(delta)
    source = load(start, latent=None)
    before = _on_host(source)
    found = _checksums(before)
    if other := [name for name, one in about["checksums"].items() if found.get(name) != one]:
        raise UserError(
            f"{delta} was taken from {about['start']}, and {start} is another model: {', '.join(other[:4])} differ"
        )
    tuned = {key: added(w, entries[key]) for key, w in block_matrices(before).items()}
    blocks = with_matrices(before["blocks"], tuned)
    tokenizer = (parse_checkpoint(start)[0] / "tokenizer.json").read_text("utf-8")
    content = {**about["record"], "added": {"delta": str(delta), "to": start}}
    parameters = jax.tree.map(
        lambda new, old: jax.device_put(new, old.sharding), {**before, "blocks": blocks}, _dense(source)
    )
    write_made(
        out, configs.from_dict(about["config"]), parameters, content, tokenizer, step=about["step"],
        fingerprint=about["fingerprint"],
    )
    return out


def difference(
    old: Float[np.ndarray, "L m n"], new: Float[np.ndarray, "L m n"], name: str = "a matrix"
) -> Entries:
    """Counts, indices and values such that `added` to `old` they give the bits of `new`.

    Raises:
      UserError: no float32 value does.
    """
    old, new = (np.ascontiguousarray(w, np.float32).reshape(w.shape[0], -1) for w in (old, new))
    layer, index = np.nonzero(old.view(np.int32) != new.view(np.int32))
    base, target = old[layer, index], new[layer, index]
    values = target - base
    # The nearest float32 to the difference; at a power of two it may be its neighbour that gives the sum.
    for neighbour in (np.nextafter(values, -np.inf), np.nextafter(values, np.inf)):
        values = np.where(_differ(base + values, target), neighbour, values)
    if wrong := int(_differ(base + values, target).sum()):
        raise UserError(
            f"{name}: {wrong} of {values.size} weights that differ are no float32 sum of the first model's weight and "
            "a float32 value; only runs of config.optimizer.name=spiel are"
        )
    return np.bincount(layer, minlength=len(old)).astype(np.int32), index.astype(np.int32), values


def added(old: Float[np.ndarray, "L m n"], entries: Entries) -> Float[np.ndarray, "L m n"]:
    """The matrices with these values added."""
    counts, indices, values = entries
    new = np.array(old, np.float32).reshape(old.shape[0], -1)
    new[np.repeat(np.arange(len(counts)), counts), indices] += values
    return new.reshape(old.shape)


def _read(path: Path) -> tuple[dict[str, Any], dict[tuple[str, str], Entries]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            entries = {
                key: tuple(file[f"{'.'.join(key)}.{name}"] for name in ("counts", "indices", "values"))
                for key in MATRICES
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no sparse delta, or damaged: {type(error).__name__}: {error}") from error
    return about, entries


def _dense(source: Loaded) -> dict:
    with jax.set_mesh(source.mesh):
        return dense(plain(source.config.model, source.parameters))


def _on_host(source: Loaded) -> dict:
    return jax.device_get(_dense(source))


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Where the bits are not the same."""
    return a.view(np.int32) != b.view(np.int32)


def _named(parameters: dict) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    return {dotted(path): np.asarray(leaf) for path, leaf in leaves}


def _checksums(parameters: dict) -> dict[str, str]:
    return {name: hashlib.sha256(leaf.tobytes()).hexdigest() for name, leaf in _named(parameters).items()}


def _refuse_others(before: dict, after: dict, start: str, tuned: str) -> None:
    """Raises UserError where the two are not one model but for values of block matrices."""
    old, new = _named(before), _named(after)
    matrices = {f"blocks.{module}.{name}.w" for module, name in MATRICES}
    shapes = [{name: leaf.shape for name, leaf in one.items()} for one in (old, new)]
    if shapes[0] != shapes[1]:
        other = sorted(name for name in old.keys() | new.keys() if shapes[0].get(name) != shapes[1].get(name))
        raise UserError(f"{tuned} is not of the shape of {start}: {', '.join(other[:4])} differ")
    if other := [name for name in old.keys() - matrices if old[name].tobytes() != new[name].tobytes()]:
        raise UserError(
            f"{tuned} differs from {start} in {', '.join(sorted(other)[:4])}, and a sparse delta is of block matrices "
            "alone; was it tuned from there, by config.optimizer.name=spiel?"
        )
