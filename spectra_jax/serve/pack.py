"""`spectra pack`: a run of stored forms, as small on the disk as the account of its bits."""

from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from spectra_jax.errors import UserError, one_of
from spectra_jax.made import refuse_existing, write_made
from spectra_jax.progress import human
from spectra_jax.serve.load import load
from spectra_jax.stored import parse_checkpoint, size
from spectra_jax.train.workdir import read_config, read_fingerprint
from spectra_jax.weights import packed
from spectra_jax.weights.form import is_form, size_in_bits

DTYPES = ("float16", "bfloat16", "float32")


def pack(checkpoint: str, out: Path | str, *, trits: bool = False, dtype: str = "float16") -> str:
    """Writes the run `out`, which every command takes, and says how small it is.

    Args:
      checkpoint: of a ternary, binary or quantized model: WORKDIR[@STEP].
      trits: ternary codes at 1.6 bits instead of 2.
      dtype: of what is not quantized: embedding, head and gains.

    Raises:
      UserError: a float model, an unknown dtype, or `out` is there.
    """
    out = Path(out)
    one_of(dtype, DTYPES, "--dtype")
    refuse_existing(out)
    source = load(checkpoint)
    stored, _ = size_in_bits(source.parameters)
    parameters, change = _rounded(source.parameters, dtype)
    if parameters is source.parameters:
        raise UserError(f"{checkpoint} is a float model ({source.config.family}) and has no codes to pack; quantize it")
    workdir, _ = parse_checkpoint(checkpoint)
    content = {
        **{key: value for key, value in source.record.items() if key not in ("arrays", "forms", "step")},
        "packed": {"of": str(checkpoint), "step": source.step, "dtype": dtype, "trits": trits},
    }
    with jax.set_mesh(source.mesh):
        parameters = packed.pack(parameters, trits=trits)
        tokenizer = (workdir / "tokenizer.json").read_text("utf-8")
        fingerprint = read_fingerprint(workdir)
        write_made(
            out, read_config(workdir), parameters, content, tokenizer, step=source.step, fingerprint=fingerprint
        )
    taken = size(out)
    return (
        f"{out}: {human(taken)}B on disk, {8 * taken / stored:.3f} of the {human(stored / 8)}B of its stored bits; "
        f"largest relative change of what is not quantized, in {dtype}: {change:.1e}"
    )


def _rounded(parameters: PyTree, dtype: str) -> tuple[PyTree, float]:
    """Everything but the forms in `dtype`, and the largest relative change; itself where there is no form."""
    if not any(map(is_form, jax.tree.leaves(parameters, is_leaf=is_form))):
        return parameters, 0.0
    changes = []

    def of(node: PyTree) -> PyTree:
        if is_form(node):
            return node
        new = node.astype(dtype)
        changes.append(float(jnp.max(jnp.abs(new - node) / jnp.maximum(jnp.abs(node), jnp.finfo(dtype).tiny))))
        return new

    return jax.tree.map(of, parameters, is_leaf=is_form), max(changes)
