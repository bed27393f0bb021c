"""Config files and overrides: what is taken, what is refused in which words."""

import json
import re

import pytest

from spectra_jax import config
from spectra_jax.errors import UserError
from spectra_jax.schema import Config

# A legal change of every key that doubling or halving its default would not be legal for.
CHANGES = {
    "family": "TriLM",
    "name": "other",
    "model.K": "4",
    "model.mixer": "mlgru",
    "train.start": "runs/other",
    "distill.teacher": "runs/other",
    "optimizer.name": "another",
    "optimizer.rates": "w.scale=0.1,mlp=0.5",
    "optimizer.only": "w.a,w.b",
    "model.weight": "ternary",
    "model.compute_dtype": "bfloat16",
    "model.gradient_dtype": "float32",
    "model.attention": "reference",
    "model.gather": "matrix",
    "model.remat": "dots",
    "data.sets": "web=3,books",
    "optimizer.no_decay": "norm,embedding",
    "optimizer.float_states": "embedding",
    "schedule.shape": "linear",
    "schedule.lowering": "continuous",
    "schedule.remove_at": "0.5",
    "mesh.data": "4",
    "quantize.method": "gptq",
    "quantize.grid": "absmax",
    "quantize.scale_dtype": "float32",
    "quantize.sets": "text",
    "quantize.bands": "4:2,2:rest",
    "quantize.base_dtype": "bfloat16",
    "quantize.pattern": "2:4",
    "quantize.saliency": "magnitude",
    "prune.criterion": "param_first",
    "prune.reduction": "max",
    "prune.sets": "text",
}


def change_of(key: str) -> str:
    """A text that is a legal value of `key` other than its default."""
    if key in CHANGES:
        return CHANGES[key]
    value = flat(config.to_dict(Config()))[key]
    if isinstance(value, bool):
        return str(not value).lower()
    return str(value * 2 if isinstance(value, int) and value else value / 2 or 1)


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def write(folder, body: str, function: str = "get_config"):
    """A config file whose function runs `body` on the defaults `c`."""
    path = folder / "experiment.py"
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    path.write_text(
        "from spectra_jax import config\n\n\n"
        f"def {function}(arg='none'):\n    c = config.default()\n{lines}    return c\n"
    )
    return path


# --- overrides ---


@pytest.mark.parametrize("key", config.keys())
def test_every_key_can_be_overridden_and_refuses_another_type(key):
    new = config.override(Config(), [f"{key}={change_of(key)}"])
    assert [line.split(":")[0] for line in config.differences(Config(), new)] == [key]
    kind = type(flat(config.to_dict(Config()))[key])
    if kind in (int, float, bool):
        for wrong in ("some text", "", "[1]", "None", "yes"):
            with pytest.raises(
                UserError, match=rf"config\.{re.escape(key)}=.* is not of type {kind.__name__}"
            ):
                config.override(Config(), [f"{key}={wrong}"])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("train.tokens=3e9", 3_000_000_000),
        ("train.tokens=3_000_000_000", 3_000_000_000),
        ("schedule.final=1", 1.0),
        ("schedule.peak=1e-3", 1e-3),
        ("model.tie_embeddings=True", True),
        ("model.tie_embeddings=true", True),
        ("model.tie_embeddings=False", False),
        ("name=a=b", "a=b"),
        ("name=3", "3"),
        ("data.sets=", ()),
        ("data.sets=one", ("one",)),
        ("data.sets=web=3,books=1", ("web=3", "books=1")),
    ],
)
def test_how_texts_are_read(text, value):
    new = config.override(Config(), [text])
    node = new
    for name in text.partition("=")[0].split("."):
        node = getattr(node, name)
    assert node == value and type(node) is type(value)


def test_later_overrides_win_and_the_rest_stays():
    new = config.override(Config(), ["model.L=4", "seed=7", "model.L=6"])
    assert config.differences(Config(), new) == ["model.L: 16 -> 6", "seed: 0 -> 7"]


@pytest.mark.parametrize(
    "text",
    [
        "model.L=3.5",
        "model.L=1e400",
        "model.L=True",
        "model.L='4'",
        "model.tie_embeddings=1",
        "schedule.peak=nan",
        "schedule.peak=True",
    ],
)
def test_near_misses_of_a_type_are_refused(text):
    with pytest.raises(UserError, match=r"config\.[\w.]+=.* is not of type (int|bool|float)$"):
        config.override(Config(), [text])


