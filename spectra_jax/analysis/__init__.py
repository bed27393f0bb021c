"""Tables and figures of runs, of models that need not exist, and of what the papers print.

    from spectra_jax import analysis
    table = analysis.runs.table(["runs/mini"])
    law = analysis.scaling_laws.fit(table)
    analysis.plots.scaling(law)

Modules take and give pandas frames; `plots` draws them.
"""

from importlib import import_module
from types import ModuleType

MODULES = (
    "accelerators", "axes", "comparison", "deployment", "dynamics", "plots", "published", "ranks", "runs",
    "scaling_laws", "sections", "sizes", "weights",
)


def __getattr__(name: str) -> ModuleType:
    """Modules at their first use: each brings only what it needs."""
    if name in MODULES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(MODULES)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *MODULES])
