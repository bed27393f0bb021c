"""Memory and decoding speed of models that need not exist, by arithmetic (Spectra, arXiv 2407.12327, Figure 2).

The paper's assumptions, which are the defaults here: shapes of the Llama family, a vocabulary of 128k, embedding and
head in 16 bits whatever the blocks have, no cache, no activations; and decoding as fast as the memory holds the model,
so that a model of half the bytes is twice as fast. GB are 10^9 bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from spectra_jax.analysis import accelerators
from spectra_jax.errors import UserError, one_of
from spectra_jax.schema import Model
from spectra_jax.suite import Parameters, count_parameters

GB = 1e9
PAPER_BITS = {"FloatLM": 16.0, "QuantLM 4-bit": 4.0, "TriLM": 1.58}
GROUPED_4_BIT = 4.25  # with the 32 bits that a group of 128 takes in the paper's table of sizes


@dataclass(frozen=True)
class Shape:
    """A decoder in the project's letters; `source` says where it is from."""

    name: str
    D: int
    F: int
    L: int
    N: int
    K: int
    H: int = 128
    V: int = 128_256
    tied: bool = False
    source: str = "Llama 2"

    @property
    def parameters(self) -> Parameters:
        """By what becomes of them."""
        return count_parameters(
            D=self.D, F=self.F, N=self.N, K=self.K, H=self.H, L=self.L, V=self.V, tied=self.tied
        )

    @classmethod
    def of(cls, name: str, m: Model) -> "Shape":
        """That of a config.

        Raises:
          UserError: a mixer that keeps no keys and values.
        """
        if m.mixer != "attention":
            raise UserError(f"deployment is about keys and values, and {name} has the mixer {m.mixer}")
        return cls(name, m.D, m.F, m.L, m.N, m.K, m.H, m.V, m.tie_embeddings, source="config")


# The paper gives no shapes. Up to 70B they are Llama 2's (34B: Code Llama's); beyond, 70B's proportions enlarged
# (F = 3.5 D, 8 key-value heads), which is an assumption.
SHAPES: Mapping[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape("7B", 4096, 11_008, 32, 32, 32),
        Shape("13B", 5120, 13_824, 40, 40, 40),
        Shape("34B", 8192, 22_016, 48, 64, 8, source="Code Llama"),
        Shape("70B", 8192, 28_672, 80, 64, 8),
        Shape("180B", 13_312, 46_592, 79, 104, 8, source="assumed"),
        Shape("300B", 16_384, 57_344, 87, 128, 8, source="assumed"),
        Shape("340B", 16_384, 57_344, 99, 128, 8, source="assumed"),
    )
}


def shape_of(name: str) -> Shape:
    """A shape of `SHAPES` by name.

    Raises:
      UserError: there is none.
    """
    return SHAPES[one_of(name, SHAPES, "shape")]


def memory(
    shape: Shape, bits: float | int, *, context: int = 0, sequences: int = 1, cache_bits: float | int = 16.0,
    embedding_bits: float | int = 16.0,
) -> dict[str, float]:
    """GB of a model and its cache: "blocks" at so many bits a weight, "embedding" (and head), "cache", "total".

    Args:
      context: tokens of every sequence whose keys and values are held.

    Raises:
      UserError: numbers that are not positive.
    """
    for name, value in (("bits", bits), ("cache_bits", cache_bits), ("embedding_bits", embedding_bits)):
        if not value > 0:
            raise UserError(f"{name}={value} of a weight must be positive")
    if context < 0 or sequences < 1:
        raise UserError(f"context={context} must not be negative and sequences={sequences} at least 1")
    count = shape.parameters
    found = {
        "blocks": count.linear * bits / 8 / GB,
        "embedding": (count.embedding * embedding_bits + count.norm * 16) / 8 / GB,
        "cache": 2 * shape.L * shape.K * shape.H * context * sequences * cache_bits / 8 / GB,
    }
    return found | {"total": sum(found.values())}


def table(
    shapes: Sequence[Shape] = tuple(SHAPES.values()), bits: Mapping[str, float | int] = PAPER_BITS, **options
) -> pd.DataFrame:
    """GB and speed-up over 16 bits of every shape at every width; `options` are those of `memory`."""
    rows = []
    for shape in shapes:
        full = memory(shape, 16.0, **options)["total"]
        for family, width in bits.items():
            found = memory(shape, width, **options)
            rows.append({
                "shape": shape.name, "parameters": shape.parameters.total, "family": family, "bits": width, **found,
                "speedup": full / found["total"], "source": shape.source,
            })
    return pd.DataFrame(rows)


