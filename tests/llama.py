"""transformers' Llama with the weights of one of ours: the oracle of the model, and of losses in float64."""

import jax.numpy as jnp
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from spectra_jax.schema import Model

NAMES = {
    ("attention", "q"): "self_attn.q_proj",
    ("attention", "k"): "self_attn.k_proj",
    ("attention", "v"): "self_attn.v_proj",
    ("attention", "o"): "self_attn.o_proj",
    ("mlp", "gate"): "mlp.gate_proj",
    ("mlp", "up"): "mlp.up_proj",
    ("mlp", "down"): "mlp.down_proj",
}


def llama_of(m: Model, tree: dict, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    """transformers' model of the same shape with the same weights, which it computes with in `dtype`."""
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=m.V, hidden_size=m.D, intermediate_size=m.F, num_hidden_layers=m.L,
            num_attention_heads=m.N, num_key_value_heads=m.K, head_dim=m.H, hidden_act="silu",
            rms_norm_eps=m.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": m.rope_base},
            tie_word_embeddings=m.tie_embeddings, attention_bias=False, mlp_bias=False,
            max_position_embeddings=64, attn_implementation="eager",
        )
    ).to(dtype)  # fmt: skip
    blocks = tree["blocks"]
    state = {
        "model.embed_tokens.weight": tree["embedding"],
        "model.norm.weight": tree["norm"]["gain"],
    }
    state["lm_head.weight"] = tree["embedding"] if m.tie_embeddings else tree["head"].T
    for layer in range(m.L):
        prefix = f"model.layers.{layer}"
        for (module, name), theirs in NAMES.items():
            state[f"{prefix}.{theirs}.weight"] = blocks[module][name]["w"][layer].T
        for ours, theirs in (
            ("attention_norm", "input_layernorm"),
            ("mlp_norm", "post_attention_layernorm"),
        ):
            gain = blocks[ours]["gain"][layer] if ours in blocks else jnp.ones(m.D)
            state[f"{prefix}.{theirs}.weight"] = gain
    llama.load_state_dict({name: torch.tensor(np.array(w)) for name, w in state.items()})
    return llama
