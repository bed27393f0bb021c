"""How tests compile. Imports nothing of the package: conftest.py asks for it before the package may be loaded."""

from importlib.metadata import version

# XLA_FLAGS for programs that are compiled fast and run slowly: an eighth of the time for one training step.
# The second is gone from later versions, and XLA ends the process over a flag that it does not know.
QUICK = "--xla_backend_optimization_level=0" + (
    " --xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else ""
)
