"""Every figure of the project."""

from spectra_jax.analysis.plots.curves import loss_curves, plot_runs
from spectra_jax.analysis.plots.models import bits_versus_loss, weight_histograms
from spectra_jax.analysis.plots.style import FAMILIES, family_of

__all__ = ["FAMILIES", "bits_versus_loss", "family_of", "loss_curves", "plot_runs", "weight_histograms"]
