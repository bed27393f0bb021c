"""Imports: transformers' own models give the same logits here, and a TriLM's codes come back to the last bit."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from helpers import TERNARY, data, logits, same_bits, spectra, trained
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spectra_jax.errors import UserError
from spectra_jax.interop import hf
from spectra_jax.interop.importing import import_model
from spectra_jax.serve.load import load
from spectra_jax.verify import verify

SHAPE = {
    "vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "head_dim": 8, "max_position_embeddings": 64, "attention_bias": False, "mlp_bias": False,
}
MODELS = {
    "plain": {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "grouped and tied": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
    "rope": {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
}


def folder_of(path: Path, *, dtype: torch.dtype = torch.float32, parts: str = "5GB", **settings) -> Path:
    """A random model as transformers saves it, with a tokenizer."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE | settings)).to(dtype).save_pretrained(path, max_shard_size=parts)
    shutil.copy(data() / "tokenizer.json", path)
    return path


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("dtype", "parts"), [(torch.float32, "5GB"), (torch.bfloat16, "20KB")])
def test_the_same_logits_as_transformers(tmp_path, model, dtype, parts):
    folder = folder_of(tmp_path / "theirs", dtype=dtype, parts=parts, **MODELS[model])
    assert (len(list(folder.glob("*.safetensors"))) > 2) == (parts == "20KB")
    run = import_model(folder, tmp_path / "run")
    tokens = np.random.RandomState(0).randint(0, 304, (2, 16))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        expected = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(run, tokens), expected, rtol=1e-4, atol=1e-5)
    assert verify(run).startswith("1 checkpoint of")


@pytest.mark.parametrize("weight", ["ternary", "binary"])
def test_codes_and_scales_come_back_exactly(tmp_path, weight):
    run = trained(*(TERNARY if weight == "ternary" else ("model.weight=binary",)), "model.scale_shards=2")
    first = hf.export(str(run), tmp_path / "first")
    back = import_model(first, tmp_path / "run", weight=weight, scale_shards=2)
    here = jax.devices()[:1]
    assert same_bits(load(str(back), devices=here).parameters, load(str(run), devices=here).parameters)
    second = hf.export(str(back), tmp_path / "second")
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="there are no latent weights to load"):
        load(str(back), latent=True)


def test_the_commands_take_it(tmp_path):
    folder = hf.export(str(trained(*TERNARY)), tmp_path / "theirs")
    run = tmp_path / "run"
    done = spectra("import", str(folder), f"--out={run}", "--weight=ternary")
    assert (done.returncode, done.stdout) == (0, f"{run}\n"), done.stderr
    told, expected = (
        spectra("evaluate", f"--checkpoint={each}", f"--sets={data()}").stdout.splitlines()
        for each in (run, trained(*TERNARY))
    )
    assert told[0].startswith("TriLM theirs, step 0") and told[1:] == expected[1:] and len(told) == 3
    done = spectra("checkpoints", str(run))
    assert done.stdout.splitlines()[1].split()[2:] == ["-", done.stdout.split()[-3], "weights", "yes"], done.stderr
    done = spectra("generate", f"--checkpoint={run}", "--prompt=the whale", "--tokens=3")
    assert done.returncode == 0 and done.stdout.startswith("the whale"), done.stderr


def test_what_is_not_ternary_is_refused(tmp_path):
    float_folder = folder_of(tmp_path / "float", **MODELS["plain"])
    with pytest.raises(UserError, match="self_attn.q_proj of layer 0 is not ternary: .* of 1,024 weights"):
        import_model(float_folder, tmp_path / "run", weight="ternary")
    two = hf.export(str(trained(*TERNARY, "model.scale_shards=2")), tmp_path / "two")
    with pytest.raises(UserError, match="or another --scale-shards"):
        import_model(two, tmp_path / "run", weight="ternary")
    with pytest.raises(UserError, match="not binary"):
        import_model(two, tmp_path / "run", weight="binary", scale_shards=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "two"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2' .only 'llama' is known"),
        ({"attention_bias": True, "hidden_act": "gelu"}, "hidden_act='gelu' .*, attention_bias=True"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1.0}}, "rope_type='llama3'"),
        ({"intermediate_size": 64}, r"mlp.gate_proj.weight is .48, 32.; the model's shape makes it .64, 32."),
        ({"num_hidden_layers": 4}, "has no tensor model.layers.3.input_layernorm.weight"),
        ({"num_hidden_layers": 2}, "has 9 tensors that this model has no place for: model.layers.2.input_layernorm"),
        ({"hidden_size": None}, "config.json has no 'hidden_size'"),
    ],
)
def test_what_cannot_be_run_is_named(tmp_path, change, message):
    folder = folder_of(tmp_path / "theirs", **MODELS["plain"])
    content = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(UserError, match=message):
        import_model(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_files_that_are_missing_or_damaged(tmp_path):
    with pytest.raises(UserError, match="cannot read .*config.json"):
        import_model(tmp_path / "nowhere", tmp_path / "run")
    folder = folder_of(tmp_path / "theirs", **MODELS["plain"])
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="model.safetensors: .*; download it again"):
        import_model(folder, tmp_path / "run")
    with pytest.raises(UserError, match="theirs exists, and nothing that was made is ever replaced"):
        import_model(folder, folder)
