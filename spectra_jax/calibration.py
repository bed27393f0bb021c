"""Text for what is made of a trained model: records of its training split, or of other sets of its tokenizer."""

from dataclasses import replace
from pathlib import Path

from spectra_jax.data.loader import Loader
from spectra_jax.data.manifest import Manifest
from spectra_jax.errors import UserError
from spectra_jax.schema import Prune, Quantize
from spectra_jax.serve.load import Loaded


def calibration_loader(source: Loaded, settings: Quantize | Prune, *, batch: int, section: str) -> Loader:
    """Batches of so many records, in an order drawn by `settings.seed`. `section` is the settings' name, for messages.

    Raises:
      UserError: sets that are missing, of another tokenizer, or of longer records than the model reads.
    """
    data = replace(source.config.data, sets=settings.sets or source.config.data.sets)
    sets = replace(source.config, data=data).mixture
    if not sets:
        raise UserError(
            f"no calibration text: name a prepared set with --config.{section}.sets=FOLDER; to make one, "
            "spectra prepare TEXTS --out=FOLDER --tokenizer=RUN/tokenizer.json"
        )
    T = Manifest.load(Path(sets[0][0])).T
    if T > data.T:
        raise UserError(
            f"{sets[0][0]} holds records of {T} tokens, the model reads {data.T}; prepare it again with "
            f"--context={data.T} or less"
        )
    loader = Loader(sets, split="train", T=T, B=batch, V=source.config.model.V, seed=settings.seed)
    loader.check_tokenizer(source.tokenizer)
    return loader
