"""Every figure of the project: each function returns a matplotlib Figure, and writes it where it is given a path."""

from spectra_jax.analysis.plots.benchmarks import benchmark
from spectra_jax.analysis.plots.curves import loss_curves, plot_runs
from spectra_jax.analysis.plots.deployment import hardware, memory, speedup
from spectra_jax.analysis.plots.dynamics import dynamics
from spectra_jax.analysis.plots.laws import gaps, published_laws, scaling
from spectra_jax.analysis.plots.models import bits_versus_loss, weight_histograms
from spectra_jax.analysis.plots.ranks import against_text
from spectra_jax.analysis.plots.style import FAMILIES, family_of
from spectra_jax.analysis.plots.weights import entropies

__all__ = [
    "FAMILIES", "against_text", "benchmark", "bits_versus_loss", "dynamics", "entropies", "family_of", "gaps",
    "hardware", "loss_curves", "memory", "plot_runs", "published_laws", "scaling", "speedup", "weight_histograms",
]
