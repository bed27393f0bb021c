"""How fast a training step can be at best, by arithmetic: no cache misses, no stalls, communication behind compute.

    compute   matrix products at the share of the peak that large ones reach, what remat repeats included; causal
              attention counted half
    weights   the blocks' matrices gathered for the forward and for the backward pass, and their gradients scattered
              once; the head gathered once, and its gradient scattered in float32
    rows      of the embedding, exchanged in the forward and in the backward pass
    model     a sum of activations over the tensor-parallel devices, twice a block forward and twice backward
    replicas  the gradient of a device's own part, summed over the axis "slice", twice its size
    step      the longest of compute, links and network: links carry weights + rows + model, and replicas within a
              slice; the network replicas between slices, and what of weights and rows is from other nodes of GPUs

MFU is as in `hardware.py`, over the same peak, except that causal attention counts half here too. These are bounds:
what a pod gives is less, and no pod was measured.
"""

from dataclasses import dataclass

from jax.sharding import AbstractMesh, Mesh

from spectra_jax.model.parameters import count
from spectra_jax.plan.topology import Topology
from spectra_jax.schema import Config
from spectra_jax.weights import get_rule

BFLOAT16, FLOAT32 = 2, 4  # bytes
CROSSING = {"codes": 0.25, "int8": 1.0, "matrix": BFLOAT16}  # bytes of a quantized weight on its way
# Forward passes of the blocks' products that the backward pass repeats, and of attention's.
REPEATED = {"none": (0, 0), "dots": (0, 1), "full": (1, 1)}


@dataclass(frozen=True)
class Bound:
    """Seconds of a step's parts on every device, and what follows from the longest."""

    compute: float
    links: float
    network: float
    tokens: int  # of a step
    useful: int  # FLOP of a step, without what is repeated
    devices: int
    chips: int
    peak: float  # FLOP/s of a device

    @property
    def step(self) -> float:
        """Seconds."""
        return max(self.compute, self.links, self.network)

    @property
    def limit(self) -> str:
        """The part that is longest."""
        return max(("compute", "links", "network"), key=lambda name: getattr(self, name))

    @property
    def mfu(self) -> float:
        """Useful FLOP over what the devices could do in that time."""
        return self.useful / (self.step * self.devices * self.peak)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.tokens / self.step

    def days(self, tokens: int) -> float:
        """For so many tokens."""
        return tokens / self.tokens_per_second / 86400


def bound(config: Config, mesh: Mesh | AbstractMesh, topology: Topology) -> Bound:
    """The bound of this config on this mesh of these slices."""
    m, family, shape = config.model, topology.family, mesh.shape
    blocks, tables = count(m).linear, 2 * m.V * m.D  # embedding and head
    tokens = config.tokens_per_step
    scores = 2 * m.L * m.scoring * m.H * config.data.T  # FLOP of a token forward: two products with half a row of T
    again, attention_again = REPEATED[m.remat]
    useful = (6 * (blocks + m.V * m.D) + 3 * scores) * tokens
    narrow = max(family.width / m.H, 1)
    done = ((6 + 2 * again) * blocks + 6 * m.V * m.D + (3 + attention_again) * scores * narrow) * tokens
    compute = done / mesh.size / (family.efficiency * family.flops)

    each = CROSSING[m.gather] if get_rule(m.weight).quantized else BFLOAT16
    gathers = 2 * config.train.accumulate
    share, travels = 1 / shape["model"], _others(shape["data"])  # of a matrix, and of that from other devices
    weights = (blocks * (gathers * each + BFLOAT16) + m.V * m.D * (BFLOAT16 + FLOAT32)) * share
    rows = tokens / (shape["slice"] * shape["data"])
    exchanged = 2 * rows * m.D * BFLOAT16
    sums = 4 * m.L * 2 * rows * m.D * BFLOAT16 * _others(shape["model"])
    own = (blocks + tables) * share / shape["data"] * BFLOAT16
    replicas = 2 * own * _others(shape["slice"])
    near = topology.devices // topology.slices  # devices in a slice or node
    nodes = max(1, shape["data"] * shape["model"] // near)  # that share one set of weights
    apart = topology.slices > nodes  # replicas are in other slices
    links = ((weights + exchanged) * travels + sums + (0 if apart else replicas)) / family.inbound
    # The devices of a node take in together what another node has, each a part, and pass it on by their links.
    network = ((weights / near + exchanged) * _others(nodes) + (replicas if apart else 0)) / family.network
    return Bound(compute, links, network, tokens, useful, mesh.size, topology.chips, family.flops)


def _others(parts: int) -> float:
    """The share of a whole in equal parts that is not one's own."""
    return (parts - 1) / parts
