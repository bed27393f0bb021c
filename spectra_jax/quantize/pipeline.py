"""A trained float model to a quantized run, layer by layer: calibrate, quantize, and go on with what that layer gives.

Each layer is calibrated on the outputs of the quantized layers before it, so that errors are seen and not added up.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, PyTree

from spectra_jax import config as configs
from spectra_jax.calibration import calibration_loader
from spectra_jax.errors import UserError
from spectra_jax.made import refuse_existing, write_made
from spectra_jax.model.matrices import MATRICES, Key
from spectra_jax.model.parameters import apply, with_matrices
from spectra_jax.progress import duration
from spectra_jax.quantize.blocks import Blocks
from spectra_jax.quantize.finished import Layers
from spectra_jax.quantize.hessian import HIGHEST
from spectra_jax.quantize.methods import Method, get_method
from spectra_jax.record import make_record
from spectra_jax.schema import Config, Quantize
from spectra_jax.serve.load import Loaded, load
from spectra_jax.sharding import AXES, batch_sharding, gathered
from spectra_jax.stored import parse_checkpoint
from spectra_jax.train.workdir import read_config, read_fingerprint
from spectra_jax.weights import get_rule
from spectra_jax.weights.form import Form, part_sharding, size_in_bits

# Matrices that are quantized at once; with `true_sequential`, one of these after the other.
STAGES: tuple[tuple[Key, ...], ...] = (
    (("attention", "q"), ("attention", "k"), ("attention", "v")), (("attention", "o"),),
    (("mlp", "gate"), ("mlp", "up")), (("mlp", "down"),),
)
OneLayer = Callable[[Blocks, int, PyTree, list[Array]], tuple[PyTree, dict[str, float]]]


def quantize(checkpoint: str, config: Config, out: Path | str) -> Path:
    """Makes the run `out` of a float checkpoint `WORKDIR[@STEP]`; after a kill the same call goes on.

    Args:
      config: its `quantize`, `family` and `name` are used; the rest is the checkpoint's.

    Raises:
      UserError: a model that is not float, calibration text that does not fit or does not suffice, settings that do
        not divide, or `out` exists.
    """
    out, q, method = Path(out), config.quantize, get_method(config.quantize.method, config.quantize.grid)
    refuse_existing(out)
    source = load_float(checkpoint, "quantize a float model")

    def one(blocks: Blocks, layer: int, latent: PyTree, batches: list[Array]) -> tuple[PyTree, dict[str, float]]:
        return quantize_block(blocks, latent, batches, q, f"layer {layer}")

    make_run(checkpoint, source, config, out, one, calibrated=method.hessian or method.prepare is not None)
    return out


def load_float(checkpoint: str, instead: str) -> Loaded:
    """A checkpoint that is not quantized, and whose blocks can be calibrated.

    Raises:
      UserError: it is, and the message ends with `instead`; or it has another mixer than attention.
    """
    source = load(checkpoint)
    if get_rule(source.config.model.weight).quantized or source.record.get("forms"):
        raise UserError(f"{checkpoint} is quantized already ({source.config.family}); {instead}")
    if (mixer := source.config.model.mixer) != "attention":
        raise UserError(f"{checkpoint} has the mixer {mixer}, whose layers are calibrated by nothing yet; quantize a "
                        "model with attention, or train this one under a quantized weight rule")
    return source


def make_run(
    checkpoint: str, source: Loaded, config: Config, out: Path, one: OneLayer, *, calibrated: bool,
    decides: Mapping[str, Any] = {}, about: Callable[[PyTree], Mapping[str, Any]] = lambda parameters: {},
) -> dict[str, Any]:
    """Writes the run `out` of `source`, which is `checkpoint`, layer by layer; returns what is on record of it.

    Args:
      config: as of `quantize`.
      one: (Blocks, layer, its float parameters, what goes into it by batch) -> its parameters in stored forms, and the
        error of each matrix.
      calibrated: whether it needs what goes into it.
      decides: what else, JSON-ready, the numbers depend on.
      about: what else, JSON-ready, goes on record, of the new parameters.
    """
    q, (workdir, _) = config.quantize, parse_checkpoint(checkpoint)
    # As it was trained: what is loaded has the mesh and the batch of this machine.
    made = replace(read_config(workdir), family=config.family, name=config.name, quantize=q)
    with jax.set_mesh(source.mesh):
        tokens, fingerprint = calibration(source, q) if calibrated else ([], "")
        decides = {"quantize": asdict(q), "data": fingerprint, "of": source.record["arrays"]["parameters"], **decides}
        layers = Layers(out, decides)
        blocks, errors = [], []
        for parameters, found in _layers(source, one, tokens, layers):
            blocks.append(parameters), errors.append(found)
        stacked = jax.tree.map(lambda *arrays: np.stack(arrays), *blocks)
        parameters = {**source.parameters, "blocks": _placed(stacked, source.parameters["blocks"])}
        stored, paper = size_in_bits(parameters)
        quantized = {"of": str(checkpoint), "step": source.step, "errors": errors, "stored_bits": stored,
                     "paper_bits": paper, **about(parameters)}
        content = make_record(configs.to_dict(made), source.record["tokens"], fingerprint) | {"quantized": quantized}
        tokenizer = (workdir / "tokenizer.json").read_text("utf-8")
        write_made(
            out, made, parameters, content, tokenizer, step=source.step, fingerprint=read_fingerprint(workdir)
        )
    layers.remove()
    return quantized


def calibration(source: Loaded, q: Quantize) -> tuple[list[Int[Array, "B T"]], str]:
    """Batches of token ids, drawn from the training split by `q.seed`, and what identifies their text.

    Raises:
      UserError: sets that are missing, of another tokenizer, or too small.
    """
    batch = -(-q.batch // source.mesh.size) * source.mesh.size
    loader = calibration_loader(source, q, batch=batch, section="quantize")
    if q.samples > len(loader) or q.samples % batch:
        raise UserError(
            f"config.quantize.samples={q.samples} must be a multiple of the {batch} that run at once and at most the "
            f"{len(loader)} records of {loader.T} tokens in {', '.join(map(str, loader.folders))}; use "
            f"{min(len(loader), q.samples) // batch * batch or batch}, or prepare more text"
        )
    spread = batch_sharding(source.mesh)
    steps = range(q.samples // batch)
    return [jax.device_put(loader.batch_at(step)[:, :-1], spread) for step in steps], loader.fingerprint


def _layers(
    source: Loaded, one: OneLayer, tokens: list[Array], kept: Layers
) -> Iterator[tuple[PyTree, dict[str, float]]]:
    """Every layer's quantized parameters as numpy arrays, and the error of each of its matrices."""
    m = source.config.model
    embed = jax.jit(lambda parameters, ids: apply(source.graphdef, parameters).embed(ids))
    # Here and below one program after the other: of several that communicate, a CPU's devices may begin different ones.
    batches = [jax.block_until_ready(embed(source.parameters, ids)) for ids in tokens]
    blocks, started, fresh = Blocks(m), time.monotonic(), 0
    for layer in range(m.L):
        latent = jax.tree.map(itemgetter(layer), source.parameters["blocks"])
        found = kept.load(layer, latent)
        if found is None:
            kept.save(layer, *one(blocks, layer, latent, batches))
            found, fresh = kept.load(layer, latent), fresh + 1
            left = (time.monotonic() - started) / fresh * (m.L - layer - 1)
            print(_line(layer, m.L, found[1], left), file=sys.stderr, flush=True)
        if batches and layer + 1 < m.L:
            frozen = _placed(found[0], latent)
            batches = [jax.block_until_ready(blocks.forward(frozen, x)) for x in batches]
        yield found


