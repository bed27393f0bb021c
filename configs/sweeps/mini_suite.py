"""The mini-suite: Spectra's comparisons at sizes that two CPU cores train in an afternoon, on the shipped text.

Command:  spectra sweep --sweep=configs/sweeps/mini_suite.py --workdir=runs/mini --config.data.sets=runs/mini-data
Text:     spectra prepare spectra_jax/data/corpus/corpus.txt.xz --out=runs/mini-data --tokenizer=train:1024 \\
              --context=128 --validation-percent=4 --licence='public domain'
Figures:  spectra analyze suite runs/mini --out=results/mini_suite
Parts:    :suite (the default); :search, the learning rates that PEAKS was taken from
Larger:   --config.data.sets=DIR for any other text prepared with a vocabulary of 1024 and a context of 128
Chips:    two CPU cores: two hours, and 41 minutes for the search, measured beside other work (3.4 and 1.3 core-hours of
          training); a GPU: not measured
Loss:     by size FloatLM 3.64 3.30 3.15 3.04 2.94, TriLM 3.79 3.44 3.28 3.11 3.03, BiLM 3.96 3.60 3.41 3.19 3.11;
          BitNet 3.59 at 237k and 3.35 at 529k; everything else in results/mini_suite
Answers:  at 1/1000 of the size: the loss of TriLM and FloatLM against size (Figures 9 and 10, equation 1) and bits,
          BiLM's gap to TriLM (15), QuantLM at 3 to 8 bits, the schedule's four arms (section 4.3), BitNet (Table 10) of
          the Spectra paper (arXiv 2407.12327), and a law of size and tokens as in 2506.23025
"""

from math import exp, log

from spectra_jax import config, quickstart
from spectra_jax.errors import one_of

V, T, BATCH, TOKENS = 1024, 128, 8, 5_242_880
# D, F, L; heads of 32 dims, for D of 32 and 96 are no multiples of 64. 28 times the parameters from end to end.
SIZES = {"92k": (32, 96, 2), "237k": (64, 192, 2), "529k": (96, 256, 3), "1.1m": (128, 384, 4), "2.6m": (192, 512, 5)}
SMALLEST, MIDDLE, LOOKED_AT = ("92k", "237k"), "529k", "1.1m"  # at LOOKED_AT, intermediate checkpoints are kept
SEEDS = (0, 1, 2)  # at the two smallest sizes

# What the search tries, at half the tokens, and where the parabola through the best rate and its neighbours is lowest
# (results/mini_suite/search.csv), in the order of the widths. Other widths: on the power law through the nearest two.
SEARCHED = {
    "92k": {"FloatLM": (2e-3, 4e-3, 8e-3, 16e-3, 32e-3), "TriLM": (4e-3, 8e-3, 16e-3, 32e-3, 64e-3),
            "BiLM": (2e-3, 4e-3, 8e-3, 16e-3)},
    "237k": {"FloatLM": (2e-3, 4e-3, 8e-3, 16e-3), "TriLM": (4e-3, 8e-3, 16e-3, 32e-3),
             "BiLM": (4e-3, 8e-3, 16e-3, 32e-3), "BitNet": (4e-3, 8e-3, 16e-3, 32e-3)},
    "1.1m": {"FloatLM": (1e-3, 2e-3, 4e-3, 8e-3), "TriLM": (2e-3, 4e-3, 8e-3, 16e-3),
             "BiLM": (2e-3, 4e-3, 8e-3, 16e-3)},
}
PEAKS = {"FloatLM": (12.2e-3, 5.0e-3, 3.7e-3), "TriLM": (8.2e-3, 11.7e-3, 5.6e-3), "BiLM": (6.5e-3, 5.8e-3, 6.6e-3)}
BITNET_TO_TRILM = 11.9 / 11.7  # searched at one width
ARMS = {"only-decay-removed": (False, True), "only-peak-lowered": (True, False), "neither": (False, False)}
QUANTIZED = {8: 0, 6: 0, 4: 32, 3: 32}  # bits: group, which must divide every D


