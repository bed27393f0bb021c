"""LR-QAT: a float run quantized by training low-rank factors inside the rounding.

Command:  spectra train --config=configs/lrqat.py:runs/floatlm-99m --workdir=runs/lrqat-99m
Argument: the float run, or RUN@STEP, whose shape and data are taken over
Full:     quantization-aware training of all weights: --config.model.weight=lrqat:bits=4,rank=0
          --config.optimizer.only=w.master,w.scale --config.schedule.peak=1e-5
Chips:    those of the float run or fewer. Memory of a step by XLA's count on a CPU, 8 layers of D=256 with remat=full:
          63 MB, of which parameters 14, optimizer 11; full training on the same grid 148 MB, 30, 55
Loss:     at 529k, 3 bits, 3.21, full QAT 3.18, GPTQ 3.22, float 3.15 (results/rivals); the paper's
          Llama-2 7B on WikiText-2: float 5.47, 4 bits 5.66, 3 bits 6.13, groups of 128 at 3 bits 5.98 (perplexities)
Answers:  Table 4 of arXiv 2406.06385
"""

from spectra_jax.train.start import config_from


def get_config(run: str = ""):
    """The paper's settings, on the shape and data of `run`; without one, on the schema's."""
    c = config_from(run)
    c.family, c.name = "LR-QAT", "lrqat"
    c.model.weight = "lrqat:bits=4,group=128,rank=32"
    c.data.batch, c.train.steps = 32, 10_000
    c.optimizer.update(only=("w.a", "w.b", "w.scale"), rates=("w.scale=0.01",), weight_decay=0.0)  # 1e-3 and 1e-5
    c.schedule.update(shape="linear", peak=1e-3, warmup=1000.0)
    return c
