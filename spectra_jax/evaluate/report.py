"""`spectra evaluate`: the quality of a checkpoint on prepared sets, texts and questions, as tables."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from jaxtyping import Float

from spectra_jax.data import sources
from spectra_jax.data.loader import Loader
from spectra_jax.evaluate.perplexity import Quality, make_losses, quality, sequence_losses, short_names
from spectra_jax.evaluate.tasks import TaskQuality, evaluate_tasks, read_items
from spectra_jax.evaluate.windows import TextQuality, evaluate_texts
from spectra_jax.serve.load import Loaded, load
from spectra_jax.sharding import batch_sharding
from spectra_jax.weights.prepared import prepare


def losses_on(
    model: Loaded, sets: Sequence[str], split: str = "validation", sequences: int | None = None
) -> dict[str, tuple[Float[np.ndarray, "_"], Quality]]:
    """For each prepared set the losses of its sequences in stored order, and their mean with its error.

    Raises:
      UserError: a set does not fit the model (context, vocabulary) or is damaged.
    """
    config, sharding = model.config, batch_sharding(model.mesh)
    program = jax.jit(make_losses(model.graphdef, config.train.loss_chunks))
    found = {}
    with jax.set_mesh(model.mesh):
        for path in sets:
            loader = Loader(
                [(path, 1.0)], split=split, T=config.data.T, B=config.data.batch, V=config.model.V, seed=config.seed
            )
            loader.check_tokenizer(model.tokenizer)
            losses = sequence_losses(program, model.parameters, loader, sharding, sequences)
            found[str(path)] = losses, quality(losses, loader.manifests[0].splits[split], loader.T)
    return found


def evaluate_sets(
    model: Loaded, sets: Sequence[str], split: str = "validation", sequences: int | None = None
) -> dict[str, Quality]:
    """Quality of a loaded model on each prepared set.

    Raises:
      UserError: as `losses_on`.
    """
    return {path: found for path, (_, found) in losses_on(model, sets, split, sequences).items()}


def evaluate_checkpoint(
    checkpoint: str, sets: Sequence[str] | None, split: str, sequences: int | None, *,
    texts: Sequence[str] = (), context: int | None = None, stride: int | None = None, text_key: str = "text",
    tasks: Sequence[str] = (), limit: int | None = None, weights: str = "dense",
) -> str:
    """Tables with standard errors: prepared sets, whole texts, tasks, each where it is asked for.

    Args:
      sets: prepared sets; by default, where there are no texts and tasks either, those the model was trained on.
      texts: sources of documents as `spectra prepare` takes them, evaluated by windows of `context` and `stride`.
      tasks: files of questions; the first `limit` of each task.
      weights: "dense", or by the packed product (`weights/prepared.py`).

    Raises:
      UserError: as `load`, `prepare`, `evaluate_sets`, `evaluate_texts`, `read_items` and `evaluate_tasks`.
    """
    paths = sources.expand(texts) if texts else []
    items = [item for path in tasks for item in read_items(path, limit)]
    model = load(checkpoint)
    with jax.set_mesh(model.mesh):
        parameters, by = prepare(model.parameters, weights)
    model, parts = replace(model, parameters=parameters), []
    title = f"{model.config.family} {model.config.name}, step {model.step}"
    title += f", weights by {by!r}" if weights != "dense" else ""
    if sets or not (texts or tasks):
        title += f", split {split}"
        names = sets or [path for path, _ in model.config.mixture]
        parts += _set_table(evaluate_sets(model, names, split, sequences))
    if paths:
        parts += _text_table({
            path: evaluate_texts(model, sources.documents(path, text_key=text_key), context=context, stride=stride)
            for path in paths
        })
    if items:
        parts += _task_table(evaluate_tasks(model, items))
    return "\n".join([title, *parts])


def _set_table(found: dict[str, Quality]) -> list[str]:
    head = f"{'set':<24} {'tokens':>12} {'loss':>17} {'perplexity':>18} {'bits/byte':>17}"
    return [head] + [f"{name:<24} {_cells(q)}" for name, q in zip(short_names(list(found)), found.values())]


def _text_table(found: dict[str, TextQuality]) -> list[str]:
    head = f"{'text':<24} {'tokens':>12} {'loss':>17} {'perplexity':>18} {'bits/byte':>17} {'documents':>10}"
    return [head] + [
        f"{name:<24} {_cells(q)} {q.documents:>10,}" for name, q in zip(short_names(list(found)), found.values())
    ]


def _cells(q: Quality) -> str:
    return (
        f"{q.tokens:>12,} {q.loss:>8.4f} +- {q.loss_error:.4f} "
        f"{q.perplexity:>9.3f} +- {q.perplexity_error:.3f} {q.bits_per_byte:>8.4f} +- {q.bits_per_byte_error:.4f}"
    )


def _task_table(found: Sequence[TaskQuality]) -> list[str]:
    rows = [f"{'task':<24} {'items':>12} {'metric':>12} {'value':>17}"]
    for task in found:
        for metric in task.metrics:
            rows.append(f"{task.task:<24} {task.items:>12,} {metric.name:>12} "
                        f"{metric.value:>8.4f} +- {metric.error:.4f}")
    return rows
