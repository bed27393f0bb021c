"""Training that begins with the parameters of another run: one that was pruned, or imported.

Command:  spectra train --config=configs/finetune.py:runs/cut --workdir=runs/cut-tuned --config.train.tokens=50e6
Argument: the run, or RUN@STEP, whose shape and data it takes over; other text of its tokenizer by
          --config.data.sets=FOLDER
Chips:    as for training it; hours in proportion to tokens
Loss:     a FloatLM of 529k with a quarter of its MLP pruned: 3.49 before, 3.17 after, 3.15 whole (results/rivals)
Answers:  the recovery stage of LLM-Pruner (arXiv 2305.11627, section 3.3) by its learning rate and batch, but of all
          parameters and on plain text; the paper trains LoRA of rank 8 for two epochs of Alpaca
"""

from spectra_jax.train.start import config_from


def get_config(run: str = ""):
    """The config of `run` with a short schedule that begins with its parameters; without one, the schema's shape."""
    c = config_from(run)
    c.name = "tuned"
    c.train.tokens, c.data.batch = 50_000_000, 64
    c.schedule.shape, c.schedule.peak, c.schedule.warmup = "cosine", 1e-4, 0.03  # the warm-up is ours
    return c
