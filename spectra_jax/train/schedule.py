"""Learning rate and weight decay as functions of the step.

FloatLM: warm-up, then a cosine. TriLM and BiLM: warm-up, then a straight line with two interventions (Spectra, 3.3):
the peak is lowered at half of training, weight decay is removed at two thirds. BitNet: the same at one half.
"""

from fractions import Fraction

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from spectra_jax.schema import Config, Schedule


def warmup_steps(s: Schedule, steps: int) -> int:
    """Steps of linear warm-up out of `steps`."""
    return int(s.warmup if s.warmup >= 1 else s.warmup * steps)


def learning_rate(s: Schedule, steps: int, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Rate of update number `step` (from 0) out of `steps`.

    With t = step/steps the line is peak(t) * (1 - t), where the peak changes at `lower_at`: a step down by the ratio
    of the two peaks, which the sudden drop of the published loss curves suggests. "continuous" instead joins
    (0, peak) - (lower_at, lowered_peak) - (1, 0) by straight lines, as some reproductions of BitNet do.
    """
    t = jnp.asarray(step, jnp.float32) / steps
    late = jnp.asarray(step) >= _first_step(s.lower_at, steps)
    if s.shape == "cosine":
        fraction, peak = 0.5 * (1.0 + jnp.cos(jnp.pi * t)), s.peak
        if s.lower_peak:
            peak = jnp.where(late, s.lowered_peak, s.peak)
        rate = peak * (s.final + (1.0 - s.final) * fraction)
    elif s.lower_peak and s.lowering == "continuous":
        end = s.peak * s.final
        first = s.peak + (s.lowered_peak - s.peak) * t / s.lower_at
        second = s.lowered_peak + (end - s.lowered_peak) * (t - s.lower_at) / (1.0 - s.lower_at)
        rate = jnp.where(late, second, first)
    else:
        peak = jnp.where(late, s.lowered_peak, s.peak) if s.lower_peak else s.peak
        rate = peak * (s.final + (1.0 - s.final) * (1.0 - t))
    warmup = warmup_steps(s, steps)
    # The first update already has a rate: update k of w warm-up updates uses (k + 1)/w of the peak.
    rising = s.peak * (jnp.asarray(step, jnp.float32) + 1.0) / max(warmup, 1)
    return jnp.where(jnp.asarray(step) < warmup, jnp.minimum(rising, rate), rate)


def weight_decay(s: Schedule, decay: float, steps: int, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Weight decay of update number `step`: `decay`, then 0 once it is removed."""
    if not s.remove_decay:
        return jnp.asarray(decay, jnp.float32)
    return jnp.where(jnp.asarray(step) >= _first_step(s.remove_at, steps), 0.0, decay)


def interventions(config: Config) -> dict[int, str]:
    """The steps at which the schedule changes abruptly, with what happens."""
    s, found = config.schedule, {}
    if s.lower_peak:
        found[_first_step(s.lower_at, config.steps)] = "peak lowered"
    if s.remove_decay:
        step = _first_step(s.remove_at, config.steps)
        found[step] = f"{found[step]}, decay removed" if step in found else "decay removed"
    return found


def _first_step(fraction: float, steps: int) -> int:
    """The first step at or past `fraction` of all, as it was written: 0.07 of 100 is 7, which floats make 8."""
    return -int(-Fraction(str(fraction)) * steps // 1)
