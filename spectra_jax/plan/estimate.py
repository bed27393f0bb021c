"""About how much memory a training step takes on a device, by arithmetic; what libtpu assigned is beside it in LOG.md.

    state      parameters in float32 and the optimizer's state, divided over the axes "data" and "model"
    kept       what remat keeps of every block: its input; with "dots" its products; with "none" all that backward reads
    loss       the logits of a chunk, the head with its gradient in float32, and hidden states
    block      activations of the widest moment of the backward pass, and the matrices of a block
    gradient   of the parameters, in float32, divided as they are
    peak       state + gradient + kept + the larger of loss and block

It is for kernels of attention that hold no scores. Search ranks by it, the compiler decides.
"""

from spectra_jax.model.parameters import count
from spectra_jax.schema import Config
from spectra_jax.train.optimizer import state_bytes

FLOAT32, BFLOAT16 = 4, 2
WIDEST = 12  # arrays of n x F in bfloat16 at the widest moment of a block's backward pass; fitted


def state(config: Config, shape: tuple[int, int, int]) -> int:
    """Bytes on a device of this (slice, data, model) mesh, before a step runs."""
    whole = FLOAT32 * count(config.model).total + state_bytes(config.model, config.optimizer)
    return whole // (shape[1] * shape[2])


def peak(config: Config, shape: tuple[int, int, int]) -> int:
    """Bytes on a device while a step runs."""
    m, (slices, data, model) = config.model, shape
    rows = config.data.batch // config.train.accumulate * config.data.T // (slices * data)
    held = state(config, shape)
    gradient = FLOAT32 * count(m).total // (data * model) * (2 if config.train.accumulate > 1 else 1)
    heads, F = (m.N + 2 * m.K) * m.H // model, m.F // model
    wide = {
        "full": m.D,
        "dots": 2 * m.D + heads + 2 * F,
        "none": 12 * m.D + 10 * F,
    }[m.remat]
    kept = m.L * rows * wide * BFLOAT16
    table = m.V * m.D // model
    logits = rows // config.train.loss_chunks * m.V // model
    loss = logits * (FLOAT32 + BFLOAT16) + table * (2 * FLOAT32 + BFLOAT16) + rows * m.D * 8
    block = rows * F * WIDEST * BFLOAT16 + count(m).linear // m.L // model * BFLOAT16
    return held + gradient + kept + max(loss, block)
