"""From a float model to a quantized one, without training."""
