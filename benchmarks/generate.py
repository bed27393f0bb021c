r"""Generation on this machine: tokens per second of a prompt and of what follows, and peak memory.

    python benchmarks/generate.py [--sizes=99m,390m] [--rounds=3] [--contenders=unpacked,packed,...]

Models of the suite's shapes with random weights read a prompt of 512 tokens and write 64 more, the likeliest ones, one
sequence at a time. Each contender runs in a process of its own with as many threads as there are cores:

    unpacked       ours, dense matrices in float32
    packed         ours, ternary matrices at 2 bits, by the implementation that `--weights=packed` takes here
    packed8        the same with `--head=int8`
    transformers   LlamaForCausalLM of the same shape in float32, PyTorch eager, with its own key-value cache
    llamacpp       `spectra export --to=gguf`'s file in llama.cpp: matrices TQ2_0, embedding and head Q8_0

llama.cpp is as fast as it was compiled to be. For this processor's own instructions, once:

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install --no-binary=llama-cpp-python --force-reinstall --no-deps \
        llama-cpp-python==0.3.36

Rates are medians over rounds after one that is not counted (it compiles). Ratios are to the first contender. The peak
is that of the resident memory while a contender generates, weights included (Linux). The last line is JSON.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from spectra_jax.schema import Config, Data, Model
from spectra_jax.suite import SIZES

PROMPT, NEW, IDS = 512, 64, 258  # tokens of the prompt and after it; ids that the prompt is drawn from

Run = Callable[[], tuple[float, float]]  # reads and writes once: seconds of the prompt, seconds of the rest


def model_of(size: str, layers: int | None) -> Model:
    """The shape of a size of the suite, in float32."""
    s = SIZES[size]
    return Model(V=s.V, D=s.D, F=s.F, L=layers or s.L, N=s.N, K=s.N, H=s.H, compute_dtype="float32")


def prompt() -> list[int]:
    """The same for all."""
    return np.random.default_rng(0).integers(1, IDS, PROMPT).tolist()


def unpacked(m: Model) -> Run:
    """Ours: dense matrices."""
    return ours(random_model(m), weights="dense")


def packed(m: Model) -> Run:
    """Ours: ternary matrices at 2 bits."""
    return ours(random_model(replace(m, weight="ternary")), weights="packed")


def packed8(m: Model) -> Run:
    """Ours: ternary matrices at 2 bits, the head at 8."""
    return ours(random_model(replace(m, weight="ternary")), weights="packed", head="int8")


def random_model(m: Model):
    """A model as `load` gives it, whose end of a document never comes."""
    import jax
    import jax.numpy as jnp

    from spectra_jax.data import tokenizer as tokenizers
    from spectra_jax.model import parameters as trees
    from spectra_jax.serve.load import Loaded
    from spectra_jax.sharding import make_mesh

    config, tokenizer = Config(model=m, data=Data(T=PROMPT + NEW, batch=1)), tokenizers.train(["aa aa"], IDS)
    mesh, rng = make_mesh(config, jax.devices()[:1]), np.random.default_rng(0)
    with jax.set_mesh(mesh):
        like = jax.eval_shape(lambda key: trees.init_parameters(m, key), jax.random.key(0))

        def draw(x: jax.ShapeDtypeStruct) -> jax.Array:
            values = rng.standard_normal(x.shape, np.float32) * m.init_std
            return jax.device_put(values, jax.NamedSharding(mesh, x.sharding.spec))

        drawn = jax.tree.map(draw, like)
        drawn["head"] = jnp.where(jnp.arange(m.V)[None] == tokenizer.eod, 0.0, drawn["head"])
        return Loaded(config, mesh, trees.graphdef_of(m), trees.freeze(m, drawn), tokenizer, 0, {})


def ours(loaded, **kinds: str) -> Run:
    """What `spectra generate` runs."""
    from spectra_jax.serve.generate import Generator, Speed

    generator = Generator(loaded, **kinds, release=True)

    def run() -> tuple[float, float]:
        generator.speed = Speed()
        (found,) = generator.generate([prompt()], max_new_tokens=NEW, temperature=0)
        assert len(found.tokens) == NEW
        return generator.speed.prefill_seconds, generator.speed.decode_seconds

    return run


def transformers(m: Model) -> Run:
    """The loop that transformers' `generate` is, without its checks."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=m.V, hidden_size=m.D, intermediate_size=m.F, num_hidden_layers=m.L, num_attention_heads=m.N,
        num_key_value_heads=m.K, head_dim=m.H, max_position_embeddings=PROMPT + NEW, rms_norm_eps=m.norm_eps,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()

    @torch.inference_mode()
    def run() -> tuple[float, float]:
        started = time.perf_counter()
        out = model(torch.tensor([prompt()]), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        read = time.perf_counter()
        for _ in range(NEW - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        return read - started, time.perf_counter() - read

    return run


def llamacpp(m: Model) -> Run:
    """llama.cpp by its Python binding's own loop, without sampling."""
    import llama_cpp

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        shape = json.dumps(asdict(replace(m, weight="ternary")))
        subprocess.run([sys.executable, __file__, "--gguf", shape, str(file)], check=True)
        cores = len(os.sched_getaffinity(0))
        options = {"n_ctx": PROMPT + NEW, "n_batch": PROMPT, "n_ubatch": PROMPT, "verbose": False}
        model = llama_cpp.Llama(str(file), n_threads=cores, n_threads_batch=cores, use_mmap=False, **options)

    def likeliest() -> int:
        return int(np.argmax(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (m.V,))))

    def run() -> tuple[float, float]:
        model.reset()
        started = time.perf_counter()
        model.eval(prompt())
        token = likeliest()
        read = time.perf_counter()
        for _ in range(NEW - 1):
            model.eval([token])
            token = likeliest()
        return read - started, time.perf_counter() - read

    return run


def write_gguf(m: Model, file: str) -> None:
    """In a process of its own, so that what it takes is not counted."""
    from spectra_jax import config
    from spectra_jax.interop import gguf_export
    from spectra_jax.made import write_made
    from spectra_jax.record import make_record

    loaded, run = random_model(m), Path(file).with_suffix(".run")
    record = make_record(config.to_dict(loaded.config), None, "")
    tokenizer = run.with_suffix(".json")
    loaded.tokenizer.save(tokenizer)
    write_made(run, loaded.config, loaded.parameters, record, tokenizer.read_text("utf-8"))
    gguf_export.export(str(run), file)


CONTENDERS: dict[str, Callable[[Model], Run]] = {
    "unpacked": unpacked, "packed": packed, "packed8": packed8, "transformers": transformers, "llamacpp": llamacpp,
}


def measure(contender: str, m: Model, rounds: int) -> dict[str, float]:
    """One contender at one size, in this process."""
    run = CONTENDERS[contender](m)
    run()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    times = [run() for _ in range(rounds)]
    status = Path("/proc/self/status").read_text()
    peak = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))
    prefill, decode = (statistics.median(seconds) for seconds in zip(*times))
    return {"prefill": PROMPT / prefill, "decode": (NEW - 1) / decode, "peak MiB": peak / 1024}


