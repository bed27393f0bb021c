"""A trained float model to a smaller one that is a run like any other: LLM-Pruner (arXiv 2305.11627).

What the reference does besides and cannot be had here, where one scan runs over layers of equal shape: to spare the
first and last layers (the paper prunes 4 to 29 of 32), or to choose among all layers at once, leave layers of
different widths. Its recovery by LoRA is training here: configs/finetune.py.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float, Int

from spectra_jax import config as configs
from spectra_jax.calibration import calibration_loader
from spectra_jax.checks import check
from spectra_jax.data.loader import Loader
from spectra_jax.errors import UserError
from spectra_jax.made import refuse_existing, write_made
from spectra_jax.model.parameters import block_matrices, count, with_matrices
from spectra_jax.prune.groups import Group, check_names, groups_of, smaller
from spectra_jax.prune.importance import CRITERIA, channels, mean_gradients
from spectra_jax.record import make_record
from spectra_jax.schema import Config, Prune
from spectra_jax.serve.load import Loaded, load
from spectra_jax.stored import parse_checkpoint
from spectra_jax.train.workdir import read_config, read_fingerprint
from spectra_jax.weights import get_rule

RANDOM = "random"  # what a criterion has to beat


def prune(checkpoint: str, config: Config, out: Path | str) -> Path:
    """Makes the run `out` of a float checkpoint `WORKDIR[@STEP]`, with fewer heads and channels in every layer.

    Args:
      config: its `prune`, `family` and `name` are used; the rest is the checkpoint's.

    Raises:
      UserError: a model that is not float, calibration text that does not fit or does not suffice, a ratio by which
        nothing or everything goes, or `out` exists.
    """
    out, p = Path(out), config.prune
    check_names(p, [*CRITERIA, RANDOM])
    refuse_existing(out)
    source = load(checkpoint)
    m = source.config.model
    if get_rule(m.weight).quantized or source.record.get("forms"):
        raise UserError(f"{checkpoint} is quantized ({source.config.family}); prune a float model, then quantize that")
    groups, matrices = groups_of(m), block_matrices(source.parameters)
    workdir, _ = parse_checkpoint(checkpoint)
    with jax.set_mesh(source.mesh):
        importance, fingerprint = importance_of(groups, source, p)
        kept = [group.kept(each, p) for group, each in zip(groups, importance)]
        made = check(replace(
            read_config(workdir), family=config.family, name=config.name, prune=p, model=smaller(m, kept)
        ))
        cut = {}
        for group, stay in zip(groups, kept):
            for key in group.keys:
                w = matrices[key]
                cut[key] = jax.device_put(group.cut(np.asarray(w), key, stay), w.sharding)
        parameters = {**source.parameters, "blocks": with_matrices(source.parameters["blocks"], cut)}
        before, after = count(m).total, count(made.model).total
        content = make_record(configs.to_dict(made), source.record["tokens"], fingerprint) | {
            "pruned": {"of": str(checkpoint), "step": source.step, "parameters": [before, after], **asdict(p)}
        }
        write_made(
            out, made, parameters, content, (workdir / "tokenizer.json").read_text("utf-8"), step=source.step,
            fingerprint=read_fingerprint(workdir),
        )
    changes = ", ".join(f"{name} {getattr(m, name)} -> {getattr(made.model, name)}" for name in "NKF")
    print(f"{changes}; parameters {before:,} -> {after:,} ({after / before - 1:+.1%})", file=sys.stderr, flush=True)
    return out


def importance_of(
    groups: Sequence[Group], source: Loaded, p: Prune
) -> tuple[list[Float[np.ndarray, "L _"]], str]:
    """Of the groups of each kind, and what identifies the text that told; "" where none is read.

    Raises:
      UserError: as `calibration_loader`, or too few records.
    """
    if p.criterion == RANDOM:
        rng = np.random.default_rng(p.seed)
        return [rng.random((source.config.model.L, group.count)) for group in groups], ""
    matrices, criterion = block_matrices(source.parameters), CRITERIA[p.criterion]
    gradients = fisher = None
    fingerprint = ""
    if criterion.gradient:
        loader = sample_loader(source, p)
        gradients, fisher = mean_gradients(source, samples(loader, p), fisher=criterion.fisher)
        fingerprint = loader.fingerprint
    found = channels(matrices, gradients, fisher, p.criterion)
    return [group.importance(found, p.reduction) for group in groups], fingerprint


def sample_loader(source: Loaded, p: Prune) -> Loader:
    """What `samples` reads.

    Raises:
      UserError: as `calibration_loader`, or too few records.
    """
    loader = calibration_loader(source, p, batch=1, section="prune")
    if p.samples > len(loader):
        raise UserError(f"config.prune.samples={p.samples} is more than the {len(loader)} records of {loader.T} tokens "
                        f"in {', '.join(map(str, loader.folders))}; use at most those, or prepare more text")
    return loader


def samples(loader: Loader, p: Prune) -> Iterator[Int[np.ndarray, "1 T1"]]:
    """The records that gradients are taken on, from their beginnings."""
    length = min(p.tokens or loader.T, loader.T) + 1
    return (loader.batch_at(step)[:, :length] for step in range(p.samples))