@pytest.mark.parametrize("key", [k for k in config.keys() if len(k.rsplit(".", 1)[-1]) >= 4])
def test_a_missing_letter_names_the_right_key(key):
    middle = len(key) - len(key.rsplit(".", 1)[-1]) // 2
    typo = key[: middle - 1] + key[middle:]
    with pytest.raises(
        UserError,
        match=rf"^unknown key config\.{re.escape(typo)}; did you mean config\.{re.escape(key)}\?$",
    ):
        config.override(Config(), [f"{typo}=1"])


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("warmup", "schedule.warmup"),  # without its section
        ("L", "model.L"),
        ("data.warmup", "schedule.warmup"),  # in the wrong section
        ("model.l", "model.L"),
        ("model.L.x", "model.L"),
        ("schedule.lower_att", "schedule.lower_at"),
        ("optimiser.weight_decay", "optimizer.weight_decay"),
    ],
)
def test_other_mistakes_in_a_key(typo, meant):
    with pytest.raises(
        UserError,
        match=rf"unknown key config\.{re.escape(typo)}; did you mean config\.{re.escape(meant)}\?",
    ):
        config.override(Config(), [f"{typo}=1"])


def test_a_key_like_no_other_names_the_sections():
    with pytest.raises(
        UserError, match="unknown key config.zzz; the known sections are model, data, train"
    ):
        config.override(Config(), ["zzz=1"])


def test_a_section_is_no_key_and_a_key_needs_a_value():
    with pytest.raises(UserError, match="unknown key config.model;"):
        config.override(Config(), ["model=1"])
    with pytest.raises(
        UserError, match=r"--config\.model\.L has no value; write --config\.model\.L=VALUE"
    ):
        config.override(Config(), ["model.L"])


# --- files ---


def test_a_file_with_overrides(tmp_path):
    path = write(
        tmp_path, "c.model.L = 4\nc.train.tokens = 3e9\nc.data.sets = ['web']\nc.name = arg"
    )
    found = config.load(f"{path}:mine", ["model.L=6"])
    assert found == config.override(
        Config(), ["model.L=6", "train.tokens=3000000000", "data.sets=web", "name=mine"]
    )
    assert config.load(str(path)).name == "none"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("c.model.Lx = 4", r"unknown key config\.model\.Lx; did you mean config\.model\.L\?"),
        ("c.modle = 4", r"unknown key config\.modle; did you mean config\.model"),
        (
            "c.schedule.peek = 4",
            r"unknown key config\.schedule\.peek; did you mean config\.schedule\.peak\?",
        ),
        ("c.model.L = '4'", r"config\.model\.L='4' is not of type int"),
        ("c.model.L = None", r"config\.model\.L=None is not of type int"),
        ("c.model.tie_embeddings = 1", r"config\.model\.tie_embeddings=1 is not of type bool"),
        ("c.data.sets = 'web'", r"config\.data\.sets='web' is not of type tuple"),
        ("c.data.sets = ('web', 3)", r"config\.data\.sets=\('web', 3\) is not of type tuple"),
        ("c.model = 4", r"config\.model=4 is a section, not a value"),
        ("c.data.batch = 0", r"config\.data\.batch=0 must be at least 1"),
    ],
)
def test_mistakes_in_a_file(tmp_path, body, message):
    with pytest.raises(UserError, match=message):
        config.load(str(write(tmp_path, body)))


def test_missing_files_and_functions(tmp_path):
    with pytest.raises(
        UserError, match="no config file 'configs/trillm.py'; the shipped ones are in configs/"
    ):
        config.load("configs/trillm.py:99m")
    path = write(tmp_path, "", function="get_other")
    with pytest.raises(UserError, match=r"experiment\.py has no function get_config\(arg\)"):
        config.load(str(path))


# --- round trips ---


def test_json_round_trip():
    alone = ("model.mixer", "model.quantized_head")  # they do not go with K < N, and with tied embeddings
    changed = config.override(Config(), [f"{key}={change_of(key)}" for key in config.keys() if key not in alone])
    for c in (Config(), changed):
        text = json.dumps(config.to_dict(c))
        assert config.from_dict(json.loads(text)) == c
        assert hash(config.from_dict(json.loads(text))) == hash(
            c
        )  # configs are static arguments of jit
    assert config.differences(changed, changed) == []


def test_a_stored_config_of_another_version_is_refused_by_name():
    values = config.to_dict(Config())
    values["model"]["depth"] = 3
    with pytest.raises(UserError, match=r"unknown key config\.model\.depth"):
        config.from_dict(values)
    with pytest.raises(UserError, match=r"config\.model=3 is a section"):
        config.from_dict({"model": 3})


def test_default_is_the_schema():
    assert config.from_config_dict(config.default()) == Config()


def test_for_size_of_an_unknown_size():
    with pytest.raises(UserError, match="no size '7b' in the suite; it has 99m, 190m"):
        config.for_size("TriLM", "trilm", "7b")
