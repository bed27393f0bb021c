"""The project from Python: what the commands do, with frames in place of printed tables.

Each is called as `spectra_jax.NAME`. A config is the name of a file as on the command line (`configs/trilm.py:99m`), a
ConfigDict such as its `get_config` returns, or a Config; `overrides` are what `--config.KEY=VALUE` would be.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from spectra_jax import config as configs
from spectra_jax.analysis import runs
from spectra_jax.data import prepare as preparing
from spectra_jax.data import sources
from spectra_jax.errors import UserError
from spectra_jax.evaluate.perplexity import Quality, short_names
from spectra_jax.evaluate.report import evaluate_sets
from spectra_jax.evaluate.tasks import evaluate_tasks, read_items
from spectra_jax.evaluate.windows import evaluate_texts
from spectra_jax.interop import importing
from spectra_jax.plan import table as plans
from spectra_jax.prune import pipeline as pruning
from spectra_jax.quantize import pipeline
from spectra_jax.schema import Config
from spectra_jax.serve.load import load
from spectra_jax.train import loop


def config_of(config: Any, overrides: Mapping[str, Any] = {}) -> Config:
    """The frozen config: from `FILE.py[:ARG]`, a ConfigDict or a Config, with values changed.

    Raises:
      UserError: no such file, an unknown key (the nearest is named), or a value that breaks a rule.
    """
    texts = [f"{key}={_text(value)}" for key, value in overrides.items()]
    if isinstance(config, str | Path):
        return configs.load(str(config), texts)
    return configs.override(config if isinstance(config, Config) else configs.from_config_dict(config), texts)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def prepare(
    texts: Sequence[str | Path], out: str | Path, *, tokenizer: str, context: int = 2048, licence: str = "unknown",
    **options: Any,
) -> pd.DataFrame:
    """Tokenizes texts into the prepared set `out`; its splits, one row each: documents, tokens, records, bytes.

    Args:
      options: those of `spectra_jax.data.prepare.prepare`, such as validation_percent.

    Raises:
      UserError: as that function.
    """
    manifest = preparing.prepare(list(texts), out, tokenizer=tokenizer, T=context, licence=licence, **options)
    return pd.DataFrame([
        {"split": name, "documents": s.documents, "tokens": s.tokens, "records": s.records, "bytes": s.bytes}
        for name, s in manifest.splits.items()
    ])


def train(
    config: Any, workdir: str | Path, overrides: Mapping[str, Any] = {}, *, accept_changes: bool = False
) -> pd.DataFrame:
    """Trains a model in `workdir`, or goes on with it; its training records, one row each (step, tokens, loss, ...).

    Raises:
      UserError: as `config_of`, or a run that cannot be trained.
      Stopped: SIGTERM or SIGINT came; the same call goes on.
    """
    loop.train(config_of(config, overrides), workdir, accept_changes=accept_changes)
    return runs.records(workdir, "train")


def import_model(model: str | Path, out: str | Path, **options: Any) -> Path:
    """Makes the run `out` of a Llama-shaped model: a Hugging Face folder or a .gguf file; where it is.

    Args:
      options: those of `spectra_jax.interop.importing.import_model`.

    Raises:
      UserError: as that function.
    """
    return importing.import_model(model, out, **options)


def quantize(
    checkpoint: str | Path, config: Any, out: str | Path, overrides: Mapping[str, Any] = {}
) -> Path:
    """Makes the quantized run `out` of a float one; where it is.

    Raises:
      UserError: as `config_of` and `spectra_jax.quantize.pipeline.quantize`.
    """
    return pipeline.quantize(str(checkpoint), config_of(config, overrides), out)


def prune(
    checkpoint: str | Path, config: Any, out: str | Path, overrides: Mapping[str, Any] = {}
) -> Path:
    """Makes the run `out` of a float one, with fewer heads and channels; where it is.

    Raises:
      UserError: as `config_of` and `spectra_jax.prune.pipeline.prune`.
    """
    return pruning.prune(str(checkpoint), config_of(config, overrides), out)


def evaluate(
    checkpoints: str | Path | Sequence[str | Path], *, sets: Sequence[str | Path] = (),
    texts: Sequence[str | Path] = (), tasks: Sequence[str | Path] = (), split: str = "validation",
    sequences: int | None = None, limit: int | None = None, context: int | None = None, stride: int | None = None,
) -> pd.DataFrame:
    """Quality of checkpoints, one row for each of them, text and metric: model, step, on, metric, value, error.

    Args:
      checkpoints: WORKDIR[@STEP], one or several.
      sets: prepared sets; by default, without texts and tasks, those that the model was trained on.
      sequences: of each set, at most. limit: items of each task, at most.
      texts: whole documents, by windows of `context` and `stride`. tasks: files of questions.

    Raises:
      UserError: no such checkpoint or file, or text that does not fit the model.
    """
    named = [str(checkpoints)] if isinstance(checkpoints, str | Path) else [str(one) for one in checkpoints]
    rows = []
    for name, checkpoint in zip(short_names([text.rstrip("/") for text in named]), named):
        model = load(checkpoint)
        found: dict[str, dict[str, tuple[float, float]]] = {}
        paths = [str(path) for path in sets] or [path for path, _ in model.config.mixture]
        if sets or not (texts or tasks):
            if not paths:
                raise UserError(f"{checkpoint} was not trained here on a prepared set; name sets, texts or tasks")
            for path, quality in evaluate_sets(model, paths, split, sequences).items():
                found[Path(path).name] = _metrics(quality)
        for path in sources.expand([str(path) for path in texts]) if texts else ():
            quality = evaluate_texts(model, sources.documents(path), context=context, stride=stride)
            found[Path(path).name] = _metrics(quality)
        items = [item for path in tasks for item in read_items(path, limit)]
        for task in evaluate_tasks(model, items) if items else ():
            found[task.task] = {metric.name: (metric.value, metric.error) for metric in task.metrics}
        rows += [
            {"model": name, "step": model.step, "on": on, "metric": metric, "value": value, "error": error}
            for on, metrics in found.items() for metric, (value, error) in metrics.items()
        ]
    return pd.DataFrame(rows)


def _metrics(q: Quality) -> dict[str, tuple[float, float]]:
    return {
        "loss": (q.loss, q.loss_error), "perplexity": (q.perplexity, q.perplexity_error),
        "bits_per_byte": (q.bits_per_byte, q.bits_per_byte_error),
    }


def plan(
    config: Any, topologies: str | Sequence[str], overrides: Mapping[str, Any] = {}, *, search: int = 0
) -> pd.DataFrame:
    """A run on accelerators that are not here, by arithmetic, one row each (`spectra_jax.plan.table.rows`).

    Args:
      topologies: such as "v5p-128", "v5e:4x4" or "h100:8*4".
      search: so many of the best meshes, microbatches and remats of each, in place of the config's own.

    Raises:
      UserError: as `config_of`, an unknown topology, or nothing that fits.
    """
    names = [topologies] if isinstance(topologies, str) else list(topologies)
    return pd.DataFrame(plans.rows(config_of(config, overrides), names, best=search))
