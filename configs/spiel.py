"""SpIEL: tuning a hundredth of the weights of a finished run's block matrices; configs/finetune.py tunes all of them.

Command:  spectra train --config=configs/spiel.py:runs/tri --workdir=runs/tri-spiel --config.data.sets=PREPARED
Argument: the run, or RUN@STEP, whose shape and data it takes over, a float one or a TriLM (its latent weights)
Chips:    as for training it: the gradient is formed whole; hours in proportion to tokens
Loss:     a FloatLM of 529k, its own text: from 3.145 to 3.144, tuned whole 3.129 (results/rivals)
Answers:  SpIEL-AG (arXiv 2401.16405) by its published code's density, selection, betas and epsilon, on plain text;
          the paper tunes Llama 2 of 7B and 13B on instructions
"""

from spectra_jax.train.start import config_from


def get_config(run: str = ""):
    """The config of `run` with a short schedule that tunes a few of its weights; without one, the schema's shape."""
    c = config_from(run)
    c.name = "spiel"
    c.optimizer.update(name="spiel", b2=0.999, eps=1e-6, weight_decay=0.0, only=("attention.", "mlp."))
    # Clipping sees the gradient of whole matrices, the published code that of tuned weights: not at all, then.
    c.optimizer.clip = 1e9
    c.train.tokens, c.data.batch = 50_000_000, 64  # as configs/finetune.py, to compare with it
    c.schedule.shape, c.schedule.peak, c.schedule.warmup = "cosine", 1e-4, 0.03  # ours
    return c
