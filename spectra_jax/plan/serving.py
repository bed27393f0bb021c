"""Generation on named accelerators, by arithmetic: what fits, and how fast its memory lets tokens come.

For every token of a batch each device reads its part of all weights once, and the keys and values of every sequence:

    seconds   the larger of (weights + cache) / bandwidth and 2 FLOP for each weight and sequence / compute
    weights   matrices of the blocks at their stored bits (scales of a few per matrix not counted), head in 16 bits; of
              the embedding a row is read, but all of it takes room
    cache     2 L K H of 16 bits for each token of a context, read half full in the mean

These are bounds; the kernels of `pallas_kernels` say how near to them they come.
"""

from collections.abc import Sequence

from spectra_jax.errors import UserError
from spectra_jax.model.parameters import count
from spectra_jax.plan.topology import GIB, Topology, parse
from spectra_jax.schema import Config
from spectra_jax.weights import get_rule

BATCHES = (1, 8, 32, 128, 512)
HALF = 2  # bytes of a 16-bit float


def bits_per_weight(config: Config) -> float:
    """Stored bits of a block's weight: codes, and with groups their 16-bit scales and zeros."""
    rule, q = get_rule(config.model.weight), config.quantize
    if rule.quantized:
        return float(rule.code_bits)
    if q.method == "none":
        return 8.0 * HALF
    return q.bits + (2 * 8 * HALF / q.group if q.group else 0.0)


def serving(config: Config, names: Sequence[str]) -> str:
    """Text for each topology: room, sequences that fit, and the bound on tokens per second by batch.

    `mesh.model` devices share a model; every other group of as many has another copy of it.

    Raises:
      UserError: an unknown topology, devices that do not divide, weights that do not fit.
    """
    return "\n\n".join("\n".join(_one(config, parse(name))) for name in names)


def _one(config: Config, topology: Topology) -> list[str]:
    m, family, share = config.model, topology.family, config.mesh.model
    if m.mixer != "attention":
        raise UserError(f"the arithmetic of --serve is that of keys and values, and {m.mixer} has none")
    if topology.devices % share:
        raise UserError(f"config.mesh.model={share} does not divide the {topology.devices} devices of {topology.name}")
    bits, blocks, table = bits_per_weight(config), count(m).linear, m.V * m.D
    read = (blocks * bits / 8 + table * HALF) / share
    weights = read + (0 if m.tie_embeddings else table * HALF / share)
    each = 2 * m.L * m.K * m.H * HALF * config.data.T / share  # of a full context
    room = family.memory * GIB
    if weights + each > room:
        raise UserError(
            f"{config.name} takes {(weights + each) / GIB:.1f} GiB on a device of {topology.name} with one context, "
            f"and there are {family.memory:g}; share it among {-(-int(weights + each) * share // int(room))} devices: "
            "--config.mesh.model"
        )
    fit, copies = int((room - weights) // each), topology.devices // share
    lines = [
        f"{config.family} {config.name} on {topology.name}: {copies} copies, each on {share} device(s)",
        f"  weights    {weights / GIB:.3f} GiB a device: {blocks:,} at {bits:.3g} bits, embedding and head at 16",
        f"  cache      {each / 2**20:,.1f} MiB a device for a context of {config.data.T}; {fit:,} fit beside weights",
        "  sequences  ms/token  tokens/s of one  tokens/s of all  limit",
    ]
    for batch in (size for size in BATCHES if size <= fit):
        memory = (read + batch * each / 2) / family.bandwidth
        compute = 2 * batch * (blocks + table) / share / (family.efficiency * family.flops)
        seconds = max(memory, compute)
        lines.append(
            f"  {batch:>9} {seconds * 1e3:>9.3f} {1 / seconds:>16,.0f} {batch * copies / seconds:>16,.0f}  "
            f"{'memory' if memory >= compute else 'compute'}"
        )
    return lines
