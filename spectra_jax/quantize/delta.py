"""A delta between two checkpoints of one shape, compressed: Delta-CoMe (arXiv 2406.08903), and BitDelta (2402.10193).

Delta-CoMe: the singular vectors of each matrix's delta in bands, those of the largest values in the most bits. Both
factors of a band are quantized by GPTQ: V on what goes into the matrix, then U on what the quantized V and the singular
values make of that. A band is added to the base before the next one is calibrated, layers before it with all of theirs.
A band of 16 bits is not quantized: one such band is plain low rank, the paper's baseline.

BitDelta: the signs of a matrix's delta times their mean magnitude, without the distillation of that scale, which the
paper has as a second step. Embedding, head and gains are the fine-tuned model's in both, at 16 bits.
"""

from collections.abc import Callable
from dataclasses import replace
from math import inf, log
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from spectra_jax.errors import UserError, one_of
from spectra_jax.made import refuse_existing
from spectra_jax.model.matrices import MATRICES, Key
from spectra_jax.model.parameters import block_matrices, with_matrices
from spectra_jax.progress import human
from spectra_jax.quantize.blocks import Blocks
from spectra_jax.quantize.gptq import gptq
from spectra_jax.quantize.grids import GRIDS
from spectra_jax.quantize.hessian import HIGHEST
from spectra_jax.quantize.methods import Method
from spectra_jax.quantize.pipeline import STAGES, apart, load_float, make_run, solved_matrix
from spectra_jax.schema import Config, Quantize
from spectra_jax.serve.load import Loaded
from spectra_jax.sharding import gathered, in_mesh
from spectra_jax.values import parse_band
from spectra_jax.weights.delta import Delta, LowRank, dense
from spectra_jax.weights.form import FLOAT_BITS, Form
from spectra_jax.weights.frozen import Frozen

SHAPE = ("V", "D", "F", "L", "N", "K", "H")
GPTQ = Method(gptq, hessian=True, grids=GRIDS)


class Band(NamedTuple):
    """Singular vectors from `start` to `stop`, whose factors are in so many bits."""

    bits: int
    start: int
    stop: int


def compress(base: str, finetuned: str, config: Config, out: Path | str) -> str:
    """Makes the run `out` of a base and a compressed delta to a fine-tuned model, and says how large that delta is.

    Args:
      base, finetuned: WORKDIR[@STEP] of float models of one shape and tokenizer.
      config: its `quantize`, `family` and `name` are used; the rest is the fine-tuned checkpoint's.

    Raises:
      UserError: models that are quantized, do not fit each other or are the same, settings or calibration text that do
        not fit, or `out` exists.
    """
    out, q = Path(out), config.quantize
    method = METHODS[one_of(q.method, METHODS, "config.quantize.method")]
    one_of(q.grid, GRIDS, "config.quantize.grid")
    refuse_existing(out)
    below, above = (load_float(text, "a delta is taken between float models") for text in (base, finetuned))
    _check_pair(below, above, base, finetuned)

    def one(blocks: Blocks, layer: int, latent: PyTree, batches: list[Array]) -> tuple[PyTree, dict[str, float]]:
        of_base = jax.tree.map(itemgetter(layer), below.parameters["blocks"])
        return delta_block(blocks, of_base, latent, batches, q, f"layer {layer}")

    def about(parameters: PyTree) -> dict[str, str | int | float]:
        bits = sum(w.delta_bits for w in block_matrices(parameters).values())
        return {"base": str(base), "base_step": below.step, "delta_bits": bits}

    decides = {"base": below.record["arrays"]["parameters"]}
    made = make_run(
        finetuned, above, config, out, one, calibrated=method.calibrated, decides=decides, about=about
    )
    weights = sum(w.size for w in block_matrices(above.parameters).values())
    errors = [error for layer in made["errors"] for error in layer.values()]
    return (
        f"{out}: the delta of {human(weights)} weights in blocks takes {made['delta_bits'] / weights:.3f} stored bits "
        f"each, beside the base's {8 * jnp.dtype(q.base_dtype).itemsize}; relative error of the delta "
        f"{np.mean(errors):.2%}, {min(errors):.2%} to {max(errors):.2%}"
    )


