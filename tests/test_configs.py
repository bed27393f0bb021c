"""Every shipped config builds, has the published shape, and its file says what it is for."""

import ast
import inspect
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from spectra_jax import config, suite
from spectra_jax.model import parameters
from spectra_jax.schema import Config
from spectra_jax.sweep import read_rows

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "configs").glob("*.py"))
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.py"))
FAMILIES = {
    "floatlm": ("FloatLM", "float"),
    "trilm": ("TriLM", "ternary"),
    "bilm": ("BiLM", "binary"),
    "bitnet": ("BitNet", "bitnet158"),
}
# Totals of Table 3's shapes with the trained vocabularies.
TOTALS = {
    "99m": 99_762_688,
    "190m": 190_538_496,
    "390m": 392_479_744,
    "560m": 569_242_880,
    "830m": 834_086_400,
    "1.1b": 1_149_720_320,
    "1.5b": 1_515_292_672,
    "2.4b": 2_461_476_096,
    "3.9b": 3_992_116_224,
}
# Table 3: peak of FloatLM; TriLM's first and lowered peak.
RATES = {
    "99m": (4.0e-4, 2.4e-3, 1.5e-3),
    "190m": (4.0e-4, 2.4e-3, 1.5e-3),
    "390m": (3.0e-4, 1.8e-3, 1.2e-3),
    "560m": (2.8e-4, 1.6e-3, 1.1e-3),
    "830m": (2.5e-4, 1.5e-3, 1.0e-3),
    "1.1b": (2.2e-4, 1.3e-3, 9.0e-4),
    "1.5b": (2.0e-4, 1.2e-3, 8.0e-4),
    "2.4b": (2.0e-4, 1.2e-3, 8.0e-4),
    "3.9b": (1.5e-4, 1.2e-3, 8.0e-4),
}


def shape_of_run(c: Config) -> int:
    """Parameters, after evaluating the shapes of a forward pass over one row of length T."""
    m = c.model
    graphdef = parameters.graphdef_of(m)
    shapes = jax.eval_shape(lambda key: parameters.init_parameters(m, key), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, c.data.T), jnp.int32)
    logits = jax.eval_shape(lambda p, t: parameters.apply(graphdef, p)(t), shapes, tokens)
    assert logits.shape == (1, c.data.T, m.V) and logits.dtype == jnp.float32
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize("size", TOTALS)
@pytest.mark.parametrize("stem", FAMILIES)
def test_every_family_builds_at_every_size(stem, size):
    c = config.load(f"{ROOT}/configs/{stem}.py:{size}")
    row, (family, rule) = suite.SIZES[size], FAMILIES[stem]
    # BitNet's linear layers normalise their own input: two norms with gain fewer per block.
    expected = TOTALS[size] - (2 * row.L * row.D if stem == "bitnet" else 0)
    assert shape_of_run(c) == expected == parameters.count(c.model).total
    assert (c.family, c.model.weight, c.name) == (family, rule, f"{stem}-{size}")
    assert c.data.T == 2048


@pytest.mark.parametrize("size", TOTALS)
def test_published_hyperparameters(size):
    float_lr, tri_lr, lowered = RATES[size]
    base, tri, bi = (
        config.load(f"{ROOT}/configs/{stem}.py:{size}") for stem in ("floatlm", "trilm", "bilm")
    )
    assert (base.schedule.shape, base.schedule.peak) == ("cosine", float_lr)
    assert not base.schedule.lower_peak and not base.schedule.remove_decay
    for c in (tri, bi):
        s = c.schedule
        assert (s.shape, s.peak, s.lowered_peak) == ("linear", tri_lr, lowered)
        assert s.lower_peak and s.lower_at == 1 / 2 and s.remove_decay and s.remove_at == 2 / 3
        assert c.model.scale_shards == {"1.1b": 2, "1.5b": 2, "2.4b": 3, "3.9b": 6}.get(size, 1)
    # 300e9 over 1024 x 2048 and over 528 x 2048 tokens, rounded up
    assert (base.steps, tri.steps) == (143_052, 277_433)
    for c in (base, tri, bi):
        assert c.train.tokens == 300_000_000_000
        assert (c.optimizer.b1, c.optimizer.b2) == (0.9, 0.95)
        assert sum(weight for _, weight in c.mixture) == 300


def test_bitnet_recipe():
    c = config.load(f"{ROOT}/configs/bitnet.py")
    assert c.name == "bitnet-1.1b" and c.train.tokens == 100_000_000_000
    assert c.steps == 95_368  # 1e11 over 512 x 2048, rounded up
    assert c.schedule.warmup == 375 and c.schedule.lower_at == c.schedule.remove_at == 1 / 2


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_defaults_of_every_file(path):
    c = config.load(str(path))
    assert shape_of_run(c) == parameters.count(c.model).total
    assert config.from_dict(config.to_dict(c)) == c


def arguments_of(path: Path) -> list[str]:
    """What a sweep can be asked for: its default, and the tiny form or the parts that its docstring offers."""
    text = path.read_text()
    parts = re.search(r"^Parts:(.*?)$", text, re.MULTILINE)
    named = re.findall(r":(\w+)", parts[1]) if parts else ["tiny"] * ("\nTiny:" in text)
    return [str(path)] + [f"{path}:{name}" for name in named]


