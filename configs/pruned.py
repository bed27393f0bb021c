"""A FloatLM with fewer heads and channels: LLM-Pruner, by the name of a criterion.

Command:  spectra prune --checkpoint=runs/flt --config=configs/pruned.py --config.prune.ratio=0.25 --out=runs/cut
          and then, to train on what is left, configs/finetune.py
Criteria: param_first (the paper's Element^1, and its default), param_second (Element^2), param_mix, vectorize (Vector),
          l1, l2, random
Chips:    one that holds the model and its gradients in float32, twice those for param_second and param_mix; seconds
Loss:     of SmolLM2-135M, whose MLPs lose a fifth of their channels and its 3 key-value heads stay, on 256 tokens of
          shipped text at a time, without recovery: 3.44 +- 0.04 before, 3.91 by param_first and param_mix, 4.14 by
          vectorize, 4.84 by random, 12.7 by l2. The paper's average over tasks of LLaMA-7B is 63.25, without a fifth
          of its parameters and after recovery 59.23
Answers:  the block-wise rows of LLM-Pruner's Table 1 (arXiv 2305.11627), but that all layers are pruned and by as much:
          the paper spares the first four and the last two of 32
"""

from spectra_jax import config


def get_config(criterion: str = "param_first"):
    """Settings for `spectra prune`; any of them is changed by --config.prune.KEY=VALUE."""
    c = config.default()
    c.family, c.name = "PrunedLM", f"pruned-{criterion}"
    c.prune.criterion = criterion
    return c