def _check_pair(base: Loaded, tuned: Loaded, *names: str) -> None:
    sizes = [{key: getattr(model.config.model, key) for key in SHAPE} for model in (base, tuned)]
    if unlike := [key for key in SHAPE if sizes[0][key] != sizes[1][key]]:
        said = (f"{name} has " + ", ".join(f"{key}={size[key]}" for key in unlike) for name, size in zip(names, sizes))
        raise UserError(f"{' and '.join(said)}: a delta is between models of one shape")
    first, second = (model.tokenizer.sha256 for model in (base, tuned))
    if first != second:
        raise UserError(
            f"{names[0]} and {names[1]} have different tokenizers (sha256 {first[:12]} and {second[:12]}): their "
            "matrices say nothing of each other"
        )
    arrays = [{path: entry for path, entry in model.record["arrays"]["parameters"].items() if path.startswith("blocks")}
              for model in (base, tuned)]
    if arrays[0] == arrays[1]:
        raise UserError(f"{names[0]} and {names[1]} hold the same blocks: there is no delta between them")


def delta_block(
    blocks: Blocks, base: PyTree, tuned: PyTree, batches: list[Float[Array, "B T D"]], q: Quantize, name: str
) -> tuple[PyTree, dict[str, float]]:
    """One layer: the fine-tuned parameters with every matrix as a `Delta`, and the relative error of each delta.

    The error is |x(D' - D)| / |xD| on the calibration text, or |D' - D| / |D| without one, D from the rounded base.

    Raises:
      UserError: weights that are not finite, or settings that leave nothing or do not divide.
    """
    for where, parameters in (("base", base), ("fine-tuned", tuned)):
        for module, matrix in MATRICES:
            if not bool(jnp.all(jnp.isfinite(parameters[module][matrix]["w"]))):
                raise UserError(f"{name}, {module}.{matrix}: NaN or infinite weights in the {where} model")
    rounded = {key: apart(_matrix(base, key)).astype(q.base_dtype) for key in MATRICES}
    forms, hessians = METHODS[q.method].matrices(blocks, rounded, tuned, batches, q, name)
    errors = {
        ".".join(key): float(_error(form, apart(_matrix(tuned, key)), rounded[key], hessians.get(key)))
        for key, form in forms.items()
    }
    return with_matrices(tuned, forms), errors


def delta_come(
    blocks: Blocks, base: dict[Key, Array], tuned: PyTree, batches: list[Array], q: Quantize, name: str
) -> tuple[dict[Key, Form], dict[Key, Array]]:
    """Every matrix's base and bands, and the Hessians that its last band saw."""
    current = with_matrices(tuned, {key: _like(dense(w), _matrix(tuned, key)) for key, w in base.items()})
    forms, seen = dict(base), {}
    vectors = {key: _svd(_matrix(tuned, key), w, q) for key, w in base.items()}
    bands = {key: bands_of(*w.shape, q, f"{name}, {'.'.join(key)}") for key, w in base.items()}
    for i in range(len(q.bands)):
        for keys in STAGES if q.true_sequential else (tuple(MATRICES),):
            if not (filled := [key for key in keys if bands[key][i].stop > bands[key][i].start]):
                continue
            seen |= blocks.hessians(current, batches, tuple(filled))
            for key in filled:
                part = _band(vectors[key], bands[key][i], seen[key], q, f"{name}, {'.'.join(key)}")
                forms[key] = Delta(forms[key], part)
            new = {key: _like(jax.jit(dense)(forms[key]), _matrix(tuned, key)) for key in filled}
            current = with_matrices(current, new)
    return forms, seen


def bit_delta(
    blocks: Blocks, base: dict[Key, Array], tuned: PyTree, batches: list[Array], q: Quantize, name: str
) -> tuple[dict[Key, Form], dict[Key, Array]]:
    """Every matrix's base, signs and mean magnitude."""
    return {key: _signs(apart(_matrix(tuned, key)), w) for key, w in base.items()}, {}


class DeltaMethod(NamedTuple):
    """`matrices` gives the stored forms of a block, and Hessians to measure errors by; both as above."""

    matrices: Callable[..., tuple[dict[Key, Form], dict[Key, Array]]]
    calibrated: bool


METHODS = {"delta_come": DeltaMethod(delta_come, True), "bit_delta": DeltaMethod(bit_delta, False)}


