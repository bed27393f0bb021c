"""A GGUF file of Llama's shape, to be imported: any type of tensor that the `gguf` package can dequantize."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, ReaderTensor, TokenType, dequantize
from jaxtyping import Float
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from spectra_jax.errors import UserError
from spectra_jax.interop.gguf_vocabulary import SPLITS
from spectra_jax.interop.llama import Source
from spectra_jax.schema import Model

# transformers' names to llama.cpp's.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}


def open_file(path: Path, tokenizer: str | None = None) -> Source:
    """Opens it. `tokenizer` is a tokenizer.json to take in place of its own.

    Raises:
      UserError: no GGUF file, a model that is not Llama-shaped, or a tokenizer that is not known here.
    """
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"cannot read {path}: {error}; download it again") from error
    try:
        text = Path(tokenizer).read_text("utf-8") if tokenizer else None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {tokenizer}: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    m, asked = model_of(fields, tied="output.weight" not in tensors), set()

    def tensor(name: str) -> Rows:
        stem, layer = name.removesuffix(".weight"), ""
        if stem.startswith("model.layers."):
            number, stem = stem.removeprefix("model.layers.").split(".", 1)
            layer = f"blk.{number}."
        theirs = f"{layer}{NAMES[stem]}.weight"
        if theirs not in tensors:
            raise UserError(f"{path} has no tensor {theirs}; it has {len(tensors)} others")
        asked.add(theirs)
        heads = {"self_attn.q_proj": m.N, "self_attn.k_proj": m.K}.get(stem, 0)
        return Rows(tensors[theirs], heads)

    return Source(
        name=path.stem, model=m, context=fields.get("llama.context_length", 2048), tokens=None,
        tokenizer=text or tokenizer_of(fields).to_str(), tensor=tensor,
        unread=lambda: sorted(tensors.keys() - asked),
    )


def model_of(fields: Mapping[str, Any], tied: bool) -> Model:
    """The shape that the file's fields describe.

    Raises:
      UserError: it is not Llama's, or something in it has no counterpart here.
    """
    architecture, scaling = fields.get("general.architecture"), fields.get("llama.rope.scaling.type", "none")
    if architecture != "llama" or scaling != "none":
        raise UserError(f"this model cannot be run here: architecture {architecture!r} with rope scaling {scaling!r}; "
                        "only 'llama' with 'none' is known")
    try:
        D, N = fields["llama.embedding_length"], fields["llama.attention.head_count"]
        H = fields.get("llama.attention.key_length", D // N)
        if fields.get("llama.rope.dimension_count", H) != H:
            raise UserError(f"rope turns {fields['llama.rope.dimension_count']} of {H} dims; all is what is known here")
        return Model(
            V=len(fields["tokenizer.ggml.tokens"]), D=D, F=fields["llama.feed_forward_length"], N=N, H=H,
            L=fields["llama.block_count"], K=fields.get("llama.attention.head_count_kv", N), tie_embeddings=tied,
            rope_base=float(fields.get("llama.rope.freq_base", 10_000.0)),
            norm_eps=float(fields["llama.attention.layer_norm_rms_epsilon"]),
        )
    except KeyError as error:
        raise UserError(f"the file has no field {error}") from error


@dataclass(frozen=True)
class Rows:
    """A tensor (out, in) or a vector; slicing dequantizes the rows that it needs.

    llama.cpp turns neighbouring dims of a head, transformers those half a head apart, and so the rows of q and k stand
    in another order in the file: dim 2j + p of a head is dim p H/2 + j here. `heads` is 0 for every other tensor.
    """

    tensor: ReaderTensor
    heads: int

    def get_shape(self) -> list[int]:
        """(out, in), or the length of a vector."""
        return [int(n) for n in self.tensor.shape[::-1]]

    def __getitem__(self, index: tuple[slice, ...]) -> Float[np.ndarray, "..."]:
        rows = np.arange(self.get_shape()[0])
        if self.heads:
            rows = rows.reshape(self.heads, -1, 2).swapaxes(1, 2).ravel()
        read = dequantize(self.tensor.data[rows[index[0]]], self.tensor.tensor_type)
        return read[(slice(None), *index[1:])]


def tokenizer_of(fields: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE that the file holds.

    Raises:
      UserError: another kind of tokenizer, or another way to split text before it.
    """
    kind, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in SPLITS:
        raise UserError(f"the file's tokenizer ({kind!r}, split {pre!r}) is not known here ('gpt2' with one of "
                        f"{', '.join(SPLITS)} is); give its tokenizer.json with --tokenizer=FILE")
    tokens, merges = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.merges"]
    vocabulary, pairs = {token: k for k, token in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges]
    made = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre == "llama-bpe"))
    made.pre_tokenizer = pre_tokenizers.Sequence(SPLITS[pre])
    made.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"]):
        # As llama.cpp has it: control tokens stand for nothing in a text, and the others are found in it.
        if kind in (TokenType.CONTROL, TokenType.USER_DEFINED):
            special = kind == TokenType.CONTROL
            made.add_tokens([AddedToken(token, normalized=False, special=special)])
    return made
