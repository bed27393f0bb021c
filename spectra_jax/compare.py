"""`spectra compare`: quality against size for any runs, as one table and one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from spectra_jax.analysis.plots import bits_versus_loss
from spectra_jax.analysis.sizes import sizes
from spectra_jax.data import sources
from spectra_jax.data.manifest import Manifest
from spectra_jax.errors import UserError
from spectra_jax.evaluate.perplexity import Quality, short_names, standard_error
from spectra_jax.evaluate.report import losses_on
from spectra_jax.evaluate.windows import evaluate_texts
from spectra_jax.progress import human
from spectra_jax.serve.load import Loaded, load

FOOT = (
    "stored bits: codes, scales, zeros and maps as they are, everything else at 16 bits a value; per weight: of the "
    "block matrices alone\npaper bits: as the method's paper counts them (Spectra, Table 4: norms and ungrouped scales "
    "not at all)"
)


def compare(
    checkpoints: Sequence[str], out: Path | str | None, *, sets: Sequence[str] = (), texts: Sequence[str] = (),
    context: int | None = None, stride: int | None = None,
) -> str:
    """The table; the picture goes to `out`.

    Models that read the same sequences are compared one by one: the loss above that of the first model, with the error
    of that difference, which is much smaller than that of either loss.

    Args:
      sets: one prepared set, by default the first that each model was trained on.
      texts: sources of documents instead, evaluated by windows of `context` and `stride`.

    Raises:
      UserError: as `load` and the evaluations, or both kinds of text.
    """
    if len(sets) + bool(texts) > 1:
        raise UserError("one quality for each model: give one prepared set, or texts")
    rows, first = [], None
    for name, checkpoint in zip(short_names([text.rstrip("/") for text in checkpoints]), checkpoints, strict=True):
        model = load(checkpoint)
        if texts:
            documents = [text for path in sources.expand(texts) for text in sources.documents(path)]
            rows.append(row(name, model, evaluate_texts(model, documents, context=context, stride=stride)))
            continue
        data = sets[0] if sets else next((path for path, _ in model.config.mixture), None)
        if data is None:
            raise UserError(f"{checkpoint} was not trained here on a prepared set; give --sets or --texts")
        losses, quality = losses_on(model, [data])[data]
        rows.append(row(name, model, quality))
        read = Manifest.load(Path(data)).fingerprint
        first = first or (read, losses)
        if read == first[0]:
            rows[-1] |= above(losses, first[1])
    if out is not None:
        bits_versus_loss([{**r, "bits": r["stored_bits"]} for r in rows], out)
    return table(rows)


def above(losses: Float[np.ndarray, "S"], others: Float[np.ndarray, "S"]) -> dict[str, float]:
    """The mean difference of two models' losses on the same sequences, and its standard error."""
    return {"above": float(np.mean(losses - others)), "above_se": standard_error(losses - others)}


def row(name: str, model: Loaded, quality: Quality) -> dict[str, Any]:
    """One model, JSON-ready: its size in bits by both accounts, and its quality."""
    return {
        "name": name, **sizes(model.config, model.parameters), "loss": quality.loss, "loss_se": quality.loss_error,
        "perplexity": quality.perplexity, "bits_per_byte": quality.bits_per_byte,
        "bits_per_byte_se": quality.bits_per_byte_error,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text."""
    wide = max(len("model"), *(len(r["name"]) for r in rows))
    lines = [
        f"{'model':<{wide}} {'parameters':>11} {'per weight':>10} {'stored bits':>11} {'paper bits':>10} {'loss':>17} "
        f"{'perplexity':>10} {'bits/byte':>17}"
        + (f"{'above the first':>20}" if any("above" in r for r in rows) else "")
    ]
    for r in rows:
        lines.append(
            f"{r['name']:<{wide}} {r['parameters']:>11,} {r['bits_per_weight']:>10.3f} {human(r['stored_bits']):>11} "
            f"{human(r['paper_bits']):>10} {r['loss']:>8.4f} +- {r['loss_se']:.4f} {r['perplexity']:>10.2f} "
            f"{r['bits_per_byte']:>8.4f} +- {r['bits_per_byte_se']:.4f}"
            + (f" {r['above']:>9.4f} +- {r['above_se']:.4f}" if "above" in r else "")
        )
    return "\n".join([*lines, FOOT])


if __name__ == "__main__":
    from spectra_jax.cli import main

    main("compare")
