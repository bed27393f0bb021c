"""The Scalable MatMul-free LM: MLGRU in the place of attention, BitLinear in the place of every matrix.

Command:  spectra train --config=configs/matmulfree.py:370m --workdir=runs/matmulfree-370m --config.data.sets=PREPARED
Sizes:    370m (24 x 1024, 15B tokens), 1.3b (24 x 2048, 100B), 2.7b (32 x 2560, 100B)
Chips:    not measured; the matrices are a TriLM's of the same width and depth, without attention's scores
Loss:     at 529k 3.38, BitNet b1.58 3.35 (results/rivals); the paper has average zero-shot 40.3, 46.2, 49.9 (as
          recalled), Transformer++ 41.1, 48.0, 50.7
Answers:  the MatMul-free rows of arXiv 2406.02528, Table 1

The paper's gate and up are one matrix with one norm on its input. Here they are two: their scale is shared, and each
has a gain of its own.
"""

from spectra_jax import config, suite
from spectra_jax.errors import one_of

# L, D, tokens; peak learning rate (as recalled, not verified).
SIZES = {
    "370m": (24, 1024, 15_000_000_000, 4e-3),
    "1.3b": (24, 2048, 100_000_000_000, 2e-3),
    "2.7b": (32, 2560, 100_000_000_000, 1.5e-3),
}
H = 128  # of heads, which divide the state over devices and change no number


def get_config(size: str = "370m"):
    """One of the paper's sizes."""
    L, D, tokens, peak = SIZES[one_of(size, SIZES, "the size")]
    c = config.default()
    c.family, c.name = "MatMul-free", f"matmulfree-{size}"
    c.model.update(
        # The published models have Mistral's tokenizer, of 32,000 ids (as recalled).
        V=32_000, D=D, F=256 * -(-(8 * D // 3) // 256), L=L, N=D // H, K=D // H, H=H,
        mixer="mlgru", weight="bitlinear", quantized_head=True, share_glu_scale=True, norm_eps=1e-6,
    )
    c.data.sets = tuple(f"data/slimpajama/{name}={share}" for name, share in suite.SLIMPAJAMA.items())
    c.data.batch = 256  # half a million tokens; this and all that follows as recalled, not verified
    c.train.tokens = tokens
    c.optimizer.weight_decay = 0.01
    c.optimizer.no_decay = ("norm", "gain", "lower_bound")
    c.schedule.shape = "cosine"
    c.schedule.peak = peak
    c.schedule.warmup = 1000.0
    return c