@pytest.mark.parametrize(
    "spec",
    [spec for path in SWEEPS for spec in arguments_of(path)],
    ids=lambda spec: Path(spec).name,
)
def test_every_row_of_every_sweep(spec, monkeypatch):
    monkeypatch.chdir(ROOT)  # sweeps name the config files that they start from as the commands do
    rows = read_rows(spec)
    assert len(rows) > 1 and len({row.name for row in rows}) == len(rows)
    assert len({replace(row.config, name="same") for row in rows}) == len(rows), "two rows are one"
    for c in {row.config.model: row.config for row in rows}.values():
        assert shape_of_run(c) == parameters.count(c.model).total


def test_the_mini_suite():
    """What it promises: factor of sizes, seeds, QuantLMs of every FloatLM, arms, the same data for all."""
    rows = {row.name: row for row in read_rows(f"{ROOT}/configs/sweeps/mini_suite.py")}
    whole = [row for row in rows.values() if row.config.train.tokens == 5_242_880]
    sizes = sorted({parameters.count(row.config.model).total for row in whole if row.config.family == "FloatLM"})
    assert len(sizes) == 5 and sizes[-1] > 16 * sizes[0]
    for family in ("FloatLM", "TriLM", "BiLM"):
        full = [c for c in (row.config for row in whole) if c.family == family and (
            family == "FloatLM" or c.schedule.lower_peak and c.schedule.remove_decay)]
        seeds = {size: sorted(c.seed for c in full if parameters.count(c.model).total == size) for size in sizes}
        assert list(seeds.values()) == [[0, 1, 2]] * 2 + [[0]] * 3
    made = {(row.of, row.config.quantize.bits) for row in rows.values() if row.of}
    floats = [row.name for row in whole if row.config.family == "FloatLM" and not row.of]
    assert made == {(name, bits) for name in floats for bits in (3, 4, 6, 8)}
    arms = {(c.schedule.lower_peak, c.schedule.remove_decay) for c in (row.config for row in whole)
            if c.family == "TriLM" and c.model.D == 128}
    assert len(arms) == 4
    assert len({(c.data, c.train.tokens // c.steps) for c in (row.config for row in rows.values())}) == 1


def test_the_schedule_ablation_varies_the_two_interventions_only(monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = config.run_config_file("configs/sweeps/schedule.py:99m", "get_sweep")
    arms = [config.from_config_dict(values) for _, values in rows]
    assert {(c.schedule.lower_peak, c.schedule.remove_decay) for c in arms} == {
        (True, True), (True, False), (False, True), (False, False)
    }  # fmt: skip
    for c in arms[1:]:
        changed = {line.split(":")[0] for line in config.differences(arms[0], c)}
        assert changed <= {"schedule.lower_peak", "schedule.remove_decay", "name"}
        assert (
            c.train.tokens == 100_000_000_000
        )  # the paper's ablations see a third of the suite's tokens


@pytest.mark.parametrize("family", [family for family, _ in FAMILIES.values()])
def test_quickstart_has_every_family_in_one_shape(family):
    c = config.load(f"{ROOT}/configs/quickstart.py:{family}")
    base = config.load(f"{ROOT}/configs/quickstart.py:FloatLM")
    assert c.model.weight == dict(FAMILIES.values())[family]
    assert shape_of_run(c) == parameters.count(c.model).total
    for name in "VDFLNKH":
        assert getattr(c.model, name) == getattr(base.model, name)
    assert c.seed == base.seed and c.data == base.data


@pytest.mark.parametrize("path", FILES + SWEEPS, ids=lambda p: p.stem)
def test_every_file_opens_with_what_it_is_for(path):
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    for field in ("Command:", "Chips:", "Loss:", "Answers:"):
        found = [line for line in text.splitlines() if line.startswith(field)]
        assert len(found) == 1 and found[0].removeprefix(field).strip(), f"{path.name}: {field}"
    assert path.stem in text.partition("Command:")[2].splitlines()[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_argument_has_a_default(path):
    function = next(
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "get_config"
    )
    assert len(function.args.args) == len(function.args.defaults)
    assert inspect.cleandoc(ast.get_docstring(function) or "")


@pytest.mark.parametrize(
    ("size", "D", "F", "L", "tokens"),
    [("370m", 1024, 2816, 24, 15), ("1.3b", 2048, 5632, 24, 100), ("2.7b", 2560, 6912, 32, 100)],
)
def test_matmulfree(size, D, F, L, tokens):
    """Matrices (D, D) x 4 and (D, F) x 3, gains of their inputs, two norms, one more and lower bounds of the mixer."""
    c = config.load(f"{ROOT}/configs/matmulfree.py:{size}")
    m = c.model
    assert (m.D, m.F, m.L, m.V, m.mixer, m.weight) == (D, F, L, 32_000, "mlgru", "bitlinear")
    assert F % 256 == 0 and 0 <= F - 8 * D // 3 < 256 and c.train.tokens == tokens * 10**9
    layer = 4 * D * D + 3 * D * F + 6 * D + F + 4 * D
    assert parameters.count(m).total == L * layer + 2 * m.V * D + 2 * D == shape_of_run(c)
    assert parameters.count(m).linear == L * (4 * D * D + 3 * D * F)


def test_unknown_size_names_the_known_ones():
    with pytest.raises(
        config.UserError, match=r"no size '2b' in the suite; it has 99m, 190m, .*3\.9b"
    ):
        config.load(f"{ROOT}/configs/trilm.py:2b")
