"""A profile of chosen steps, by JAX's own profiler."""

from collections.abc import Callable
from pathlib import Path

import jax

from spectra_jax.schema import Metrics


class Profile:
    """Traces the steps from `metrics.profile_at` on, `metrics.profile_steps` of them, into WORKDIR/profile.

    XProf (`pip install xprof; xprof WORKDIR/profile`) shows it, as does TensorBoard with the plugin of that package. A
    run that begins inside the window traces what is left of it; one that ends inside closes the trace.

    event: is called as `MetricsWriter.event` when the trace begins.
    enabled: False on every process but the first, which goes through the same motions without a trace: all processes
    must wait for their devices between the same steps.
    """

    def __init__(self, metrics: Metrics, workdir: Path, event: Callable[..., None], *, enabled: bool = True):
        first, self.folder = metrics.profile_at, workdir / "profile"
        self._steps = range(first, first + metrics.profile_steps) if first else range(0)
        self._event, self._enabled, self._open = event, enabled, False

    def due(self, done: int) -> bool:
        """Whether the trace begins or ends between step `done` and the next; the devices must be idle there."""
        return self._open != (done + 1 in self._steps)

    def before(self, step: int) -> None:
        """Begins or ends the trace before `step`, if it is time."""
        if not self.due(step - 1):
            return
        self._switch()
        if self._open:
            self._event(step, "profile", folder=str(self.folder))

    def _switch(self) -> None:
        self._open = not self._open
        if self._enabled and self._open:
            jax.profiler.start_trace(self.folder)
        elif self._enabled:
            jax.profiler.stop_trace()

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *_: object) -> None:
        if self._open:
            self._switch()
