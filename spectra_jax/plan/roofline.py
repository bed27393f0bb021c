"""How fast a training step can be at best, by arithmetic: no cache misses, no stalls, communication behind compute.

    compute   matrix products at EFFICIENCY of the peak, what remat repeats included; causal attention counted half
    weights   every matrix gathered for the forward and for the backward pass, and its gradient scattered once
    model     a sum of activations over the tensor-parallel devices, twice a block forward and twice backward
    slices    the gradient of a device's own part, summed over slices, twice its size
    step      the longest of compute, weights + model (links of the slice) and slices (the network between them)

MFU is as in `hardware.py`, over the same peak, except that causal attention counts half here too. These are bounds:
what a pod gives is less, and no pod was measured.
"""

from dataclasses import dataclass

from jax.sharding import Mesh

from spectra_jax.model.parameters import count
from spectra_jax.plan.topology import DCN, Topology
from spectra_jax.schema import Config
from spectra_jax.weights import get_rule

EFFICIENCY = 0.85  # of the peak, that large products reach; assumed
WIDTH = 128  # of the matrix unit: heads of 64 fill half of it
BFLOAT16 = 2  # bytes
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


def bound(config: Config, mesh: Mesh, topology: Topology) -> Bound:
    """The bound of this config on this mesh of these slices."""
    m, family, shape = config.model, topology.family, mesh.shape
    blocks, head, embedding = count(m).linear, m.V * m.D, m.V * m.D
    tokens = config.tokens_per_step
    scores = 2 * m.L * m.N * m.H * config.data.T  # FLOP of a token forward: two products with half a row of T
    again, attention_again = REPEATED[m.remat]
    useful = (6 * (blocks + head) + 3 * scores) * tokens
    narrow = max(WIDTH / m.H, 1)
    done = ((6 + 2 * again) * blocks + 6 * head + (3 + attention_again) * scores * narrow) * tokens
    compute = done / mesh.size / (EFFICIENCY * family.flops)

    share = 1 / shape["model"]  # of a matrix, that the devices of one data axis gather
    travels = (shape["data"] - 1) / shape["data"]
    each = CROSSING[m.gather] if get_rule(m.weight).quantized else BFLOAT16
    gathers = 2 * config.train.accumulate
    weights = (blocks * (gathers * each + BFLOAT16) + (head + embedding) * 2 * BFLOAT16) * share * travels
    rows = tokens / (shape["slice"] * shape["data"])
    sums = 4 * m.L * 2 * rows * m.D * BFLOAT16 * (shape["model"] - 1) / shape["model"]
    own = (blocks + head + embedding) * share / shape["data"] * BFLOAT16
    replicas = 2 * own * (shape["slice"] - 1) / shape["slice"]
    within = weights + sums + (replicas if topology.slices == 1 else 0)
    links = within / (2 * family.link * family.axes)  # both ways along every side of the torus
    network = replicas / (DCN / family.per_chip) if topology.slices > 1 else 0.0
    return Bound(compute, links, network, tokens, useful, mesh.size, topology.chips, family.flops)