def get_sweep(part: str = "suite"):
    """The rows of one part."""
    return {"suite": suite, "search": search}[one_of(part, ("suite", "search"), "configs/sweeps/mini_suite.py")]()


def suite():
    """The families with their QuantLMs, then the arms, BitNet, and fewer tokens."""
    rows = []
    for size in SIZES:
        for seed in SEEDS if size in SMALLEST else SEEDS[:1]:
            for family in ("FloatLM", "TriLM", "BiLM"):
                rows.append(row(family, size, seed=seed))
            for bits, group in QUANTIZED.items():
                rows.append(quantized(bits, group, size, seed))
    for size, seeds in (("237k", SEEDS), (LOOKED_AT, SEEDS[:1])):
        rows += [row("TriLM", size, arm, seed=seed, arm=arm) for arm in ARMS for seed in seeds]
    rows += [row("BitNet", size, seed=seed) for size, seeds in (("237k", SEEDS), (MIDDLE, SEEDS[:1])) for seed in seeds]
    for share, name in ((4, "quarter"), (2, "half")):
        rows += [row(family, size, name, tokens=TOKENS // share)
                 for size in list(SIZES)[:-1] for family in ("FloatLM", "TriLM")]
    return rows


def search():
    """Every family at two sizes (BitNet at one), four peaks each."""
    return [
        row(family, size, f"{peak:g}", peak=peak, tokens=TOKENS // 2)
        for size, families in SEARCHED.items() for family, peaks in families.items() for peak in peaks
    ]


def peak_of(family: str, D: int) -> float:
    """The peak learning rate at a width."""
    if family == "BitNet":
        return peak_of("TriLM", D) * BITNET_TO_TRILM
    widths = [SIZES[size][0] for size in SEARCHED]
    i = 0 if D <= widths[1] else 1
    (low, high), (at_low, at_high) = widths[i:i + 2], PEAKS[family][i:i + 2]
    return at_low * exp(log(at_high / at_low) * log(D / low) / log(high / low))


def name_of(*parts: str, seed: int) -> str:
    """Of a row; the seed is named where it is not the first."""
    return "-".join([*(part for part in parts if part), *([f"seed{seed}"] if seed else [])])


def row(
    family: str, size: str, variant: str = "", *, peak: float = 0.0, arm: str = "", tokens: int = TOKENS, seed: int = 0
):
    """A model to train."""
    c, (D, F, L), steps = config.default(), SIZES[size], tokens // (BATCH * T)
    c.family, c.seed = family, seed
    c.model.update(V=V, D=D, F=F, L=L, N=D // 32, K=D // 32, H=32, weight=quickstart.FAMILIES[family])
    c.model.update(unroll=L, attention_blocks=1)
    c.data.update(sets=("runs/mini-data",), T=T, batch=BATCH)
    c.train.update(tokens=tokens, loss_chunks=1)
    peak = peak or peak_of(family, D)
    c.schedule.update(peak=peak, warmup=100.0)
    if family != "FloatLM":  # the suite's lowered peaks are 0.61 to 0.69 of the first
        lower, remove = ARMS.get(arm, (True, True))
        c.schedule.update(shape="linear", lower_peak=lower, lowered_peak=peak * 2 / 3, remove_decay=remove)
    c.checkpoint.update(every_steps=steps // 2, read_back=False, permanent_weights_only=True)
    c.checkpoint.permanent_tokens = TOKENS // 32 if size == LOOKED_AT and tokens == TOKENS else 0
    c.evaluate.update(every_steps=steps // 8, batches=64)
    c.metrics.update(every_steps=10, weights_every_steps=steps // 32)
    return name_of(family.lower(), size, variant, seed=seed), c


def quantized(bits: int, group: int, size: str, seed: int):
    """A QuantLM of that size's FloatLM."""
    c = config.default()
    c.family = "QuantLM"
    c.quantize.update(method="gptq", bits=bits, group=group, samples=256)
    return name_of(f"quantlm-{bits}bit", size, seed=seed), c, name_of("floatlm", size, seed=seed)
