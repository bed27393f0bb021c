"""A contender of the speed benchmark: a process that trains when asked, its parent's handle on it, and the measurement.

Every contender is a process of its own, so that its peak memory is its own and nothing of the other framework is
loaded there.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from statistics import median

import numpy as np

from spectra_jax import config as configs
from spectra_jax.errors import UserError
from spectra_jax.schema import Config

FIRST = 5  # steps whose losses are compared, which also warm up


def batch(config: Config, step: int) -> np.ndarray:
    """Records (B, T + 1) of a step: independent tokens, low ids more frequent than high ones."""
    size = (config.data.batch, config.data.T + 1)
    uniform = np.random.default_rng([config.seed, step]).random(size)
    return (config.model.V * uniform**3).astype(np.int32)


class Ours:
    """A contender: the step of `spectra train`."""

    def __init__(self, config: Config, name: str):
        import jax

        from spectra_jax.sharding import make_mesh
        from spectra_jax.train.step import init_state, make_step

        remat = "full" if name.endswith("-remat") else config.model.remat
        # A scan is what makes remat save memory; without remat it would store everything twice over on a GPU.
        how = dict(remat=remat, unroll=config.model.L if remat == "none" else config.model.unroll)
        weight = {"float": "float", "tri": "ternary"}[name.removesuffix("-remat")]
        self.config = replace(config, model=replace(config.model, weight=weight, **how))
        self.jax, self.device = jax, jax.devices()[0]
        jax.set_mesh(make_mesh(self.config, [self.device]))
        self.state = jax.jit(partial(init_state, self.config))(jax.random.key(config.seed))
        self.step = jax.jit(make_step(self.config), donate_argnums=0)

    @staticmethod
    def absent() -> str | None:
        """Why there is no GPU for JAX; None if there is one."""
        import jax

        found = jax.default_backend()
        return None if found == "gpu" else f"JAX {jax.__version__} sees no GPU, only {found}"

    def about(self) -> dict:
        """The device and what computes on it."""
        platform = self.device.client.platform_version.splitlines()[-1]
        return {"device": self.device.device_kind, "software": f"jax {self.jax.__version__} ({platform})"}

    def batch(self, tokens: np.ndarray):
        """Records (B, T + 1) on the device."""
        return self.jax.device_put(tokens, self.device)

    def steps(self, batches: Sequence) -> list[float]:
        """Trains on the batches and returns their losses when all is done."""
        losses = []
        for tokens in batches:
            self.state, metrics = self.step(self.state, tokens)
            losses.append(metrics["loss"])
        self.jax.block_until_ready(self.state)
        return [float(loss) for loss in losses]

    def gpu_bytes(self) -> int:
        """The most that arrays and programs ever took on the GPU."""
        return self.device.memory_stats()["peak_bytes_in_use"]

    def peak(self) -> float | None:
        """FLOP/s of the device: measured on a CPU, from a table on a GPU; None if not in it."""
        from spectra_jax import hardware

        return hardware.peak_flops(self.device, self.config.model.compute_dtype).value

    def write_weights(self, path: str) -> dict:
        """Saves the initial weights by dotted path; returns what only this side can count."""
        from spectra_jax import hardware
        from spectra_jax.model.parameters import count

        tree, m = self.jax.tree_util, self.config.model
        flat, _ = tree.tree_flatten_with_path(self.state["parameters"])
        np.savez(path, **{tree.keystr(at, simple=True, separator="."): w for at, w in flat})
        parameters = count(m)
        flops = hardware.flops_per_token(
            matmul_params=parameters.linear + m.V * m.D, L=m.L, N=m.N, H=m.H, T=self.config.data.T
        )
        return {"parameters": parameters.total, "flops_per_token": flops}


def work() -> None:
    """The life of a contender's process: a line of JSON in, a line of JSON out."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to stderr

    def reply(value: dict) -> None:
        print(json.dumps(value), file=replies, flush=True)

    start = json.loads(sys.stdin.readline())
    name, config, device = start["name"], configs.from_dict(start["config"]), start["device"]
    if name.startswith("torch"):
        if find_spec("torch") is None:
            return reply({"absent": "PyTorch is not installed"})
        from torch_llama import Torch, absent

        if device == "gpu" and (reason := absent()):
            return reply({"absent": reason})

        with np.load(start["weights"]) as file:
            where = {"cpu": "cpu", "gpu": "cuda"}[device]
            contender = Torch(config, dict(file), where, compiled=name == "torch-compile")
    else:
        if device == "gpu" and (reason := Ours.absent()):
            return reply({"absent": reason})
        contender = Ours(config, name)
    reply(contender.about())
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "steps":
            batches = [contender.batch(batch(config, i)) for i in command["steps"]]
            began = time.perf_counter()
            losses = contender.steps(batches)
            reply({"seconds": time.perf_counter() - began, "losses": losses})
        elif command["do"] == "weights":
            reply(contender.write_weights(start["weights"]))
        elif command["do"] == "finish":
            # First the memory: measuring the peak takes some. ru_maxrss is in KiB on Linux.
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            used = contender.gpu_bytes() if device == "gpu" else resident
            reply({"memory_bytes": used, "peak_flops": contender.peak()})


