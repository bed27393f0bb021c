"""The folder of a run: its config, and whether a run may go on in it.

config.json says what the run is; metrics.jsonl what happened; checkpoints/ what it learnt; tokenizer.json how to
read it.
"""

import json
from pathlib import Path

import jax

from spectra_jax import config as configs
from spectra_jax.data.loader import Loader
from spectra_jax.data.manifest import write_text
from spectra_jax.errors import UserError
from spectra_jax.schema import Config

# Sections and keys that a resumed run may change: they decide what is written down and where it runs, not what is
# learnt. (Another mesh changes the last bits of the loss: sums are taken in another order.)
FREE = (
    "mesh.", "checkpoint.", "evaluate.", "metrics.", "data.sets", "data.read_threads", "train.stuck_seconds",
    "train.heartbeat_seconds", "train.compile_cache", "name",
)


def open_workdir(workdir: Path, config: Config, loader: Loader, accept_changes: bool) -> None:
    """Writes config.json and tokenizer.json, after checking them against a run that is there already.

    Raises:
      UserError: the folder holds a run with another config or other data, or cannot be written.
    """
    path = workdir / "config.json"
    if path.is_file() and not accept_changes:
        _refuse_changes(path, config, loader)
    if jax.process_index() != 0:
        return
    source = loader.manifests[0].tokenizer_file
    try:
        tokenizer = source.read_text("utf-8")
    except OSError as error:
        raise UserError(f"cannot read {source}: {error.strerror}; copy the prepared set again") from error
    write_run(workdir, config, fingerprint=loader.fingerprint, tokenizer=tokenizer)


def write_run(workdir: Path, config: Config, *, fingerprint: str, tokenizer: str) -> None:
    """Writes config.json and tokenizer.json (its text).

    Raises:
      UserError: the folder cannot be written.
    """
    content = {
        "family": config.family,
        "name": config.name,
        "data_fingerprint": fingerprint,
        "config": configs.to_dict(config),
    }
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(workdir / "config.json", json.dumps(content, indent=1) + "\n", workdir)
        write_text(workdir / "tokenizer.json", tokenizer, workdir)
    except OSError as error:
        raise UserError(f"cannot write to {workdir}: {error.strerror}; use another --workdir") from error


def config_changes(workdir: Path, config: Config) -> list[str]:
    """Where `config` differs from that of the run in `workdir`, among what decides the run's numbers.

    Raises:
      UserError: there is no run, or its config.json is damaged or of another version.
    """
    return [line for line in configs.differences(read_config(workdir), config) if not line.startswith(FREE)]


def read_config(workdir: Path | str) -> Config:
    """The config of the run in `workdir`.

    Raises:
      UserError: there is no run, or its config.json is damaged or of another version.
    """
    return configs.from_dict(_read(Path(workdir) / "config.json")["config"])


def read_fingerprint(workdir: Path | str) -> str:
    """What identifies the data of the run in `workdir`; "" for a model that came from elsewhere.

    Raises:
      UserError: as `read_config`.
    """
    return _read(Path(workdir) / "config.json")["data_fingerprint"]


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path.parent} holds no run: it has no config.json (made by `spectra train`)")
    try:
        content = json.loads(path.read_text())
        if not (isinstance(content["config"], dict) and isinstance(content["data_fingerprint"], str)):
            raise ValueError("config is not an object, or data_fingerprint no text")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); restore it or use another --workdir") from error
    return content


def _refuse_changes(path: Path, config: Config, loader: Loader) -> None:
    changes, fingerprint = config_changes(path.parent, config), _read(path)["data_fingerprint"]
    if fingerprint != loader.fingerprint:
        changes.append(f"data fingerprint: {fingerprint[:12]} -> {loader.fingerprint[:12]}")
    if changes:
        raise UserError(
            f"{path.parent} holds another run; these differ:\n  " + "\n  ".join(changes)
            + "\nuse a new --workdir, or --accept-changes to continue this run with the new values"
        )
