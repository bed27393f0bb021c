"""GGUF exports, read by the gguf package and by transformers: their own code undoes the packing and the order of rows.

What llama.cpp itself makes of them is in test_llama_cpp.py.
"""

import functools
import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType, dequantize
from helpers import SCRATCH, V, data, drawn, logits, same_bits, spectra, texts, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectra_jax import config as configs
from spectra_jax.data import tokenizer as tokenizers
from spectra_jax.errors import UserError
from spectra_jax.interop import gguf_export
from spectra_jax.interop.gguf_export import export, snapped
from spectra_jax.interop.importing import import_model
from spectra_jax.made import write_made
from spectra_jax.model.parameters import apply, block_matrices, init_parameters
from spectra_jax.quantize.pipeline import quantize
from spectra_jax.record import make_record
from spectra_jax.serve.load import Loaded, load

# Rows of whole blocks of 256; grouped queries, so that q and k have different numbers of heads.
WIDE = ("model.D=256", "model.F=512", "model.N=8", "model.H=64")
TRIT, BIT = ("family=TriLM", "model.weight=ternary", *WIDE), ("model.weight=binary", *WIDE)
TWO = (*TRIT, "model.scale_shards=2")
BLOCKS = {
    ("attention", "q"): "attn_q", ("attention", "k"): "attn_k", ("attention", "v"): "attn_v",
    ("attention", "o"): "attn_output", ("mlp", "gate"): "ffn_gate", ("mlp", "up"): "ffn_up",
    ("mlp", "down"): "ffn_down",
}
ROTATED = ("attn_q", "attn_k")


@functools.cache
def made(*overrides: str, second_half: float = 1.0) -> Path:
    """A run of random weights; do not write to it. The second half of mlp.down's inputs is multiplied."""
    config, run = tiny(*overrides), SCRATCH / f"made{made.cache_info().currsize}"
    parameters = drawn(jax.eval_shape(partial(init_parameters, config.model), jax.random.key(0)))
    down = parameters["blocks"]["mlp"]["down"]
    down["w"] = jnp.concatenate([half * by for half, by in zip(jnp.split(down["w"], 2, axis=1), (1, second_half))], 1)
    tokenizer = (data() / "tokenizer.json").read_text()
    write_made(run, config, parameters, make_record(configs.to_dict(config), None, ""), tokenizer)
    return run


