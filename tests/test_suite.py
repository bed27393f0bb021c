"""The suite's tables: parameter counts and sizes in bits, digit by digit, and the real model."""

import jax
import pytest

from spectra_jax import config, suite
from spectra_jax.model import parameters

# Spectra's released configs and Table 3: (linear, embedding with the trained vocabulary, norm).
COUNTS = {
    "99m": (48_234_496, 51_511_296, 16_896),
    "190m": (113_246_208, 77_266_944, 25_344),
    "390m": (289_406_976, 103_022_592, 50_176),
    "560m": (440_401_920, 128_778_240, 62_720),
    "830m": (679_477_248, 154_533_888, 75_264),
    "1.1b": (968_884_224, 180_748_288, 87_808),
    "1.5b": (1_308_622_848, 206_569_472, 100_352),
    "2.4b": (2_229_534_720, 231_800_832, 140_544),
    "3.9b": (3_680_501_760, 311_427_072, 187_392),
}
TOTALS_50304 = {
    "99m": 99_762_688,
    "190m": 190_538_496,
    "390m": 392_479_744,
    "560m": 569_242_880,
    "830m": 834_086_400,
    "1.1b": 1_149_261_568,
    "1.5b": 1_514_768_384,
    "2.4b": 2_461_476_096,
    "3.9b": 3_989_756_928,
}
VOCABULARIES = dict.fromkeys(COUNTS, 50304) | {"1.1b": 50432, "1.5b": 50432, "3.9b": 50688}

# Table 4 of the paper, in 1e9 bits.
TABLE_4 = {
    "FloatLM":   (1.60, 3.05, 6.28, 9.11, 13.34, 18.39, 24.23, 39.38, 63.83),
    "QuantLM-8": (1.21, 2.14, 3.96, 5.58, 7.91, 10.64, 13.77, 21.55, 34.39),
    "QuantLM-6": (1.11, 1.92, 3.38, 4.70, 6.55, 8.70, 11.15, 17.09, 27.03),
    "QuantLM-4": (1.03, 1.72, 2.88, 3.93, 5.36, 7.00, 8.86, 13.18, 20.59),
    "QuantLM-3": (0.98, 1.60, 2.59, 3.49, 4.68, 6.03, 7.55, 10.95, 16.91),
    "TriLM":     (0.90, 1.42, 2.11, 2.76, 3.55, 4.42, 5.36, 7.23, 10.76),
}  # fmt: skip
# Not tabulated in the paper: one bit per block weight, by the formula that gives every cell above.
BILM = {"99m": 0.872, "560m": 2.501, "1.1b": 3.854}


def test_the_sizes_are_the_nine_published():
    assert list(suite.SIZES) == list(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    size = suite.SIZES[name]
    found = suite.parameters_of(size)
    assert (found.linear, found.embedding, found.norm) == COUNTS[name]
    assert size.V == VOCABULARIES[name]
    assert suite.parameters_of(size, V=50304).total == TOTALS_50304[name]
    assert size.H == (128 if name == "3.9b" else 64)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_models(name):
    m = config.from_config_dict(config.for_size("FloatLM", "floatlm", name)).model
    shapes = jax.eval_shape(lambda key: parameters.init_parameters(m, key), jax.random.key(0))
    blocks = shapes["blocks"]
    linear = sum(leaf.size for leaf in jax.tree.leaves([blocks["attention"], blocks["mlp"]]))
    embedding = shapes["embedding"].size + shapes["head"].size
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert (linear, embedding, total - linear - embedding) == COUNTS[name]
    assert parameters.count(m) == suite.Parameters(*COUNTS[name])


def test_table_4():
    found = {
        family: tuple(
            round(suite.paper_size_in_bits(s, family) / 1e9, 2) for s in suite.SIZES.values()
        )
        for family in TABLE_4
    }
    assert found == TABLE_4
    assert sum(map(len, found.values())) == 54


def test_bilm_bits():
    for name, bits in BILM.items():
        assert round(suite.paper_size_in_bits(suite.SIZES[name], "BiLM") / 1e9, 3) == bits


def test_trilm_is_as_much_smaller_as_the_paper_says():
    largest = suite.SIZES["3.9b"]
    ratio = suite.paper_size_in_bits(largest, "FloatLM") / suite.paper_size_in_bits(
        largest, "TriLM"
    )
    assert round(ratio, 1) == 5.9  # section 4.3
    assert suite.paper_size_in_bits(largest, "TriLM") < suite.paper_size_in_bits(
        suite.SIZES["830m"], "FloatLM"
    )


def test_slimpajama_sums_to_300_billion():
    assert sum(suite.SLIMPAJAMA.values()) * 1e9 == suite.SUITE_TOKENS == 300e9
    assert len(suite.SLIMPAJAMA) == 7


@pytest.mark.parametrize(
    ("changed", "linear", "embedding", "norm"),
    [  # L(2DNH + 2DKH + 3DF), 2VD, D(2L + 1) by hand at D=4 F=6 N=2 K=2 H=2 L=3 V=10
        ({}, 3 * (4 * 16 + 72), 80, 28),
        ({"K": 1}, 3 * (2 * 16 + 2 * 8 + 72), 80, 28),
        ({"tied": True}, 3 * (4 * 16 + 72), 40, 28),
        ({"block_norms": False}, 3 * (4 * 16 + 72), 80, 4),
        ({"H": 4}, 3 * (4 * 32 + 72), 80, 28),
    ],
)
def test_counts_of_other_llama_shapes(changed, linear, embedding, norm):
    shape = {"D": 4, "F": 6, "N": 2, "K": 2, "H": 2, "L": 3, "V": 10} | changed
    assert suite.count_parameters(**shape) == suite.Parameters(linear, embedding, norm)


def test_the_printed_table_has_every_number():
    text = suite.table()
    for name, counts in COUNTS.items():
        assert f"{sum(counts):,}" in text and f"{VOCABULARIES[name]}" in text
    rows = {line.split()[0]: line.split()[2:] for line in text.splitlines() if line.split()[:1]}
    for family, cells in TABLE_4.items():
        assert rows[family] == [f"{cell:.2f}" for cell in cells]
    assert max(map(len, text.splitlines())) <= 200
