"""`spectra train`: composition of data, step, checkpoints, evaluation and metrics."""

import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from spectra_jax import config as configs
from spectra_jax import hardware
from spectra_jax.checkpoint import Checkpoints
from spectra_jax.data.loader import Loader
from spectra_jax.distributed import Vote
from spectra_jax.errors import Stopped, UserError
from spectra_jax.evaluate.perplexity import combined, evaluate, make_losses, short_names
from spectra_jax.metrics import FILE, MetricsWriter
from spectra_jax.metrics import read as read_metrics
from spectra_jax.model.parameters import graphdef_of
from spectra_jax.model.transformer import compute_dtype
from spectra_jax.progress import ProgressLine
from spectra_jax.record import make_record
from spectra_jax.schema import Config
from spectra_jax.sharding import batch_sharding, make_mesh
from spectra_jax.stored import abstract
from spectra_jax.timer import Timer
from spectra_jax.train import goodput
from spectra_jax.train.compile_cache import use_compile_cache
from spectra_jax.train.describe import describe, flops_per_token
from spectra_jax.train.guard import StopRequest, Watchdog, only_run_in
from spectra_jax.train.profile import Profile
from spectra_jax.train.schedule import interventions
from spectra_jax.train.start import check_start, started
from spectra_jax.train.step import State, init_state, make_step
from spectra_jax.train.weight_stats import Codes, make_weight_stats
from spectra_jax.train.workdir import open_workdir
from spectra_jax.weights import get_rule

GO, STOP, FAILED = range(3)  # what a process wishes after a step; the highest wish of all processes is followed


def train(config: Config, workdir: Path | str, *, accept_changes: bool = False) -> dict[str, Any]:
    """Trains to `config.steps`, resuming from the newest checkpoint in `workdir` if there is one.

    On the same mesh every later loss and the final weights are those of a run that was never stopped, bit for bit.

    Returns:
      The last training and evaluation record of metrics.jsonl, as {"train": ..., "eval": ...}.

    Raises:
      UserError: the config, the data, the devices or the workdir do not fit, or too many steps were not finite.
      Stopped: SIGTERM or SIGINT came to one of the processes; the state after the last step is saved.
    """
    began, workdir, mesh = time.time(), Path(workdir), make_mesh(config)
    use_compile_cache(config.train.compile_cache)
    loader, first = make_loader(config, "train"), jax.process_index() == 0
    with jax.set_mesh(mesh), ExitStack() as stack:
        get_rule(config.model.weight), graphdef_of(config.model)  # a bad config fails before anything is written
        check_start(config, loader, workdir)
        if first:
            stack.enter_context(only_run_in(workdir))
        open_workdir(workdir, config, loader, accept_changes)
        watchdog = stack.enter_context(Watchdog(config.train.stuck_seconds))
        with Checkpoints(workdir, config) as checkpoints:  # a save under way is finished, come what may
            start, state = restore_or_init(config, mesh, checkpoints)
            watchdog.kick()
            recorded = first and (workdir / FILE).is_file()  # read before what lies beyond `start` is dropped
            past = goodput.past(read_metrics(workdir) if recorded else (), start, began)
            with (
                MetricsWriter(
                    workdir, tensorboard=config.metrics.tensorboard, wandb=config.metrics.wandb,
                    run_name=config.name, config=configs.to_dict(config), resume_step=start, enabled=first,
                ) as writer,
                ProgressLine(config.steps, enabled=first) as progress,
                Profile(config.metrics, workdir, writer.event, enabled=first) as profile,
                StopRequest() as stop,
            ):
                run = Run(config, mesh, loader, checkpoints, writer, progress, profile, watchdog, stop, past)
                progress.message(describe(config, mesh, run.peak, workdir, start, state["parameters"]))
                run.steps(state, start)
    return last_records(workdir) if first else {}


def last_records(workdir: Path) -> dict[str, Any]:
    """The last record of training and of evaluation, whichever process wrote it."""
    return {record["kind"]: record for record in read_metrics(workdir) if record["kind"] in ("train", "eval")}


def make_loader(config: Config, split: str, mixture: tuple | None = None) -> Loader:
    """The data of a run, or of some of its sets.

    Raises:
      UserError: no sets are named, or they do not fit the config.
    """
    if not config.data.sets:
        raise UserError("config.data.sets is empty; name prepared sets: --config.data.sets=DIR[=WEIGHT],DIR[=WEIGHT]")
    return Loader(
        mixture or config.mixture, split=split, T=config.data.T, B=config.data.batch, V=config.model.V, seed=config.seed
    )


