"""AWQ (arXiv 2306.00978): inputs that carry more are scaled up before rounding to nearest, and norms scaled down.

For every group of matrices that read the same input, 20 strengths of the scaling are tried, with the rounding that is
to follow, and the one with the smallest error at the output of the attention or the MLP is folded into what produces
that input. Then each group of weights is clipped where that lessens the error of its products. As in the reference
(mit-han-lab/llm-awq); the paper's grid is `awq`, with groups of 128.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from spectra_jax.model.matrices import MATRICES, Key
from spectra_jax.model.parameters import with_matrices
from spectra_jax.quantize.blocks import INPUT_OF, Blocks
from spectra_jax.quantize.grids import group_of
from spectra_jax.quantize.hessian import HIGHEST
from spectra_jax.quantize.rtn import nearest
from spectra_jax.quantize.smooth import READERS, fold_into_norm
from spectra_jax.schema import Quantize
from spectra_jax.sharding import Rules, gathered
from spectra_jax.weights.frozen import matmul
from spectra_jax.weights.grid import per_input

RATIOS = 20  # strengths k/20 from 0 on
SHRINKS, SHRINK_STEP = 10, 0.05  # bounds of weights: 1, 0.95, ... of the largest in a group
SEARCH_TOKENS = 128 * 512  # the reference's calibration set; more of ours would not fit and is not looked at
CLIP_TOKENS = 512
UNCLIPPED: tuple[Key, ...] = (("attention", "q"), ("attention", "k"))  # their product is what counts, and it is brittle
# What the input is scaled by: a norm, or the outputs of a matrix; and who reads it.
FOLDS: dict[str | Key, tuple[Key, ...]] = {
    "attention_norm": READERS["attention_norm"],
    ("attention", "v"): (("attention", "o"),),
    "mlp_norm": READERS["mlp_norm"],
    ("mlp", "up"): (("mlp", "down"),),
}
LAST: dict[str, Key] = {"attention": ("attention", "o"), "mlp": ("mlp", "down")}


def scale_and_clip(parameters: PyTree, batches: list[Float[Array, "B T D"]], blocks: Blocks, q: Quantize) -> PyTree:
    """The block with scales folded, which changes nothing, and weights clipped, which rounding makes up for.

    Raises:
      UserError: groups that do not divide.
    """
    for module, name in MATRICES:
        group_of(parameters[module][name]["w"].shape[0], q, f"{module}.{name}")
    B, T, _ = batches[0].shape
    batches = batches[: max(1, SEARCH_TOKENS // (B * T))]
    return clip(fold(parameters, search(parameters, batches, blocks, q)), batches, blocks, q)


def search(
    parameters: PyTree, batches: list[Float[Array, "B T D"]], blocks: Blocks, q: Quantize
) -> dict[str | Key, Float[Array, "_"]]:
    """The best scales of each of `FOLDS` that can be made, one per dim of the input; all look at the block as it is."""
    found, tokens = {}, sum(x.shape[0] * x.shape[1] for x in batches)
    each = [jax.block_until_ready(_magnitudes(blocks, parameters, x)) for x in batches]
    sums = jax.tree.map(lambda *parts: sum(parts), *each)
    for source, readers in FOLDS.items():
        if isinstance(source, tuple) and _outputs(parameters, source) != _inputs(parameters, readers[0]):
            continue  # heads that share values: an output of v is an input of o several times
        tried = candidates(sums[readers[0]] / tokens)
        losses = sum(np.asarray(_losses(blocks, readers, q, parameters, x, tried)) for x in batches)
        found[source] = tried[int(np.argmin(losses))]
    return found


def _inputs(parameters: PyTree, key: Key) -> int:
    return parameters[key[0]][key[1]]["w"].shape[0]


def _outputs(parameters: PyTree, key: Key) -> int:
    return parameters[key[0]][key[1]]["w"].shape[1]


@partial(jax.jit, static_argnums=0)
def _magnitudes(blocks: Blocks, parameters: PyTree, x: Float[Array, "B T D"]) -> dict[Key, Float[Array, "_"]]:
    inputs = blocks.inputs(parameters, x)
    return {key: gathered(jnp.sum(jnp.abs(x.astype(jnp.float32)), axis=(0, 1))) for key, x in inputs.items()}


def candidates(magnitude: Float[Array, "m"]) -> Float[Array, "R m"]:
    """Scales of every strength: magnitude^(k/20), with the largest and the smallest each other's reciprocals."""
    ratios = jnp.arange(RATIOS, dtype=jnp.float32)[:, None] / RATIOS
    scales = jnp.maximum(magnitude[None] ** ratios, 1e-4)
    return scales / jnp.sqrt(jnp.max(scales, axis=1, keepdims=True) * jnp.min(scales, axis=1, keepdims=True))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _losses(
    blocks: Blocks, readers: tuple[Key, ...], q: Quantize, parameters: PyTree, x: Float[Array, "B T D"],
    tried: Float[Array, "R m"],
) -> Float[Array, "R"]:
    """Mean squared error of the module's output for each of the scales tried."""
    module, last = LAST[readers[0][0]]
    ws = {(part, name): parameters[part][name]["w"] for part, name in readers}

    def output(parameters: PyTree) -> Float[Array, "B T D"]:
        y = blocks.inputs(parameters, x)[module, last]
        return matmul(y, parameters[module][last]["w"], Rules()("batch", "time", "act")).astype(jnp.float32)

    def loss(scales: Float[Array, "m"]) -> Float[Array, ""]:
        rounded = {key: _rounded(w, scales, q) for key, w in ws.items()}
        return jnp.mean(jnp.square(output(with_matrices(parameters, rounded)) - target))

    target = output(parameters)
    return jax.lax.map(loss, tried)