def loaded(run: Path) -> Loaded:
    return load(str(run), devices=jax.devices()[:1])


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor (out, in) as it stands in the file, dequantized by the gguf package."""
    return {t.name: dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


def fields(path: Path) -> dict:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def expected_rows(w: np.ndarray, name: str, H: int) -> np.ndarray:
    """A matrix (in, out) of ours as llama.cpp has it: of q and k, row 2j + p of a head is our row p H/2 + j."""
    rows = w.T.copy()
    if name in ROTATED:
        for row in range(len(rows)):
            head, dim = divmod(row, H)
            rows[row] = w[:, head * H + (dim % 2) * (H // 2) + dim // 2]
    return rows


def half(x) -> np.ndarray:
    return np.asarray(x).astype(np.float16).astype(np.float32)


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0"])
@pytest.mark.parametrize("overrides", [TRIT, TWO, BIT], ids=["one", "two scales", "binary"])
def test_every_code_is_exact_and_every_scale_is_the_nearest_half(tmp_path, kind, overrides):
    run, path = made(*overrides), tmp_path / "model.gguf"
    export(str(run), path, matrices=kind, embedding="F32", head="F16")
    found, ours, m = read(path), loaded(run), loaded(run).config.model
    for key, w in block_matrices(ours.parameters).items():
        for layer in range(m.L):
            codes, scales = np.asarray(w.codes[layer]), half(w.scales[layer])
            each = np.repeat(scales, codes.shape[w.axis] // len(scales))
            effective = codes * (each[:, None] if w.axis == 0 else each)
            rows = found[f"blk.{layer}.{BLOCKS[key]}.weight"]
            np.testing.assert_array_equal(rows, expected_rows(effective, BLOCKS[key], m.H))
    types = {t.name: t.tensor_type.name for t in GGUFReader(path).tensors}
    assert types["blk.1.ffn_down.weight"] == kind and types["token_embd.weight"] == "F32"
    assert types["output.weight"] == "F16" and {types[n] for n in types if "norm" in n} == {"F32"}
    np.testing.assert_array_equal(found["token_embd.weight"], ours.parameters["embedding"])
    np.testing.assert_array_equal(found["output.weight"], half(ours.parameters["head"]).T)
    gains = ours.parameters["blocks"]["attention_norm"]["gain"]
    np.testing.assert_array_equal(found["blk.1.attn_norm.weight"], gains[1])


def theirs(path: Path, tokens: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def ours(model: Loaded, parameters: dict, tokens: np.ndarray) -> np.ndarray:
    with jax.set_mesh(model.mesh):
        return np.asarray(apply(model.graphdef, parameters)(jnp.asarray(tokens)))


TOKENS = np.random.RandomState(0).randint(0, 290, (2, 16))


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0"])
def test_transformers_gives_the_logits_of_the_snapped_model(tmp_path, kind):
    run, path = made(*TRIT), tmp_path / "model.gguf"
    export(str(run), path, matrices=kind, embedding="F32", head="F32")
    model = loaded(run)
    parameters, _ = snapped(model.parameters)
    np.testing.assert_allclose(ours(model, parameters, TOKENS), theirs(path, TOKENS), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        (), ("model.tie_embeddings=True", "model.K=1", "model.rope_base=500.0", "model.norm_eps=0.001"),
        ("model.H=24",),  # heads that do not make up D
        ("model.weight=ternary",),
    ],
    ids=["float", "tied", "wide heads", "ternary"],
)
def test_transformers_gives_the_same_logits(tmp_path, overrides):
    run, path = made(*overrides), tmp_path / "model.gguf"
    export(str(run), path, matrices="F32", embedding="F32", head="F32")
    np.testing.assert_allclose(logits(run, TOKENS), theirs(path, TOKENS), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["F16", "Q8_0"])
def test_other_types_round_each_weight_to_the_nearest(tmp_path, kind):
    run, path = made(), tmp_path / "model.gguf"
    export(str(run), path, matrices=kind, embedding=kind, head=kind)
    found, parameters = read(path), loaded(run).parameters
    w = {
        "token_embd.weight": parameters["embedding"], "output.weight": parameters["head"].T,
        "blk.0.ffn_down.weight": parameters["blocks"]["mlp"]["down"]["w"][0].T,
    }
    for name, exact in w.items():
        blocks = np.asarray(exact).reshape(-1, 32)
        error = np.abs(found[name].reshape(-1, 32) - blocks)
        if kind == "F16":
            np.testing.assert_array_equal(found[name], half(exact))
        else:  # half a step of 127, and a scale in float16
            assert np.all(error <= np.abs(blocks).max(axis=1, keepdims=True) * (0.5 / 127 + 2**-11)) and error.any()


def test_a_quantlm_is_written_as_what_it_stands_for(tmp_path):
    settings = ["family=QuantLM", "quantize.method=rtn", "quantize.bits=3", "quantize.group=16"]
    run = quantize(str(made()), configs.override(tiny(), settings), tmp_path / "run")
    export(str(run), tmp_path / "model.gguf", matrices="F16")
    w = jax.tree.map(lambda leaf: leaf[1], block_matrices(loaded(run).parameters)["mlp", "up"])
    np.testing.assert_array_equal(read(tmp_path / "model.gguf")["blk.1.ffn_up.weight"], half(w.dequantize()).T)
    with pytest.raises(UserError, match=r"of .*run are quantized otherwise \(Grid\): choose --type=F16 or Q8_0"):
        export(str(run), tmp_path / "new.gguf")


@pytest.mark.parametrize("kind", ["TQ2_0", "TQ1_0"])
def test_an_import_is_the_snapped_model(tmp_path, kind):
    """Which is how what the file changes is evaluated."""
    run, path = made(*TWO), tmp_path / "model.gguf"
    said = export(str(run), path, matrices=kind, embedding="F32", head="F32")
    command = said.splitlines()[-1].removeprefix("a run of it, to evaluate: spectra ")
    assert command == f"import {path} --weight=ternary --scale-shards=2 --tokenizer={run}/tokenizer.json --out=RUN"
    back = tmp_path / "back"
    assert spectra(*command.replace("RUN", str(back)).split()).returncode == 0
    parameters, change = snapped(loaded(run).parameters)
    assert same_bits(loaded(back).parameters, parameters) and 0 < change <= 2**-11
    done = spectra("evaluate", f"--checkpoint={back}", f"--sets={data()}")
    assert done.returncode == 0 and done.stdout.startswith("TriLM model, step 0"), done.stderr


def test_the_fields(tmp_path):
    run, path = made("model.rope_base=500.0", "model.H=24"), tmp_path / "model.gguf"
    export(str(run), path, matrices="F16")
    found, spec = fields(path), json.loads((data() / "tokenizer.json").read_text())
    wanted = {
        "general.architecture": "llama", "general.file_type": 1, "llama.context_length": 16,
        "llama.embedding_length": 32, "llama.block_count": 2, "llama.feed_forward_length": 64,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.attention.key_length": 24,
        "llama.attention.value_length": 24, "llama.rope.dimension_count": 24, "llama.rope.freq_base": 500.0,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-5), "llama.vocab_size": V,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in spec["model"]["merges"]],
        "spectra_jax.family": "FloatLM", "spectra_jax.step": 0,
    }
    assert {name: found[name] for name in wanted} == wanted
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    known = len(spec["model"]["vocab"])
    assert len(tokens) == len(types) == len(set(tokens)) == V > known
    assert {token: k for k, token in enumerate(tokens[:known])} == spec["model"]["vocab"]
    assert (tokens[0], types[0]) == ("<|endoftext|>", TokenType.CONTROL)
    assert set(types[1:known]) == {TokenType.NORMAL} and set(types[known:]) == {TokenType.UNUSED}
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"), loaded(run).tokenizer
    assert theirs.convert_ids_to_tokens(range(known)) == tokens[:known] and theirs.eos_token_id == ours.eod


def test_the_command_says_what_it_changed_and_gives_the_same_bytes_again(tmp_path):
    run, files = made(*TRIT), [tmp_path / name for name in ("a.gguf", "b.gguf")]
    for path in files:
        done = spectra("export", f"--checkpoint={run}", "--to=gguf", "--type=TQ1_0", f"--out={path}")
        assert done.returncode == 0, done.stderr
    assert files[0].read_bytes() == files[1].read_bytes()
    first, change, _ = done.stdout.splitlines()
    size = files[0].stat().st_size / 1e6
    assert first == f"{files[1]}: {size:.1f} MB, matrices TQ1_0, embedding Q8_0, head Q8_0"
    worst = max(
        float(np.max(np.abs(half(w.scales) / np.asarray(w.scales) - 1)))
        for w in block_matrices(loaded(run).parameters).values()
    )
    assert change == f"scales in float16: changed by {worst:.1e} of their value at most"


@pytest.mark.parametrize("second_half", [0.7, 1.6, 0.3])
def test_blocks_of_two_scales_are_said_with_their_error(tmp_path, second_half):
    """As of the 1.1B model's o, with shards of 896 inputs; here of 384 and of 128."""
    run, path = made(*TWO, "model.F=768", "model.N=4", second_half=second_half), tmp_path / "model.gguf"
    said = export(str(run), path).splitlines()[2:]
    assert len(said) == 3 and "--weight=float --tokenizer" in said[2]
    found, matrices = read(path), block_matrices(snapped(loaded(run).parameters)[0])
    for key, line, blocks, inputs in ((("attention", "o"), said[0], 1, 256), (("mlp", "down"), said[1], 3, 768)):
        worst, wrong = 0.0, np.zeros(inputs, bool)
        for layer in range(2):
            rows, w = found[f"blk.{layer}.{BLOCKS[key]}.weight"], jax.tree.map(lambda x, k=layer: x[k], matrices[key])
            exact = np.asarray(w.dequantize()).T
            worst = max(worst, np.abs(rows[exact != 0] / exact[exact != 0] - 1).max())
            wrong |= (rows != exact).any(axis=0)
        assert line == (
            f"{'.'.join(key)}: scales are for {inputs // 2} inputs, so 1 of {blocks} blocks of 256 hold two, and keep "
            f"the larger: weights in them change by {worst:.1e} of their value at most"
        )
    smaller = range(384, 512) if second_half < 1 else range(256, 384)  # of the second block of mlp.down
    assert np.flatnonzero(wrong).tolist() == list(smaller)
    assert (worst == 1) == (second_half == 0.3)  # codes are lost where the scales are not within a factor of two


