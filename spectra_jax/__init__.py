"""Language models whose bit-width is a value of their config.

    spectra_jax.prepare(["texts/*.jsonl"], "data/web", tokenizer="train:8192", context=256)
    curve = spectra_jax.train("configs/quickstart.py:TriLM", "runs/tri", {"data.sets": "data/web", "model.V": 8192})
    spectra_jax.quantize("runs/flt", "configs/quantlm.py:4bit", "runs/flt-4bit")
    table = spectra_jax.evaluate(["runs/tri", "runs/flt-4bit"])
    model = spectra_jax.load("runs/tri")
    model.generate(["The people of"], max_new_tokens=32)
    spectra_jax.plan("configs/trilm.py:3.9b", ["v5p-128", "h100:8"])
    spectra_jax.analysis.runs.table(["runs/tri"])

All are functions of api.py but `load`, below, and `analysis`.
"""

from importlib import import_module
from typing import Any

PACKAGES = ("analysis", "evaluate", "plan", "prepare", "prune", "quantize", "train")
FUNCTIONS = ("import_model",)


def __getattr__(name: str) -> Any:
    """What api.py has, at its first use; packages that are named after a verb can be called (callable.py)."""
    if name in PACKAGES:
        return import_module(f"{__name__}.{name}")
    if name in FUNCTIONS:
        return getattr(import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has load, "
                         + ", ".join([*PACKAGES, *FUNCTIONS]))


def __dir__() -> list[str]:
    return sorted([*globals(), *PACKAGES, *FUNCTIONS])



def load(
    checkpoint: str, *, weights: str = "dense", head: str = "dense", cache: str = "auto", devices=None,
    model_parallel: int = 1,
):
    """A checkpoint of any family, ready to write text: a `spectra_jax.serve.generate.Generator`.

    Args:
      checkpoint: WORKDIR[@STEP], by default the newest step.
      weights: "dense", or "packed" for ternary and binary matrices at 2 bits (see `Generator`).
      head: "dense", or "int8" for 8 bits on CPUs.
      cache: "auto" holds keys and values in the compute dtype, "int8" in 8 bits.
      devices: where to; by default the first `model_parallel`.
      model_parallel: devices that share a matrix and the heads.

    Raises:
      UserError: no such run or step, another kind of cache or head, or weights that cannot be had.
    """
    # Not at the head: whoever needs an error class or the parser of the command line should not wait for JAX.
    import jax

    from spectra_jax.serve.generate import Generator
    from spectra_jax.serve.load import load

    loaded = load(checkpoint, devices=devices or jax.devices()[:model_parallel], model_parallel=model_parallel)
    return Generator(loaded, weights=weights, head=head, cache=cache, release=True)
