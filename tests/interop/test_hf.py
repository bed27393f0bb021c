"""Exports against transformers, which loads them with its own code."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TERNARY, copy_of, logits, spectra, texts, trained
from transformers import AutoModelForCausalLM, AutoTokenizer

from spectra_jax.errors import UserError
from spectra_jax.interop import hf
from spectra_jax.serve.load import load

FAMILIES = {
    "float": (), "ternary": (*TERNARY, "model.scale_shards=2"), "binary": ("model.weight=binary",),
    "grouped and tied": ("model.tie_embeddings=True", "model.K=1", "model.rope_base=500.0"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_gives_the_same_logits(tmp_path, family):
    run = trained(*FAMILIES[family])
    folder = hf.export(str(run), tmp_path / "export")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == "LlamaForCausalLM" and theirs.dtype == torch.float32
    tokens = np.random.RandomState(0).randint(0, 300, (2, 16))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(run, tokens), expected, rtol=2e-4, atol=2e-5)


def test_the_tokenizer(tmp_path):
    run = trained(*TERNARY)
    theirs, ours = AutoTokenizer.from_pretrained(hf.export(str(run), tmp_path / "export")), load(str(run)).tokenizer
    for text in (*texts(5), " two  spaces\n\nnaïve — 1729"):
        (ids,) = ours.encode_batch([text])
        assert theirs(text)["input_ids"] == ids.tolist() and theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == ours.eod


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_two_exports_of_one_checkpoint_are_the_same_bytes_and_say_which_it_is(tmp_path):
    run = trained(*TERNARY)
    for step, name in ((8, "a"), (8, "b"), (12, "c")):
        done = spectra("export", f"--checkpoint={run}@{step}", "--to=hf", f"--out={tmp_path / name}")
        assert (done.returncode, done.stdout) == (0, f"{tmp_path / name}\n"), done.stderr
    first, again, other = (content(tmp_path / name) for name in "abc")
    assert first == again and first["model.safetensors"] != other["model.safetensors"]
    said = [json.loads((tmp_path / name / "config.json").read_text())["spectra_jax"] for name in "ac"]
    assert [(s["step"], s["tokens"], s["weight"]) for s in said] == [(8, 1024, "ternary"), (12, 1536, "ternary")]
    assert said[0]["checksums_of_parameters"] != said[1]["checksums_of_parameters"]


def test_ternary_matrices_hold_three_values(tmp_path):
    theirs = AutoModelForCausalLM.from_pretrained(hf.export(str(trained(*TERNARY)), tmp_path / "export"))
    up = theirs.model.layers[1].mlp.up_proj.weight.detach().numpy()
    values = np.unique(up)
    assert len(values) == 3 and values[1] == 0 and values[0] == -values[2]


def test_several_files(tmp_path, monkeypatch):
    run = trained(*TERNARY)
    whole = AutoModelForCausalLM.from_pretrained(hf.export(str(run), tmp_path / "whole")).state_dict()
    monkeypatch.setattr(hf, "FILE_BYTES", 30_000)
    folder = hf.export(str(run), tmp_path / "parts")
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    parts = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(tmp_path, dtype):
    run = trained(*TERNARY)
    theirs = AutoModelForCausalLM.from_pretrained(hf.export(str(run), tmp_path / "export", dtype=dtype), dtype="auto")
    assert theirs.dtype == getattr(torch, dtype)
    expected = torch.tensor(np.asarray(load(str(run)).parameters["embedding"])).to(theirs.dtype)
    assert torch.equal(theirs.model.embed_tokens.weight, expected)


def test_what_cannot_be_exported(tmp_path):
    run = trained(*TERNARY)
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="there exists, and nothing that was made is ever replaced"):
        hf.export(str(run), tmp_path / "there")
    with pytest.raises(UserError, match="is not one of float32, bfloat16, float16"):
        hf.export(str(run), tmp_path / "new", dtype="int8")
    with pytest.raises(UserError, match="bitnet158 normalises and quantizes the input of every matrix"):
        hf.export(str(trained("model.weight=bitnet158")), tmp_path / "new")
    damaged = copy_of(run, tmp_path / "run")
    shutil.rmtree(damaged / "checkpoints" / "12" / "parameters")
    with pytest.raises(UserError, match="12 is damaged"):
        hf.export(str(damaged), tmp_path / "new")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write .*file/new"):
        hf.export(str(run), tmp_path / "file" / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run", "there"]
