"""A run that was made of another model, not trained: imported or quantized. It appears whole or not at all."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from spectra_jax.checkpoint import Checkpoints
from spectra_jax.errors import UserError
from spectra_jax.schema import Config
from spectra_jax.train.workdir import write_run
from spectra_jax.weights.form import describe


def refuse_existing(out: Path) -> None:
    """Raises UserError if `out` is there: what was made is never replaced."""
    if out.exists():
        raise UserError(f"{out} exists, and nothing that was made is ever replaced: name another --out, or remove it")


def write_made(
    out: Path, config: Config, parameters: PyTree, content: Mapping[str, Any], tokenizer: str, *, step: int = 0,
    fingerprint: str = "",
) -> None:
    """Writes the run `out` with one checkpoint of these parameters, latent or stored forms.

    Args:
      content: goes into the checkpoint's record.
      tokenizer: the text of its tokenizer.json.
      fingerprint: of the data that the model was trained on, where it is known.

    Raises:
      UserError: the folder cannot be written.
    """
    half = out.with_name(f".{out.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    try:
        write_run(half, config, fingerprint=fingerprint, tokenizer=tokenizer)
        with Checkpoints(half, config) as checkpoints:
            checkpoints.save(step, {"parameters": parameters}, {**content, "forms": describe(parameters)})
        half.rename(out)
    finally:
        shutil.rmtree(half, ignore_errors=True)