def quantize_block(
    blocks: Blocks, parameters: PyTree, batches: list[Float[Array, "B T D"]], q: Quantize, name: str
) -> tuple[PyTree, dict[str, float]]:
    """One layer: its parameters with every matrix in its stored form, and the relative error of each.

    The error is that of the outputs on the calibration text where the method takes Hessians, |x(W' - W)| / |xW|; else
    that of the weights. Both are root mean squares.

    Raises:
      UserError: weights that are not finite, or as the method.
    """
    method, errors = get_method(q.method), {}
    for module, matrix in MATRICES:
        if not bool(jnp.all(jnp.isfinite(parameters[module][matrix]["w"]))):
            raise UserError(f"{name}, {module}.{matrix}: NaN or infinite weights, of which nothing can be made")
    if method.prepare:
        parameters = jax.block_until_ready(method.prepare(parameters, batches, blocks, q))
    for keys in STAGES if q.true_sequential else (tuple(MATRICES),):
        hessians = blocks.hessians(parameters, batches, keys) if method.hessian else {}
        frozen = {}
        for module, matrix in keys:
            w, h, where = parameters[module][matrix]["w"], hessians.get((module, matrix)), f"{module}.{matrix}"
            frozen[module, matrix], errors[where] = solved_matrix(method, apart(w), h, q, f"{name}, {where}")
        parameters = with_matrices(parameters, frozen)
    return parameters, errors


def apart(w: Float[Array, "m n"]) -> Float[Array, "m n"]:
    """The matrix with its outputs spread over all devices: each is quantized by itself."""
    devices, outputs = jax.sharding.get_abstract_mesh().size, w.shape[1]
    # A single output is not spread, not even over one device: JAX forgets how a dim of one was.
    return gathered(w, P(None, AXES) if outputs > 1 and outputs % devices == 0 else P())


def solved_matrix(method: Method, w: Array, h: Array | None, q: Quantize, name: str) -> tuple[Form, float]:
    """A matrix in its stored form, and its error."""
    if q.float64:
        here = jax.local_devices(backend="cpu")[:1]
        with jax.enable_x64(True), jax.set_mesh(jax.make_mesh((1, 1, 1), AXES, devices=here)):
            w, h = (None if x is None else jnp.asarray(np.asarray(x), jnp.float64) for x in (w, h))
            solved, error = solved_matrix(method, w, h, replace(q, float64=False), name)
            return jax.tree.map(np.asarray, solved), error
    solved = method.matrix(w, h, q, name)
    return solved, float(_error(w, solved, h))


@jax.jit
def _error(w: Float[Array, "m n"], solved: Form, h: Float[Array, "m m"] | None) -> Float[Array, ""]:
    def square(x: Array) -> Array:
        return jnp.sum(x * (x if h is None else jnp.dot(h, x, precision=HIGHEST)))

    return jnp.sqrt(square(solved.dequantize() - w) / jnp.maximum(square(w), jnp.finfo(w.dtype).tiny))


def _placed(parameters: PyTree, like: PyTree) -> PyTree:
    """Arrays of the host on the devices, where those of `like` or of their forms are."""

    def put(leaf: Array, node: PyTree) -> PyTree:
        return jax.tree.map(lambda array: jax.device_put(array, part_sharding(array.shape, leaf)), node)

    return jax.tree.map(put, like, parameters)


def _line(layer: int, layers: int, errors: Mapping[str, float], left: float) -> str:
    each = "  ".join(f"{name.rpartition('.')[2]} {error:.2%}" for name, error in errors.items())
    return f"layer {layer + 1:>{len(str(layers))}}/{layers}  error {each}  eta {duration(left)}"
