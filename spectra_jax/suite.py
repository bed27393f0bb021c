"""The published suite: nine sizes with their hyper-parameters, and the accounting of bits.

Sources are the Spectra paper (arXiv 2407.12327) and its released configs. What they do not state is marked
"not stated" and ends up as a config field, so that it can be changed without touching code.
"""

from collections.abc import Mapping
from dataclasses import dataclass

NEOX_IDS = 50277  # ids of the GPT-NeoX-20B tokenizer, before padding (appendix A.1)
SUITE_TOKENS = 300_000_000_000  # every model of the suite sees the same 300B tokens (section 4)
CONTEXT = 2048
PAPER_VOCABULARY = 50304  # what Table 4 counts at every size, also where the padded rows were more

# Sequences of 2048 tokens per step. The paper says "2M" (FloatLM) and "1M" (TriLM) tokens; 528 follows from
# its Table 5 (skipped batches against skipped tokens), 1024 is the round number nearest to "2M".
FLOAT_BATCH = 1024
TRI_BATCH = 528
BITNET_BATCH = 512  # "1M tokens"

# Tokens per subset, in billions, of the suite's 300B sample of SlimPajama (Table 2).
SLIMPAJAMA = {
    "arxiv": 13.0, "book": 13.0, "c4": 80.0, "common_crawl": 156.0,
    "github": 16.0, "stackexchange": 10.0, "wikipedia": 12.0,
}

# Bits per block weight in Table 4's own accounting: group scales count for 3 and 4 bits (16-bit scale and
# zero per 128 weights), not for 6 and 8; ternary is 1.58, not log2 3. BiLM is not in the table.
PAPER_BITS = {
    "FloatLM": 16.0, "QuantLM-8": 8.0, "QuantLM-6": 6.0, "QuantLM-4": 4.25, "QuantLM-3": 3.25,
    "TriLM": 1.58, "BiLM": 1.0,
}


@dataclass(frozen=True)
class Size:
    """One row of Table 3. Learning rates are peaks; TriLM's is lowered half-way from `tri_lr[0]` to `[1]`."""

    name: str
    D: int
    F: int
    N: int
    L: int
    scale_shards: int  # model-parallel width of the original run: one scale per shard of a matrix
    float_lr: float
    tri_lr: tuple[float, float]

    @property
    def H(self) -> int:
        """Dimensions of a head."""
        return self.D // self.N

    @property
    def V(self) -> int:
        """Rows of the embedding: the tokenizer's ids rounded up to 128 x scale_shards (appendix A.1)."""
        multiple = 128 * self.scale_shards
        return -(-NEOX_IDS // multiple) * multiple


SIZES: Mapping[str, Size] = {
    size.name: size
    for size in (
        Size("99m", 512, 1280, 8, 16, 1, 4.0e-4, (2.4e-3, 1.5e-3)),
        Size("190m", 768, 2048, 12, 16, 1, 4.0e-4, (2.4e-3, 1.5e-3)),
        Size("390m", 1024, 2560, 16, 24, 1, 3.0e-4, (1.8e-3, 1.2e-3)),
        Size("560m", 1280, 3072, 20, 24, 1, 2.8e-4, (1.6e-3, 1.1e-3)),
        Size("830m", 1536, 4096, 24, 24, 1, 2.5e-4, (1.5e-3, 1.0e-3)),
        Size("1.1b", 1792, 5120, 28, 24, 2, 2.2e-4, (1.3e-3, 9.0e-4)),
        Size("1.5b", 2048, 6144, 32, 24, 2, 2.0e-4, (1.2e-3, 8.0e-4)),
        Size("2.4b", 2304, 7680, 36, 30, 3, 2.0e-4, (1.2e-3, 8.0e-4)),
        Size("3.9b", 3072, 9216, 24, 30, 6, 1.5e-4, (1.2e-3, 8.0e-4)),
    )
}


@dataclass(frozen=True)
class Parameters:
    """Parameters of a model by what happens to them: `linear` is what a weight rule quantizes."""

    linear: int
    embedding: int
    norm: int

    @property
    def total(self) -> int:
        return self.linear + self.embedding + self.norm


def count_parameters(
    *, D: int, F: int, N: int, K: int, H: int, L: int, V: int, tied: bool = False, block_norms: bool = True
) -> Parameters:
    """Parameters of a Llama-shaped model: q, k, v, o, gate, up, down per block; two norms per block, one last."""
    attention = 2 * D * N * H + 2 * D * K * H
    return Parameters(
        linear=L * (attention + 3 * D * F),
        embedding=V * D * (1 if tied else 2),
        norm=D * (2 * L * block_norms + 1),
    )


def size_in_bits(parameters: Parameters, bits_per_weight: float) -> float:
    """Bits of a model as Table 4 counts them: block weights at their width, embeddings at 16, norms not at all."""
    return bits_per_weight * parameters.linear + 16.0 * parameters.embedding


def paper_size_in_bits(size: Size, family: str) -> float:
    """One cell of the paper's Table 4, in bits ("paper bits", not stored bits).

    Raises:
      KeyError: `family` is not one of `PAPER_BITS`.
    """
    return size_in_bits(parameters_of(size, V=PAPER_VOCABULARY), PAPER_BITS[family])


def parameters_of(size: Size, V: int | None = None) -> Parameters:
    """Parameters of one size of the suite, by default with the padded vocabulary that it was trained with."""
    return count_parameters(
        D=size.D, F=size.F, N=size.N, K=size.N, H=size.H, L=size.L, V=size.V if V is None else V
    )


def table() -> str:
    """The whole suite as text: what `spectra suite` prints."""
    lines = [
        "Spectra suite (arXiv 2407.12327, Tables 3 and 4): 300B tokens, context 2048, GPT-NeoX-20B tokenizer",
        "",
        f"{'size':>5} {'D':>5} {'F':>5} {'N':>3} {'H':>4} {'L':>3} {'shards':>6} {'V padded':>8} "
        f"{'parameters':>13} {'float lr':>8} {'tri lr':>18}",
    ]
    for s in SIZES.values():
        lines.append(
            f"{s.name:>5} {s.D:>5} {s.F:>5} {s.N:>3} {s.H:>4} {s.L:>3} {s.scale_shards:>6} {s.V:>8} "
            f"{parameters_of(s).total:>13,} {s.float_lr:>8.1e} {s.tri_lr[0]:>7.1e} -> {s.tri_lr[1]:>7.1e}"
        )
    lines += [
        "",
        f"Size in 1e9 bits, the paper's accounting (block weights at the width below, embeddings at 16, V = "
        f"{PAPER_VOCABULARY}; norms and the scales of ternary and binary matrices not counted)",
        "",
        f"{'family':>10} {'bits':>5} " + " ".join(f"{name:>6}" for name in SIZES),
    ]
    for family, bits in PAPER_BITS.items():
        cells = " ".join(f"{paper_size_in_bits(s, family) / 1e9:>6.2f}" for s in SIZES.values())
        lines.append(f"{family:>10} {bits:>5g} {cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    from spectra_jax.cli import main

    main("suite")