def restore_or_init(config: Config, mesh: Mesh, checkpoints: Checkpoints) -> tuple[int, State]:
    """How many steps are done, and the state after them: from the newest checkpoint, else as a run begins.

    Never both are in memory.
    """
    init, newest = partial(init_state, config), max(checkpoints.steps(), default=0)
    key = jax.random.key(config.seed)
    if newest > config.steps:
        raise UserError(
            f"the workdir's newest checkpoint is of step {newest}, beyond the {config.steps} steps of the config; "
            f"train for at least {newest} steps or use a new --workdir"
        )
    restored = checkpoints.restore_newest(abstract(jax.eval_shape(init, key), mesh))
    return restored or (0, started(config, jax.jit(init)(key)))


@dataclass
class Run:
    """What the loop works with, and the little state that is not in the training state."""

    config: Config
    mesh: Mesh
    loader: Loader
    checkpoints: Checkpoints
    writer: MetricsWriter
    progress: ProgressLine
    profile: Profile
    watchdog: Watchdog
    stop: StopRequest
    past: goodput.Past

    def __post_init__(self):
        config, paths = self.config, [path for path, _ in self.config.mixture]
        self.origin = make_record(configs.to_dict(config), 0, self.loader.fingerprint)  # once: it asks git
        self.vote, self.stalls = Vote(self.mesh), Vote(self.mesh)
        self.sharding = batch_sharding(self.mesh)
        self.interventions = interventions(config)
        self.losses = jax.jit(make_losses(graphdef_of(config.model), config.train.loss_chunks))
        self.held_out = {
            name: make_loader(config, "validation", ((path, 1.0),)) for name, path in zip(short_names(paths), paths)
        } if config.evaluate.every_steps else {}
        self.weight_stats = jax.jit(make_weight_stats(config.model))
        self.codes: Codes | None = None
        self.quantized = get_rule(config.model.weight).quantized and config.metrics.weights_every_steps > 0
        self.weights: dict | None = None
        self.flops = flops_per_token(config)
        self.peak = hardware.total_peak(list(self.mesh.devices.flat), compute_dtype(config.model))
        self.timer = Timer(self.past.at(time.time()))  # the last thing: whatever was before is the start

    def steps(self, state: State, start: int) -> State:
        """Every step from `start` on. Metrics are read one step late, while the next step runs."""
        config, timer = self.config, self.timer
        if start == config.steps:
            return state
        self.write_time(start)
        step_fn, pending = self.compile(state), None
        with self.loader.batches(start, config.steps, self.sharding, threads=config.data.read_threads) as batches:
            for done in range(start + 1, config.steps + 1):
                self.watchdog.kick()
                with timer.phase("eval"):
                    self.profile.before(done)
                with timer.phase("stall"):
                    batch = next(batches)
                with jax.profiler.StepTraceAnnotation("train", step_num=done):
                    state, metrics = step_fn(state, batch)
                if pending:
                    self.report(*pending)
                pending = (done, metrics)
                wish = self.vote.cast(FAILED if self.checkpoints.failed else STOP if self.stop.signal else GO)
                if wish == FAILED:
                    self.checkpoints.wait()  # raises, where it failed
                    raise UserError("another process could not save a checkpoint; see what it printed")
                stopping = wish == STOP and done < config.steps
                if stopping or self.due(done):
                    self.report(*pending)
                    pending = None
                    self.pause(done, state, stopping)
                if stopping:
                    self.leave(done)
        self.finish(config.steps)
        return state

    def compile(self, state: State):
        """The step for these shapes and shardings."""
        config = self.config
        batch = jax.ShapeDtypeStruct((config.data.batch, config.data.T + 1), "int32", sharding=self.sharding)
        with self.timer.phase("compile"):
            return jax.jit(make_step(config), donate_argnums=0).lower(state, batch).compile()

    def due(self, done: int) -> bool:
        """Whether something other than the next step follows step number `done`."""
        looks = self.weights_due(done) or self.evaluation_due(done) or self.profile.due(done)
        return looks or self.checkpoints.plan.saves(done)

    def weights_due(self, done: int) -> bool:
        """Whether the weights are looked at after this step."""
        return self.quantized and (done % self.config.metrics.weights_every_steps == 0 or done == 1)

    def evaluation_due(self, done: int) -> bool:
        """Whether the model is evaluated after this step."""
        every = self.config.evaluate.every_steps
        return every > 0 and (done % every == 0 or done == self.config.steps)

    def pause(self, done: int, state: State, stopping: bool) -> None:
        """Everything that happens between two steps. What is saved before the run stops is the whole state."""
        if self.weights_due(done):
            self.look_at_weights(done, state)
        if self.evaluation_due(done):
            self.evaluate(done, state)
        self.watchdog.kick()
        if stopping or self.checkpoints.plan.saves(done):
            self.save(done, state, full=stopping)

    def report(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Writes and shows the metrics of a step, and gives up after too many that were not finite."""
        config = self.config
        self.timer.advance(steps=1, tokens=config.tokens_per_step)
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if in_a_row := values["skipped_in_a_row"]:
            why = "spike" if isfinite(values["loss"] + values["grad_norm"]) else "not finite"
            self.writer.event(step, f"step skipped: {why}", loss=values["loss"], grad_norm=values["grad_norm"])
        if in_a_row >= config.train.max_skipped:
            raise UserError(
                f"{in_a_row} steps in a row up to step {step} had a loss or gradient that is not finite"
                f"{' or a spike' if config.train.skip_sigma else ''} (config.train.max_skipped="
                f"{config.train.max_skipped}); the last checkpoint is of step "
                f"{max(self.checkpoints.steps(), default=0)}. Lower config.schedule.peak or lengthen the warm-up"
            )
        if step - 1 in self.interventions:
            self.writer.event(step, self.interventions[step - 1])
        if step % config.metrics.every_steps and step not in (1, config.steps):
            return
        interval = self.timer.interval()
        record = {
            **values,
            "tokens": step * config.tokens_per_step,
            "tokens_per_second": interval.tokens_per_second,
            "mfu": hardware.mfu(interval.tokens_per_second, self.flops, self.peak.value),
            "stall": interval.stall_share,
            **goodput.worst_stall(interval.stall_share, self.stalls.cast),
        }
        self.writer.write(step, "train", record)
        self.progress.update(step, weights=self.weights, eta=self.timer.eta(config.steps - step), **record)

    def look_at_weights(self, done: int, state: State) -> None:
        """Zeros, flips since the last look, and scales, per kind of matrix."""
        with self.timer.phase("eval"):
            found, self.codes = self.weight_stats(state["parameters"], self.codes)
            self.weights = jax.tree.map(float, jax.device_get(found))
        self.writer.write(done, "weights", self.weights)

    def evaluate(self, done: int, state: State) -> None:
        """Loss on the validation split of every set, and their average by weight in the mixture."""
        config, limit = self.config, self.config.evaluate.batches * self.config.data.batch or None
        with self.timer.phase("eval"):
            found = {
                name: evaluate(self.losses, state["parameters"], loader, self.sharding, limit)
                for name, loader in self.held_out.items()
            }
        mean = combined(list(found.values()), [weight for _, weight in config.mixture])
        record = {"loss": mean.loss, "tokens": done * config.tokens_per_step}
        self.writer.write(done, "eval", record | {name: asdict(quality) for name, quality in found.items()})
        for name, q in found.items():
            self.progress.message(
                f"step {done}: validation loss on {name} {q.loss:.4f} +- {q.loss_error:.4f} "
                f"({q.bits_per_byte:.4f} bits/byte)"
            )

    def write_time(self, done: int) -> dict[str, Any]:
        """Writes down, and gives, where the wall time went up to now."""
        record = goodput.time_record(self.past, self.timer.seconds, time.time(), self.config.steps)
        self.writer.write(done, "time", record)
        return record

    def finish(self, done: int) -> None:
        """Waits until the state after step `done` is on the disk, and says where the time went."""
        with self.timer.phase("checkpoint"):
            self.checkpoints.wait()
        self.progress.message(goodput.line(self.write_time(done)))

    def leave(self, done: int) -> None:
        """Ends the run once the state after step `done` is on the disk."""
        name = self.stop.signal.name if self.stop.signal else "a signal to another process"
        self.finish(done)
        self.writer.event(done, f"stopped by {name}")
        raise Stopped(f"{name}: saved after step {done}; the same command continues from there")

    def save(self, done: int, state: State, *, full: bool) -> None:
        """Starts to save the state after step `done`."""
        with self.timer.phase("checkpoint"):
            self.write_time(done)
            self.writer.flush()
            record = {**self.origin, "tokens": done * self.config.tokens_per_step}
            self.checkpoints.save(done, state, record, full=full)
