"""What a run tells about itself: metrics.jsonl with its mirrors.

metrics.jsonl in the workdir is the primary record; TensorBoard and W&B only mirror it.
"""

import json
import math
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from spectra_jax.errors import UserError

FILE = "metrics.jsonl"
KINDS = ("train", "eval", "weights", "event", "time")


class MetricsWriter:
    """Appends records to `workdir/metrics.jsonl`, mirrored to TensorBoard and W&B if asked.

    A record is one line of strict JSON: `{"step": 10, "kind": "train", "loss": 3.2, ...}`. Nested
    values are flattened (`{"q": {"zeros": 0.3}}` -> `"q/zeros": 0.3`). JSON has no NaN or infinity:
    such a value is written as null and its key listed under "nonfinite"; a plain null was None.

    resume_step: the step training continues from. Records beyond it are dropped (they will be
    written again), as is a torn last line; -1 drops everything. None keeps all whole records.
    enabled: False on every process but the first, where each call then does nothing.

    Raises UserError if the file cannot be written or is damaged, or a mirror is not installed.
    """

    def __init__(
        self,
        workdir: Path | str,
        *,
        tensorboard: bool = False,
        wandb: bool = False,
        run_name: str | None = None,
        config: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        enabled: bool = True,
    ):
        self._path = Path(workdir) / FILE
        self._file = None
        self._mirrors: list[_TensorBoard | _WandB] = []
        if not enabled:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.is_file():
                _truncate(self._path, resume_step)
            if tensorboard:
                self._mirrors.append(_TensorBoard(self._path.parent, resume_step))
            if wandb:
                self._mirrors.append(_WandB(self._path.parent, run_name, config))
            # Unbuffered: a record is with the operating system, safe from kill -9, once written.
            self._file = open(self._path, "ab", buffering=0)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        """Append one record. Values: numbers, 0-d arrays, strings, None, or mappings of these."""
        if self._file is None:
            return
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not one of {KINDS}")
        flat = dict(_flatten(values))
        if reserved := flat.keys() & {"step", "kind", "nonfinite"}:
            raise ValueError(f"metrics may not be named {sorted(reserved)}")
        lost = [k for k, v in flat.items() if isinstance(v, float) and not math.isfinite(v)]
        record = {"step": step, "kind": kind} | flat | dict.fromkeys(lost)
        if lost:
            record["nonfinite"] = lost
        line = memoryview(json.dumps(record, allow_nan=False).encode() + b"\n")
        before = os.fstat(self._file.fileno()).st_size
        try:
            while line:  # an unbuffered write may take only part of the line
                line = line[self._file.write(line) :]
        except OSError as error:
            with suppress(OSError):  # a pipe or a device cannot be cut
                self._file.truncate(before)  # whoever goes on writing must not do so behind half a line
            raise _unwritable(self._path, error) from error
        for mirror in self._mirrors:
            mirror.write(step, kind, flat)

    def event(self, step: int, name: str, **values: Any) -> None:
        """Record that something happened, e.g. "peak lowered", "step skipped: spike"."""
        self.write(step, "event", {"name": name} | values)

    def flush(self) -> None:
        """Force the records to disk: call before a checkpoint of their steps is committed."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the mirrors; a second call does nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        while self._mirrors:
            self._mirrors.pop().close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(workdir: Path | str) -> list[dict[str, Any]]:
    """All records of `workdir/metrics.jsonl`, in file order; nonfinite values come as None.

    A torn last line (a crash while writing) is ignored. Raises UserError if the file is missing or
    damaged anywhere else.
    """
    path = Path(workdir) / FILE
    try:
        return [record for _, record in _whole_lines(path)]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """(raw line, record) of every line; only a last line without its newline may be broken."""
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            record = json.loads(line)
            if not (isinstance(record, dict) and isinstance(record.get("step"), int)):
                raise ValueError("not an object with an integer step")
        except ValueError as error:  # bad JSON and bad UTF-8 included
            if not line.endswith(b"\n"):
                return
            raise UserError(
                f"{path}, line {number} is damaged ({error}); only a torn last line is expected "
                "after a crash. Remove that line or restore the file"
            ) from error
        yield line.rstrip(b"\r\n") + b"\n", record


def _truncate(path: Path, last_step: int | None) -> None:
    """Rewrite `path` atomically without a torn last line and without records beyond `last_step`."""
    kept = [
        line for line, record in _whole_lines(path)
        if last_step is None or record["step"] <= last_step
    ]
    content = b"".join(kept)
    if content != path.read_bytes():
        _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    """Write a whole file so that its name never stands for half of it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"cannot write {path}: {error.strerror}; free some space or use a --workdir open to you"
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested mappings as ("a/b", Python scalar)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield prefix + key, value.item() if hasattr(value, "item") else value


class _TensorBoard:
    """Event files under `workdir/tensorboard`, tags "train/loss" and so on."""

    def __init__(self, workdir: Path, resume_step: int | None):
        try:
            import tensorboardX
        except ImportError as error:
            raise UserError(
                "the TensorBoard mirror needs tensorboardX; pip install tensorboardX"
            ) from error
        # purge_step makes TensorBoard forget what a crashed run showed beyond the restored step.
        purge = None if resume_step is None else resume_step + 1
        self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=purge)

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(f"{kind}/{key}", value, step)
            elif value is not None:
                self._writer.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    """A W&B run; its id is kept in `workdir/wandb_id`, so that a resumed run continues its page."""

    def __init__(self, workdir: Path, name: str | None, config: Mapping[str, Any] | None):
        try:
            import wandb
        except ImportError as error:
            raise UserError("the W&B mirror needs wandb; pip install wandb") from error
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            _replace(id_file, uuid.uuid4().hex[:12].encode())
        try:
            self._run = wandb.init(
                project="spectra_jax",
                name=name,
                id=id_file.read_text().strip(),
                dir=str(workdir),
                config=dict(config or {}),
                resume="allow",
                settings=wandb.Settings(silent=True),  # its chatter would break the progress line
            )
        except wandb.errors.Error as error:
            raise UserError(
                f"W&B did not start ({error}); run `wandb login`, or set WANDB_MODE=offline"
            ) from error
        # W&B's own step only counts up; a resumed run goes back, so ours is the x axis.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, kind: str, values: Mapping[str, Any]) -> None:
        shown = {f"{kind}/{key}": value for key, value in values.items() if value is not None}
        self._run.log({"step": step} | shown)

    def close(self) -> None:
        self._run.finish()