def bands_of(m: int, n: int, q: Quantize, name: str) -> list[Band]:
    """The bands of an m x n matrix: as configured, until the bits per weight or the rank are used up.

    A singular vector pair in b bits takes b (m + n). At 4096 x 4096 the defaults are the paper's 2, 32 and 968 vectors;
    at 4096 x 11008 they are 2, 32 and 1436, where the paper has 1428.

    Raises:
      UserError: there is no room for a single pair.
    """
    left, start, found = q.delta_bits * m * n or inf, 0, []
    for bits, count in map(parse_band, q.bands):
        room = min(m, n) - start if left == inf else min(min(m, n) - start, int(left // (bits * (m + n))))
        stop = start + (room if count is None else min(count, room))
        found.append(Band(bits, start, stop))
        left, start = left - bits * (m + n) * (stop - start), stop
    if not start:
        least = min((parse_band(text)[0] for text in q.bands), default=2) * (m + n) / (m * n)
        raise UserError(
            f"{name}: config.quantize.delta_bits={q.delta_bits} and bands={','.join(q.bands)} leave no singular vector "
            f"of a {m} x {n} matrix; use --config.quantize.delta_bits={least:.2f} or more, or bands of fewer bits"
        )
    return found


def _band(svd: tuple[np.ndarray, ...], band: Band, h: Float[Array, "m m"], q: Quantize, name: str) -> LowRank:
    """One band of (m, k), (k,) and (k, n), by the Hessian of the matrix's inputs."""
    kept = slice(band.start, band.stop)
    down, values, up = (jnp.asarray(x, jnp.float32) for x in (svd[0][:, kept], svd[1][kept], svd[2][kept]))
    if band.bits == FLOAT_BITS:
        return LowRank(down.astype(jnp.float16), values, up.astype(jnp.float16))
    q = replace(q, bits=band.bits)
    first = _quantized(down, h, q, f"{name}, V in {band.bits} bits")
    second = _quantized(up, _through(h, first, values), _grouped(q, up.shape[0]), f"{name}, U in {band.bits} bits")
    return LowRank(first, values, second)


def _quantized(w: Array, h: Array, q: Quantize, name: str) -> Form:
    """By GPTQ; every device has it."""
    form, _ = solved_matrix(GPTQ, apart(w), h, q, name)
    return jax.tree.map(lambda x: gathered(jnp.asarray(x)), form)


@jax.jit
def _through(h: Float[Array, "m m"], down: Form, values: Float[Array, "r"]) -> Float[Array, "r r"]:
    """The Hessian of what `down` and the singular values make of inputs whose Hessian is `h`."""
    seen = down.dequantize() * values[None]
    return jnp.dot(seen.T, jnp.dot(h, seen, precision=HIGHEST), precision=HIGHEST)


def _grouped(q: Quantize, r: int) -> Quantize:
    """The settings for r inputs: groups of the size nearest to `q.group` that divides them.

    The reference lets a last group be shorter; here all are alike. Blocks are as long, so that levels are fresh.
    """
    if not q.group:
        return q
    group = min((g for g in range(1, r + 1) if r % g == 0), key=lambda g: abs(log(g / q.group)))
    return replace(q, group=0) if group == r else replace(q, group=group, block=group)


def _svd(tuned: Array, base: Array, q: Quantize) -> tuple[np.ndarray, ...]:
    """Singular vectors and values of the delta (m, n), on the host: (m, k), (k,), (k, n)."""
    dtype = np.float64 if q.float64 else np.float32
    return np.linalg.svd(np.asarray(tuned, dtype) - np.asarray(base, dtype), full_matrices=False)


@jax.jit
def _signs(tuned: Float[Array, "m n"], base: Float[Array, "m n"]) -> Delta:
    delta = tuned - dense(base)
    codes = jnp.where(delta < 0, -1, 1).astype(jnp.int8)
    return Delta(base, Frozen(codes, jnp.mean(jnp.abs(delta))[None], 0, code_bits=1, counted_bits=1.0))


@jax.jit
def _error(form: Form, tuned: Array, base: Array, h: Array | None) -> Float[Array, ""]:
    def square(x: Array) -> Array:
        return jnp.sum(x * (x if h is None else jnp.dot(h, x, precision=HIGHEST)))

    delta = square(tuned - dense(base))
    return jnp.sqrt(square(form.dequantize() - tuned) / jnp.maximum(delta, jnp.finfo(delta.dtype).tiny))


def _matrix(parameters: PyTree, key: Key) -> Array:
    return parameters[key[0]][key[1]]["w"]


def _like(x: Array, other: Array) -> Array:
    """`x` spread as `other` is."""
    return gathered(x, jax.typeof(other).sharding.spec if in_mesh() else None)