def fits(models: pd.DataFrame, devices: Sequence[str] = ("H100 SXM", "MI300X", "TPU v5e", "RTX 4090")) -> pd.DataFrame:
    """For every device and row of `table`: how many of the device it takes, and the GB that are left on these.

    "decode" bounds the tokens per second of one sequence by the bandwidth of as many: each token reads the model once.

    Raises:
      UserError: an unknown device.
    """
    rows = []
    for device in map(accelerators.find, devices):
        for model in models.itertuples():
            count = int(np.ceil(model.total / device.memory_gb))
            rows.append((
                device["name"], model.shape, model.family, model.total, count, count * device.memory_gb - model.total,
                count * device.bandwidth_tbs * 1e3 / model.total,
            ))
    return pd.DataFrame(rows, columns=["device", "shape", "family", "gb", "devices", "left", "decode"])


def largest(device: str, bits: float | int, *, count: int = 1) -> float:
    """Parameters of the largest model that so many of a device hold, in 70B's proportions, in the paper's accounting.

    Raises:
      UserError: an unknown device, or one that does not even hold the embedding.
    """
    room = accelerators.find(device).memory_gb * count

    def scaled(width: float | int) -> Shape:  # heads and layers need not be whole for this
        return Shape("", int(width), int(3.5 * width), round(width * 80 / 8192), int(width / 128), 8)

    low, high = 128.0, 1e6
    if memory(scaled(low), bits)["total"] > room:
        raise UserError(f"{count} x {device} with {room:g} GB hold no model of a vocabulary of {SHAPES['70B'].V}")
    while high - low > 1:
        middle = (low + high) / 2
        low, high = (middle, high) if memory(scaled(middle), bits)["total"] <= room else (low, middle)
    return float(scaled(low).parameters.total)


def claims() -> pd.DataFrame:
    """What the paper says of deployment (sections 1 and 2, Figure 2), recomputed from its assumptions.

    "follows" is whether the number bears the sentence out.
    """
    rows = []

    def total(shape: str, bits: float | int) -> float:
        return memory(SHAPES[shape], bits)["total"]

    def room(text: str, shape: str, bits: float | int, device: str, count: int = 1, above: bool = False) -> None:
        held, used = accelerators.find(device).memory_gb * count, total(shape, bits)
        rows.append((text, f"{used:.1f} GB of {held:g}", (used > held) == above))

    def ratio(
        text: str, shape: str, bits: float | int, least: float | int, other: float | int = 16.0,
        most: float | int = np.inf,
    ) -> None:
        found = total(shape, other) / total(shape, bits)
        rows.append((text, f"{found:.2f}x", least <= found <= most))

    room("a FloatLM of 34B is about what one H100 holds", "34B", 16.0, "H100 SXM")
    room("a FloatLM of 70B is more than one H100 holds", "70B", 16.0, "H100 SXM", above=True)
    room("340B in 16 bits exceed a node of eight H100", "340B", 16.0, "H100 SXM", 8, above=True)
    room("at 4 bits 70B fit on one H100", "70B", GROUPED_4_BIT, "H100 SXM")
    room("at 4 bits 300B fit on one MI300X", "300B", GROUPED_4_BIT, "MI300X")
    room("TriLMs of more than 300B fit on one H100", "300B", 1.58, "H100 SXM")
    ratio("at 7B a TriLM decodes more than 4 times as fast as 16 bits", "7B", 1.58, 4.0)
    ratio("at 7B a TriLM decodes about 2 times as fast as 4 bits", "7B", 1.58, 1.9, PAPER_BITS["QuantLM 4-bit"], 2.1)
    ratio("the same with the scales of groups counted, 4.25 bits", "7B", 1.58, 1.9, GROUPED_4_BIT, 2.1)
    ratio("at 4 bits the speed-up levels off near 4", "340B", 4.0, 3.6, most=4.0)
    ratio("ternary, it levels off near 10 (16 / 1.58)", "340B", 1.58, 9.0, most=16 / 1.58)
    return pd.DataFrame(rows, columns=["claim", "computed", "follows"])
