"""`spectra evaluate`: the quality of a checkpoint on named prepared sets, as a table."""

from collections.abc import Sequence

import jax

from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.evaluate.perplexity import Quality, evaluate, make_sums, short_names
from spectra_jax.serve.load import Loaded, load
from spectra_jax.sharding import batch_sharding


def evaluate_sets(
    model: Loaded, sets: Sequence[str], split: str = "validation", sequences: int | None = None
) -> dict[str, Quality]:
    """Quality of a loaded model on each prepared set.

    Raises:
      UserError: a set does not fit the model (context, vocabulary) or is damaged.
    """
    config, sharding = model.config, batch_sharding(model.mesh)
    sums = jax.jit(make_sums(model.graphdef, config.train.loss_chunks))
    found = {}
    with jax.set_mesh(model.mesh):
        for path in sets:
            loader = Loader(
                [(path, 1.0)], split=split, T=config.data.T, B=config.data.batch, V=config.model.V, seed=config.seed
            )
            used = loader.manifests[0].tokenizer["sha256"]
            if used != model.tokenizer.sha256:
                raise UserError(
                    f"{path} was tokenized with another tokenizer (sha256 {used[:12]}) than the model's "
                    f"({model.tokenizer.sha256[:12]}); prepare it with --tokenizer=WORKDIR/tokenizer.json"
                )
            found[str(path)] = evaluate(sums, model.parameters, loader, sharding, sequences)
    return found


def evaluate_checkpoint(
    checkpoint: str, sets: Sequence[str] | None, split: str, sequences: int | None
) -> str:
    """A table: loss, perplexity and bits per byte with standard errors over sequences.

    Raises:
      UserError: as `load` and `evaluate_sets`.
    """
    model = load(checkpoint)
    paths = sets or [path for path, _ in model.config.mixture]
    found = evaluate_sets(model, paths, split, sequences)
    lines = [
        f"{model.config.family} {model.config.name}, step {model.step}, split {split}",
        f"{'set':<24} {'tokens':>12} {'loss':>17} {'perplexity':>18} {'bits/byte':>17}",
    ]
    for name, q in zip(short_names(list(found)), found.values()):
        lines.append(
            f"{name:<24} {q.tokens:>12,} {q.loss:>8.4f} +- {q.loss_error:.4f} "
            f"{q.perplexity:>9.3f} +- {q.perplexity_error:.3f} {q.bits_per_byte:>8.4f} +- {q.bits_per_byte_error:.4f}"
        )
    return "\n".join(lines)
