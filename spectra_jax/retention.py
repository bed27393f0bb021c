"""Which steps of a run are saved, what of them, and which checkpoints stay. Nothing here touches a file."""

from collections.abc import Sequence
from typing import Any

from spectra_jax.schema import Config


class Plan:
    """The schedule of `config.checkpoint`."""

    def __init__(self, config: Config):
        self._every, self._keep = config.checkpoint.every_steps, config.checkpoint.keep
        self._permanent, self._last = frozenset(config.permanent_steps), config.steps
        self._read_back = config.checkpoint.read_back
        self._light = self._permanent - {config.steps} if config.checkpoint.permanent_weights_only else frozenset()

    def saves(self, step: int) -> bool:
        """Whether something is saved after this step."""
        # Nothing can be resumed from weights alone: a step that was due for both is followed by a full one.
        postponed = step - 1 in self._light and (step - 1) % self._every == 0
        return step % self._every == 0 or postponed or step in self._permanent or step == self._last

    def weights_only(self, step: int) -> bool:
        """Whether the parameters alone are saved: permanent checkpoints but the last, if the config asks for it."""
        return step in self._light

    def kept(self, steps: Sequence[int], sound: set[int]) -> set[int]:
        """Those of the saved `steps` that stay.

        The permanent ones, the newest `keep` that training can go on from, and the newest of `sound`, those that were
        read back and found to be what was saved: what nobody has read may be worth nothing. While there is no such
        one all stay.
        """
        full = sorted(step for step in steps if not self.weights_only(step))
        kept = {*full[-self._keep:], *self._permanent.intersection(steps)}
        if not self._read_back:
            return kept
        known = sound.intersection(full)
        return kept | {max(known)} if known else {*steps}


class Policy:
    """`Plan.kept` in the form that Orbax asks for, with what is known of the files."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self.sound: set[int] = set()  # steps that were read and found to be what was saved
        self.reading: int | None = None  # the step that is being read, or was last

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """One truth value per checkpoint."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = self._plan.kept(steps, self.sound)
        return [step in kept or step == self.reading for step in steps]
