"""Sparse float matrices: what `optimizer.keep_zeros` keeps at zero is stored as a map of one bit per weight."""

from dataclasses import dataclass

import jax.numpy as jnp

from spectra_jax.weights.groups import stored_as
from spectra_jax.weights.masked import Masked
from spectra_jax.weights.rule import Rule, Statistics, shard_means


@dataclass(frozen=True)
class Sparse(Rule):
    """The latent weight itself; its code is whether it is there, so that zeros and flips are those of the map."""

    dtype: str = "bfloat16"  # of the weights that are stored

    name = "sparse"
    paper_bits = 16.0
    code_bits = 16  # how many are not there is no matter of the rule
    gathers = False

    def statistics(self, ws, shards):
        """The mean magnitude."""
        return Statistics(shard_means(jnp.abs, ws, shards))

    def codes(self, w, statistics, shards):
        """1 where there is a weight."""
        return (w != 0).astype(jnp.int8)

    def effective(self, w, statistics, shards):
        """The latent weight, as it will be stored."""
        return stored_as(w, self.dtype)

    def freeze(self, w, statistics, shards):
        """The map, and the weights as they are stored."""
        return Masked(w != 0, w.astype(self.dtype))