def with_scales(run: Path, scale: float) -> dict:
    parameters = loaded(run).parameters
    up = parameters["blocks"]["mlp"]["up"]["w"]
    parameters["blocks"]["mlp"]["up"]["w"] = jax.tree.map(
        lambda leaf: leaf if leaf.dtype == jnp.int8 else jnp.full_like(leaf, scale), up)
    return parameters


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_scales_that_float16_does_not_have(scale):
    with pytest.raises(UserError, match=re.escape(f"mlp.up has a scale of {scale:.1e}, and float16 reaches")):
        snapped(with_scales(made("model.weight=ternary"), scale))
    assert snapped(with_scales(made("model.weight=ternary"), 1e-7))[1] > 0.01  # among the last of float16's numbers


@pytest.mark.parametrize(
    ("overrides", "types", "message"),
    [
        (("model.weight=ternary",), {}, r"self_attn.q_proj.weight has rows of 32 weights, and TQ2_0 has blocks of "
                                         "256: choose --type=Q8_0 or F16 or F32"),
        (("model.H=12",), {"matrices": "Q8_0"}, r"o_proj.weight has rows of 48 weights, .*: choose --type=F16 or F32"),
        (("model.D=48",), {"matrices": "F16"}, r"embed_tokens.weight has rows of 48 .* choose --embedding-type=F16"),
        (("model.D=48",), {"matrices": "F16", "embedding": "F16"}, r"lm_head.weight has .* choose --head-type=F16"),
        ((), {"matrices": "TQ1_0"}, "TQ1_0 holds ternary and binary matrices, and those of .* are float: choose "
                                    "--type=F16 or Q8_0"),
        (("model.weight=bitnet158",), {}, "bitnet158 normalises and quantizes the input of every matrix"),
        ((), {"matrices": "Q4_K"}, "--type='Q4_K' is not one of TQ2_0, TQ1_0, Q8_0, F16, F32"),
        ((), {"embedding": "TQ2_0"}, "--embedding-type='TQ2_0' is not one of Q8_0, F16, F32"),
        ((), {"head": "f16"}, "--head-type='f16' is not one of Q8_0, F16, F32; did you mean F16?"),
    ],
)
def test_what_cannot_be_exported(tmp_path, overrides, types, message):
    with pytest.raises(UserError, match=message):
        export(str(made(*overrides)), tmp_path / "model.gguf", **types)
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced_or_left_half_written(tmp_path, monkeypatch):
    run, there = str(made()), tmp_path / "there.gguf"
    there.write_text("mine")
    with pytest.raises(UserError, match="there.gguf exists, and nothing that was made is ever replaced"):
        export(run, there, matrices="F16")
    with pytest.raises(UserError, match="cannot write .*there.gguf/new: File exists"):
        export(run, there / "new", matrices="F16")

    def full(*arguments):  # as a disk is full in the midst of the tensors
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_export, "quantize", full)
    with pytest.raises(UserError, match="cannot write .*new.gguf: No space left on device; free some space"):
        export(run, tmp_path / "new.gguf", matrices="F16")
    assert [path.name for path in tmp_path.iterdir()] == ["there.gguf"] and there.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=gguf", "--dtype=float16"], "--dtype is for --to=hf and --to=gptq; for gguf there are --type"),
        (["--to=hf", "--type=F16"], "--head-type are for --to=gguf; for hf there is --dtype"),
        (["--to=gptq", "--head-type=F16"], "--head-type are for --to=gguf; for gptq there is --dtype"),
    ],
)
def test_options_of_another_format(tmp_path, arguments, message):
    done = spectra("export", f"--checkpoint={made()}", *arguments, f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1


def test_the_tokenizer_comes_back(tmp_path):
    export(str(made()), tmp_path / "model.gguf", matrices="F32")
    back = tokenizers.load(str(import_model(tmp_path / "model.gguf", tmp_path / "run") / "tokenizer.json"))
    documents = [*texts(5), " two  spaces\n\nnaïve — 1729 <|endoftext|>"]
    for a, b in zip(back.encode_batch(documents), loaded(made()).tokenizer.encode_batch(documents)):
        assert a.tolist() == b.tolist()