def main() -> None:
    """Prints the table and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="99m,390m", help="(default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default %(default)s)")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="(default %(default)s)")
    parser.add_argument("--layers", type=int, default=None, help="instead of the size's own, to try something out")
    parser.add_argument("--gguf", nargs=2, metavar=("SHAPE", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.gguf:
        return write_gguf(Model(**json.loads(args.gguf[0])), args.gguf[1])
    rows, context = [], multiprocessing.get_context("spawn")
    print(f"{'size':>6} {'contender':>13} {'prefill/s':>10} {'ratio':>6} {'decode/s':>9} {'ratio':>6} {'peak MiB':>9} "
          f"{'ratio':>6}")
    for size in args.sizes.split(","):
        base: dict[str, float] = {}
        for contender in args.contenders.split(","):
            with context.Pool(1) as pool:
                found = pool.apply(measure, (contender, model_of(size, args.layers), args.rounds))
            base = base or found
            ratios = {f"{name} ratio": value / base[name] for name, value in found.items()}
            rows.append({"size": size, "contender": contender, **found, **ratios})
            cells = [found["prefill"], ratios["prefill ratio"], found["decode"], ratios["decode ratio"]]
            print(f"{size:>6} {contender:>13} {cells[0]:>10.1f} {cells[1]:>6.2f} {cells[2]:>9.1f} {cells[3]:>6.2f} "
                  f"{found['peak MiB']:>9.0f} {ratios['peak MiB ratio']:>6.2f}", flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
