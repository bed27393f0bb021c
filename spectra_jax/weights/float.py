"""FloatLM: the matrix is its latent weight."""

from spectra_jax.weights.rule import Rule


class Float(Rule):
    """Y = X W: no codes, no scales."""

    name = "float"
    paper_bits = 16.0
    quantized = False

    def effective(self, w, statistics, shards):
        """The latent weight itself."""
        return w

    def freeze(self, w, statistics, shards):
        """Nothing to freeze: the array is its own stored form."""
        return w
