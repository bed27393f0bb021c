"""GGUF files against transformers, which reads them with code of its own; a real pretrained model among them."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType, quantize
from helpers import data, logits, smollm2, texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectra_jax.data import tokenizer as tokenizers
from spectra_jax.errors import UserError
from spectra_jax.interop.importing import import_model
from spectra_jax.serve.load import load

D, F, N, K, H, V = 256, 256, 4, 2, 64, 304


def write(path: Path, kind: Type, *, tied: bool = False, pre: str = "gpt-2", ternary: bool = False, **fields) -> Path:
    """A random model of one layer as llama.cpp stores it."""
    rng, spec = np.random.RandomState(0), json.loads((data() / "tokenizer.json").read_text())
    vocabulary = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    tokens = vocabulary + [f"<unused {k}>" for k in range(V - len(vocabulary))]
    file = GGUFWriter(path, fields.get("architecture", "llama"))
    file.add_block_count(1), file.add_context_length(64), file.add_embedding_length(D), file.add_feed_forward_length(F)
    file.add_head_count(N), file.add_head_count_kv(K), file.add_layer_norm_rms_eps(1e-5), file.add_rope_freq_base(500.0)
    file.add_rope_dimension_count(fields.get("turned", H))
    file.add_tokenizer_model("gpt2"), file.add_tokenizer_pre(pre), file.add_token_list(tokens)
    types = [TokenType.CONTROL if token == "<|endoftext|>" else TokenType.NORMAL for token in tokens]
    file.add_token_types(types), file.add_token_merges([" ".join(m) for m in spec["model"]["merges"]])
    file.add_eos_token_id(tokens.index("<|endoftext|>")), file.add_bos_token_id(tokens.index("<|endoftext|>"))

    def add(name: str, *shape: int, kind: Type = kind) -> None:
        w = rng.standard_normal(shape).astype(np.float32) * (0.1 if len(shape) > 1 else 0) + (len(shape) == 1)
        if ternary and len(shape) > 1 and "blk" in name:
            w = np.float32(0.037) * rng.randint(-1, 2, shape).astype(np.float32)
        if "attn_q" in name or "attn_k" in name:  # as llama.cpp's converter turns transformers' rows
            w = w.reshape(-1, 2, H // 2, D).swapaxes(1, 2).reshape(shape)
        file.add_tensor(name, quantize(w, kind), raw_dtype=kind)

    add("token_embd.weight", V, D, kind=Type.F32), add("output_norm.weight", D, kind=Type.F32)
    if not tied:
        add("output.weight", V, D, kind=Type.F16)
    for name, shape in (
        ("attn_norm", (D,)), ("attn_q", (N * H, D)), ("attn_k", (K * H, D)), ("attn_v", (K * H, D)),
        ("attn_output", (D, N * H)), ("ffn_norm", (D,)), ("ffn_gate", (F, D)), ("ffn_up", (F, D)), ("ffn_down", (D, F)),
    ):
        add(f"blk.0.{name}.weight", *shape, **({"kind": Type.F32} if len(shape) == 1 else {}))
    file.write_header_to_file(), file.write_kv_data_to_file(), file.write_tensors_to_file(), file.close()
    return path


def expected(path: Path, tokens: np.ndarray) -> np.ndarray:
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    with torch.no_grad():
        return theirs(torch.tensor(tokens)).logits.numpy()


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0", "Q4_1", "TQ1_0", "TQ2_0"])
def test_the_same_logits_as_transformers(tmp_path, kind):
    path = write(tmp_path / "model.gguf", Type[kind], tied=kind == "Q8_0")
    run = import_model(path, tmp_path / "run")
    tokens = np.random.RandomState(1).randint(0, V, (2, 12))
    np.testing.assert_allclose(logits(run, tokens), expected(path, tokens), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["F32", "TQ1_0", "TQ2_0"])
def test_ternary_weights_come_back_as_codes(tmp_path, kind):
    path = write(tmp_path / "model.gguf", Type[kind], ternary=True)
    run = import_model(path, tmp_path / "run", weight="ternary")
    up = load(str(run), devices=jax.devices()[:1]).parameters["blocks"]["mlp"]["up"]["w"]
    assert set(np.unique(up.codes)) == {-1, 0, 1}
    scale = np.float32(0.037) if kind == "F32" else np.float32(np.float16(0.037))  # those formats keep it in half
    np.testing.assert_array_equal(np.asarray(up.scales), [[scale]])


def test_the_tokenizer_is_made_of_the_file(tmp_path):
    run = import_model(write(tmp_path / "model.gguf", Type.F16), tmp_path / "run")
    ours, original = tokenizers.load(str(run / "tokenizer.json")), tokenizers.load(str(data() / "tokenizer.json"))
    documents = [*texts(5), " two  spaces\n\nnaïve — 1729 <|endoftext|>"]
    for a, b in zip(ours.encode_batch(documents), original.encode_batch(documents)):
        assert a.tolist() == b.tolist()
    assert ours.eod == original.eod


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "mamba"}, "architecture 'mamba'"),
        ({"turned": 32}, "rope turns 32 of 64 dims"),
        ({"pre": "qwen2"}, "split 'qwen2'. is not known here .*give its tokenizer.json with --tokenizer=FILE"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path, fields, message):
    path = write(tmp_path / "model.gguf", Type.F16, **fields)
    with pytest.raises(UserError, match=message):
        import_model(path, tmp_path / "run")
    if "pre" in fields:
        import_model(path, tmp_path / "run", tokenizer=str(data() / "tokenizer.json"))


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(UserError, match="cannot read .*none.gguf"):
        import_model(tmp_path / "none.gguf", tmp_path / "run")
    path = write(tmp_path / "model.gguf", Type.F16)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="cannot read .*model.gguf"):
        import_model(path, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.skipif("SPECTRA_OFFLINE" in os.environ, reason="SPECTRA_OFFLINE is set, and this downloads 93 MB once")
def test_a_real_pretrained_model(tmp_path):
    path = smollm2()
    run = import_model(path, tmp_path / "run")
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = tokenizers.load(str(run / "tokenizer.json"))
    text = "The capital of France is Paris. In 1789, the people of the city stormed the Bastille."
    (ids,) = ours.encode_batch([text])
    assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"]
    found, wanted = logits(run, ids[None]), expected(path, ids[None])
    np.testing.assert_allclose(found, wanted, atol=4e-4)  # of 30; each is 1e-4 from float64
    assert (found.argmax(-1) == wanted.argmax(-1)).all()
    probabilities = jax.nn.log_softmax(found[0, :-1])
    assert -np.mean(probabilities[np.arange(len(ids) - 1), ids[1:]]) < 2.5  # it knows English
