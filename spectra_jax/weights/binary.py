"""BiLM: codes in {-1, 1} about the mean, and one scale per shard (Spectra, Table 1)."""

from dataclasses import dataclass

import jax.numpy as jnp

from spectra_jax.weights.rule import Rule, Statistics, along, shard_means


@dataclass(frozen=True)
class Binary(Rule):
    """scale = mean|W|;  code = sign(W - mean(W));  W_effective = scale * code."""

    sign_of_zero: int = 1  # not specified in the paper; a stored bit has to be one of the two

    name = "binary"
    paper_bits = 1.0
    code_bits = 1

    def statistics(self, ws, shards):
        """The mean magnitude and the mean of each shard."""
        return Statistics(shard_means(jnp.abs, ws, shards), shard_means(lambda w: w, ws, shards))

    def codes(self, w, statistics, shards):
        """The side of the mean on which a weight lies."""
        centred = w - along(statistics.center, w, shards)
        return jnp.where(centred == 0, self.sign_of_zero, jnp.sign(centred)).astype(jnp.int8)
