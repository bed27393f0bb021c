"""`spectra compare`: quality against size for any runs, as one table and one picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectra_jax.analysis.plots import bits_versus_loss
from spectra_jax.data import sources
from spectra_jax.errors import UserError
from spectra_jax.evaluate.perplexity import Quality, short_names
from spectra_jax.evaluate.report import evaluate_sets
from spectra_jax.evaluate.windows import evaluate_texts
from spectra_jax.model.parameters import block_matrices, count
from spectra_jax.progress import human
from spectra_jax.serve.load import Loaded, load
from spectra_jax.weights.form import FLOAT_BITS, is_form, size_in_bits

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

    Args:
      sets: one prepared set, by default the first that each model was trained on.
      texts: sources of documents instead, evaluated by windows of `context` and `stride`.

    Raises:
      UserError: as `load` and the evaluations, or both kinds of text.
    """
    if len(sets) + bool(texts) > 1:
        raise UserError("one quality for each model: give one prepared set, or texts")
    rows = []
    for name, checkpoint in zip(short_names([text.rstrip("/") for text in checkpoints]), checkpoints, strict=True):
        model = load(checkpoint)
        if texts:
            documents = [text for path in sources.expand(texts) for text in sources.documents(path)]
            quality = evaluate_texts(model, documents, context=context, stride=stride)
        else:
            data = sets[0] if sets else next((path for path, _ in model.config.mixture), None)
            if data is None:
                raise UserError(f"{checkpoint} was not trained here on a prepared set; give --sets or --texts")
            quality = evaluate_sets(model, [data])[data]
        rows.append(row(name, model, quality))
    if out is not None:
        bits_versus_loss([{**r, "bits": r["stored_bits"]} for r in rows], out)
    return table(rows)


def row(name: str, model: Loaded, quality: Quality) -> dict[str, Any]:
    """One model, JSON-ready: its size in bits by both accounts, and its quality."""
    stored, paper = size_in_bits(model.parameters)
    matrices, c = block_matrices(model.parameters).values(), model.config
    in_matrices = sum(w.stored_bits() if is_form(w) else FLOAT_BITS * w.size for w in matrices)
    weights = sum(w.weights if is_form(w) else w.size for w in matrices)
    return {
        "name": name, "parameters": count(c.model).total,
        # Rivals get a line each in the picture.
        "family": f"{c.family} {c.quantize.method}" if c.quantize.method not in ("none", "gptq") else c.family,
        "bits_per_weight": in_matrices / weights, "stored_bits": stored, "paper_bits": paper, "loss": quality.loss,
        "loss_se": quality.loss_error, "perplexity": quality.perplexity,
        "bits_per_byte": quality.bits_per_byte, "bits_per_byte_se": quality.bits_per_byte_error,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as text."""
    wide = max(len("model"), *(len(r["name"]) for r in rows))
    lines = [
        f"{'model':<{wide}} {'parameters':>11} {'per weight':>10} {'stored bits':>11} {'paper bits':>10} {'loss':>17} "
        f"{'perplexity':>10} {'bits/byte':>17}"
    ]
    for r in rows:
        lines.append(
            f"{r['name']:<{wide}} {r['parameters']:>11,} {r['bits_per_weight']:>10.3f} {human(r['stored_bits']):>11} "
            f"{human(r['paper_bits']):>10} {r['loss']:>8.4f} +- {r['loss_se']:.4f} {r['perplexity']:>10.2f} "
            f"{r['bits_per_byte']:>8.4f} +- {r['bits_per_byte_se']:.4f}"
        )
    return "\n".join([*lines, FOOT])


if __name__ == "__main__":
    from spectra_jax.cli import main

    main("compare")