# What runs in the parent, which stays small: a child's ru_maxrss starts at its parent's size.


class Contender:
    """A process at work, as its parent sees it."""

    def __init__(self, name: str, config: Config, device: str, folder: str):
        self.name = name
        env = os.environ | {
            # Without a GPU "cuda" alone ends in an assertion of JAX's.
            "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda,cpu"}[device],
            "TF_CPP_MIN_LOG_LEVEL": "2",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # one GPU for all
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",  # empty: compilation is measured
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        weights, values = f"{folder}/weights.npz", configs.to_dict(config)
        self.send(name=name, config=values, device=device, weights=weights)

    def send(self, **message) -> None:
        """A line to the process."""
        print(json.dumps(message), file=self.process.stdin, flush=True)

    def receive(self) -> dict:
        """A line from the process.

        Raises:
          UserError: it has died; what it said is on stderr.
        """
        line = self.process.stdout.readline()
        if not line:
            raise UserError(f"{self.name} stopped (exit status {self.process.wait()}), see above")
        return json.loads(line)

    def ask(self, do: str, **message) -> dict:
        """The answer to a command."""
        self.send(do=do, **message)
        return self.receive()

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(
    names: Sequence[str], config: Config, device: str, steps: int, rounds: int
) -> tuple[dict, dict[str, dict]]:
    """Facts about the work, and what was seen of every contender that can run.

    Raises:
      UserError: a contender died, or none can run, or not ours.
    """
    start = partial(Contender, config=config, device=device)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        with start("float-remat", folder=folder) as writer:
            if reason := writer.receive().get("absent"):
                raise UserError(reason)
            facts = writer.ask("weights") | {"absent": {}}
        contenders = {name: stack.enter_context(start(name, folder=folder)) for name in names}
        seen = {}
        for name in names:
            seen[name] = contenders[name].receive()
            if "absent" in seen[name]:
                facts["absent"][name] = seen.pop(name)["absent"]
                say(f"{name} does not take part: {facts['absent'][name]}")
        names = list(seen)
        if not names:
            raise UserError(f"no contender can run: {facts['absent']}")
        for name in names:
            say(f"warming up {name}")
            warm = [contenders[name].ask("steps", steps=[i]) for i in range(FIRST)]
            usual = median(step["seconds"] for step in warm[1:])
            seen[name] |= {
                "losses": [step["losses"][0] for step in warm],
                "compile_seconds": warm[0]["seconds"] - usual,
                "step_seconds": [],
            }
        for i in range(rounds):
            say(f"round {i + 1} of {rounds}")
            todo = list(range(FIRST + i * steps, FIRST + (i + 1) * steps))
            for k in range(len(names)):  # each round begins with another one
                name = names[(i + k) % len(names)]
                seconds = contenders[name].ask("steps", steps=todo)["seconds"]
                seen[name]["step_seconds"].append(seconds / steps)
        for name in names:
            seen[name] |= contenders[name].ask("finish")
    return facts, seen


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    work()
