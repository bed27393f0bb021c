"""How large a model is: parameters, and bits by two accounts."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
from jaxtyping import PyTree

from spectra_jax.model.parameters import block_matrices, count, freeze, init_parameters, plain
from spectra_jax.schema import Config
from spectra_jax.weights.form import FLOAT_BITS, is_form, size_in_bits, skeleton
from spectra_jax.weights.packed import unpack


def sizes(config: Config, parameters: PyTree) -> dict[str, Any]:
    """Family, parameters and bits of a model: "stored" with codes, scales, zeros, maps; "paper" as its method's paper.

    Args:
      parameters: arrays and stored forms, or their shapes.
    """
    stored, paper = size_in_bits(parameters)
    matrices = block_matrices(parameters).values()
    in_matrices = sum(w.stored_bits() if is_form(w) else FLOAT_BITS * w.size for w in matrices)
    weights = sum(w.weights if is_form(w) else w.size for w in matrices)
    counts, q = count(config.model), config.quantize
    return {
        # Rivals of the papers' families are families of their own.
        "family": f"{config.family} {q.method}" if q.method not in ("none", "gptq") else config.family,
        "parameters": counts.total, "linear": counts.linear,
        "bits_per_weight": in_matrices / weights, "stored_bits": stored, "paper_bits": paper,
    }


def bytes_per_token(config: Config, parameters: PyTree) -> dict[str, float]:
    """What decoding one sequence reads for a token, in bytes: of weights, of a cache that is half full, and both.

    Weights as they are stored, each once, but of an embedding that is not also the head only a row; 2 L K H keys and
    values of 16 bits for each token of half a context. It is the least: products by dense matrices read them in their
    compute dtype.
    """
    m, (weights, _) = config.model, size_in_bits(parameters)
    if not m.tie_embeddings:
        table, _ = size_in_bits({"embedding": parameters["embedding"]})
        weights -= table - table / m.V
    cache = 2 * m.L * m.K * m.H * FLOAT_BITS * config.data.T / 2
    return {"weight_bytes_per_token": weights / 8, "cache_bytes_per_token": cache / 8,
            "bytes_per_token": (weights + cache) / 8}


def shapes(config: Config, record: Mapping[str, Any]) -> PyTree:
    """The parameters of a checkpoint as they would be loaded, as shapes, from its record alone."""
    like = jax.eval_shape(partial(init_parameters, config.model), jax.random.key(0))
    if not record.get("forms"):
        return jax.eval_shape(partial(freeze, config.model), like)
    like = plain(config.model, like)
    stored = skeleton(
        record["forms"], record["arrays"]["parameters"], like, lambda entry, _: jax.ShapeDtypeStruct(entry[1], entry[0])
    )
    return jax.eval_shape(partial(unpack, like=like), stored)