def _rounded(w: Float[Array, "m n"], scales: Float[Array, "m"], q: Quantize) -> Float[Array, "m n"]:
    """What a matrix would be if it were scaled, rounded and scaled back."""
    near = nearest(gathered(w) * scales[:, None], q, q.group or w.shape[0])
    return gathered(near.dequantize() / scales[:, None], jax.typeof(w).sharding.spec)


def fold(parameters: PyTree, scales: dict[str | Key, Float[Array, "_"]]) -> PyTree:
    """A block that computes the same, with inputs divided by their scales where they come from."""
    for source, s in scales.items():
        if isinstance(source, str):
            parameters = fold_into_norm(parameters, source, s)
        else:
            (reader,) = FOLDS[source]
            first, second = (parameters[module][name]["w"] for module, name in (source, reader))
            parameters = with_matrices(parameters, {source: first / s[None], reader: second * s[:, None]})
    return parameters


def clip(parameters: PyTree, batches: list[Float[Array, "B T D"]], blocks: Blocks, q: Quantize) -> PyTree:
    """The block with the weights of each group within the bounds at which rounding does the least harm."""
    B, T, _ = batches[0].shape
    stride = -(-len(batches) * B * T // CLIP_TOKENS)
    rows = [
        jax.block_until_ready(_rows(blocks, -n * B * T % stride, stride, parameters, x)) for n, x in enumerate(batches)
    ]
    clipped = {}
    for module, name in MATRICES:
        if (module, name) not in UNCLIPPED:
            x = jnp.concatenate([found[INPUT_OF[module, name]] for found in rows])
            clipped[module, name] = _clipped(parameters[module][name]["w"], x, q)
    return with_matrices(parameters, clipped)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _rows(
    blocks: Blocks, first: int, stride: int, parameters: PyTree, x: Float[Array, "B T D"]
) -> dict[Key, Float[Array, "_ m"]]:
    """What the matrices are applied to at every `stride`-th token."""
    inputs = {key: x for key, x in blocks.inputs(parameters, x).items() if INPUT_OF[key] == key}
    return {
        key: gathered(x).reshape(-1, x.shape[-1])[first::stride].astype(jnp.float32) for key, x in inputs.items()
    }


@partial(jax.jit, static_argnums=2)
def _clipped(w: Float[Array, "m n"], x: Float[Array, "R m"], q: Quantize) -> Float[Array, "m n"]:
    group = q.group or w.shape[0]
    shrinks = 1 - jnp.arange(SHRINKS, dtype=w.dtype) * SHRINK_STEP

    def bounds(one: tuple[Array, Array]) -> Float[Array, "n"]:
        w, x = one
        largest = jnp.max(jnp.abs(w), axis=0)

        def error(shrink: Float[Array, ""]) -> Float[Array, "n"]:
            kept = jnp.clip(w, -largest[None] * shrink, largest[None] * shrink)
            change = nearest(kept, q, group).dequantize() - w
            return jnp.mean(jnp.square(jnp.dot(x, change, precision=HIGHEST)), axis=0)

        return largest * shrinks[jnp.argmin(jax.lax.map(error, shrinks), axis=0)]

    # One group of inputs after the other: the products of all at once would not fit.
    parts = gathered(w).reshape(-1, group, w.shape[1]), jnp.swapaxes(x.reshape(len(x), -1, group), 0, 1)
    bound = per_input(jax.lax.map(bounds, parts), w)
    return jnp.clip(w, -bound, bound)
