"""`spectra quickstart`: the main job in minutes on a CPU, on text that comes with the package.

Tokenizes the shipped corpus with a small BPE of its own, trains a FloatLM and a TriLM of one shape on the same
batches, quantizes the FloatLM to 8, 6, 4 and 3 bits, evaluates all on held-out text, draws what happened and lets the
trained ones complete a prompt.
"""

import json
from pathlib import Path

import jax
import numpy as np

from spectra_jax import config as configs
from spectra_jax.analysis.plots import bits_versus_loss, plot_runs, weight_histograms
from spectra_jax.compare import row, table
from spectra_jax.data import corpus
from spectra_jax.data.prepare import prepare
from spectra_jax.errors import UserError
from spectra_jax.evaluate.report import evaluate_sets
from spectra_jax.model.matrices import stacked_codes, stacked_statistics
from spectra_jax.model.parameters import block_matrices
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.serve.generate import Generator
from spectra_jax.serve.load import Loaded, load
from spectra_jax.train.loop import train

# Chosen for what minutes on two cores can learn: 4096 entries spell common words whole, so that even an early model
# writes words and not syllables; 256 tokens hold a paragraph. A narrow model that sees a million tokens beat one of
# twice the size that sees half as many in the same time by half a nat (LOG.md, 2026-11-22).
VOCABULARY = 4096
CONTEXT = 256
PROMPTS = ("The people of the United States", "It was a truth well known to the whole family that")
FAMILIES = {"FloatLM": "float", "TriLM": "ternary", "BiLM": "binary", "BitNet": "bitnet158"}


def get_config(family: str = "TriLM"):
    """The quickstart's config of one family: one shape and the same batches for all.

    Raises:
      UserError: an unknown family.
    """
    if family not in FAMILIES:
        raise UserError(f"no family {family!r}; the quickstart has {', '.join(FAMILIES)}")
    c = configs.default()
    c.family, c.name = family, f"quickstart-{family.lower()}"
    c.model.update(V=VOCABULARY, D=128, F=384, L=3, N=2, K=2, H=64, weight=FAMILIES[family], unroll=3)
    c.model.attention_blocks = 2
    c.data.update(sets=("runs/quickstart/data",), T=CONTEXT, batch=4)
    c.train.steps = 1300
    c.train.loss_chunks = 2
    c.schedule.warmup = 60.0
    # The better of two or three peaks each; as in the suite, ternary models like a higher rate.
    c.schedule.update(shape="cosine", peak=3e-3, final=0.1)
    if family != "FloatLM":
        c.schedule.update(shape="linear", peak=5e-3, lower_peak=True, lowered_peak=3e-3, remove_decay=True, final=0.0)
    c.checkpoint.update(every_steps=650, permanent_tokens=0)
    c.evaluate.update(every_steps=325, batches=16)
    c.metrics.update(every_steps=10, weights_every_steps=50)
    return c


def run(workdir: Path | str) -> list[dict]:
    """Everything, into `workdir`; what is there already is not done again.

    Returns:
      One row per model, as in `results.json`.

    Raises:
      UserError: the folder cannot be written or holds something else.
    """
    workdir = Path(workdir)
    data = workdir / "data"
    print("1. preparing the shipped corpus (public domain; sources in spectra_jax/data/corpus/README.md)", flush=True)
    prepare(
        [corpus.path()], data, tokenizer=f"train:{VOCABULARY}", T=CONTEXT, licence="public domain",
        part_bytes=4 << 20, train_bytes=8 << 20,
    )
    runs = []
    for number, family in enumerate(("FloatLM", "TriLM"), 2):
        print(f"{number}. training {family}", flush=True)
        train(configs.override(configs.from_config_dict(get_config(family)), [f"data.sets={data}"]), workdir / family)
        runs.append(workdir / family)
    print("4. quantizing FloatLM", flush=True)
    quantlms = [quantized(workdir, bits) for bits in (8, 6, 4, 3)]
    print("5. comparing on held-out text", flush=True)
    plot_runs(runs, workdir / "loss.png")
    device = jax.devices()[:1]
    rows = [compare_row(load(str(folder), devices=device), data) for folder in [runs[0], *quantlms, runs[1]]]
    bits_versus_loss([{**row, "bits": row["stored_bits"]} for row in rows], workdir / "bits_versus_loss.png")
    latent = [load(str(folder), latent=True, devices=device) for folder in runs]
    draw_weights(*latent, workdir / "weights.png")
    (workdir / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(report(rows, workdir))
    return rows


def quantized(workdir: Path, bits: int) -> Path:
    """The QuantLM of so many bits, as the Spectra paper makes them, on the text that the FloatLM was trained on."""
    out, c = workdir / f"QuantLM-{bits}bit", configs.default()
    c.family, c.name = "QuantLM", f"quickstart-quantlm-{bits}bit"
    c.quantize.update(method="gptq", bits=bits, group=128 if bits < 6 else 0, samples=64)
    if not out.exists():
        quantize(str(workdir / "FloatLM"), configs.from_config_dict(c), out)
    return out


def compare_row(model: Loaded, data: Path) -> dict:
    """Quality, size and, of a model that was trained, completions."""
    c = model.config
    name = f"QuantLM {c.quantize.bits}-bit" if c.family == "QuantLM" else c.family
    quality = evaluate_sets(model, [str(data)])[str(data)]
    # Below the usual 0.8: a young model's unlikely tokens are mostly pieces that make no word.
    asked = PROMPTS if c.family != "QuantLM" else ()
    found = Generator(model).generate(asked, max_new_tokens=48, temperature=0.5) if asked else []
    written = [prompt + one.text for prompt, one in zip(asked, found)]
    return {**row(name, model, quality), "completions": written}


def draw_weights(flt: Loaded, tri: Loaded, path: Path) -> None:
    """Latent and ternary weights of one kind of matrix, beside the float model's."""
    key, m, ws = ("mlp", "up"), tri.config.model, block_matrices(tri.parameters)
    with jax.set_mesh(tri.mesh):
        codes = stacked_codes(m, ws, stacked_statistics(m, ws))[key]
    latent = {
        "TriLM up": np.asarray(ws[key]),
        "FloatLM up": np.asarray(block_matrices(flt.parameters)[key]),
    }
    weight_histograms(latent, {"TriLM up": np.asarray(codes), "FloatLM up": None}, path)


def report(rows: list[dict], workdir: Path) -> str:
    """The table, the completions and where the pictures are."""
    lines = ["", table(rows)]
    for r in rows:
        if r["completions"]:
            lines += ["", f"{r['name']} writes:"] + [f"  {text}" for text in r["completions"]]
    pictures = ("loss.png", "bits_versus_loss.png", "weights.png")
    return "\n".join([*lines, "", "pictures: " + ", ".join(str(workdir / name) for name in pictures)])


if __name__ == "__main__":
    from spectra_jax.cli import main

    main("quickstart")
