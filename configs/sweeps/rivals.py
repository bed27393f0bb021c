"""The field's other low-bit systems on one model and text: the mini-suite's middle size, its tokens and their order.

Command:  spectra sweep --sweep=configs/sweeps/rivals.py --workdir=runs/rivals
Text:     runs/mini-data, as configs/sweeps/mini_suite.py says
Then:     spectra prune --checkpoint=runs/rivals/floatlm-529k --config=configs/pruned.py --out=runs/rivals/pruned-529k
          spectra train --config=configs/finetune.py:runs/rivals/pruned-529k --workdir=runs/rivals/pruned-tuned-529k \\
              --config.train.tokens=1310720 --config.data.batch=8 --config.schedule.peak=1e-3
          spectra delta runs/rivals/floatlm-529k runs/rivals/float-tuned-529k --config=configs/delta.py \\
              --config.quantize.group=32 --out=runs/rivals/delta-come-529k; the same of :bit-delta
Cost:     python benchmarks/rivals.py
Table:    spectra compare runs/rivals/floatlm-529k runs/rivals/[!f]*/
Chips:    two CPU cores: about an hour
Loss:     in results/rivals
Answers:  what the systems of the README's table reach beside FloatLM, TriLM and QuantLM, and for what training

Rates were not searched: a run from scratch has that of the mini-suite's family that is nearest, a tuned one 1e-3.
"""

import copy
from pathlib import Path

from spectra_jax import config

SUITE, FLOAT = Path(__file__).with_name("mini_suite.py"), "runs/rivals/floatlm-529k"
SPARSE, SEEDS = "runs/rivals/sparsegpt-529k", (1, 2)  # beside 0, of the two that start alike
TUNED = {  # a finished model on a quarter of the tokens
    "train": {"tokens": 5_242_880 // 4}, "schedule": {"peak": 1e-3, "shape": "cosine", "lower_peak": False},
    "checkpoint": {"every_steps": 640}, "evaluate": {"every_steps": 160}, "metrics": {"weights_every_steps": 40},
}
TAUGHT = {"train": {"start": FLOAT}, "distill": {"teacher": FLOAT}}
DLT = {"model": {"weight": "dlt:group=0"}, "optimizer": {"rates": ("w.scale=0.1", "w.shift=0.1"),
                                                         "no_decay": ("norm", "w.scale", "w.shift")}}
# Of 3 bits, as the QuantLM beside it. Scales at a hundredth of the rate, as in the paper.
LRQAT = {"model": {"weight": "lrqat:bits=3,group=32,rank=8"},
         "optimizer": {"only": ("w.a", "w.b", "w.scale"), "rates": ("w.scale=0.01",), "weight_decay": 0.0}}
QAT = {"model": {"weight": "lrqat:bits=3,group=32,rank=0"},
       "optimizer": {"only": ("w.master", "w.scale"), "rates": ("w.scale=0.01",), "weight_decay": 0.0}}
SPIEL = {"optimizer": {"name": "spiel", "only": ("attention.", "mlp."), "b2": 0.999, "eps": 1e-6, "clip": 1e9,
                       "weight_decay": 0.0}}
MATMULFREE = {"model": {"mixer": "mlgru", "weight": "bitlinear", "quantized_head": True, "share_glu_scale": True},
              "optimizer": {"no_decay": ("norm", "gain", "lower_bound")}}


def get_sweep():
    """The mini-suite's own first. A FloatLM tuned like the others tells what those tokens alone are worth."""
    suite = {name: row for name, *row in config.run_config_file(str(SUITE), "get_sweep")}

    def like(name: str, family: str, *changes: dict):
        """A config of the mini-suite with some values changed."""
        c = copy.deepcopy(suite[f"{name}-529k"][0])
        for change in ({"family": family}, *changes):
            c.update(change)
        return c

    def sparse(weight: str):
        return {"model": {"weight": weight}, "optimizer": {"keep_zeros": True}, "train": {"start": SPARSE}}

    pruned = {"quantize": {"method": "sparsegpt", "sparsity": 0.5}}
    own = ("floatlm", "trilm", "bilm", "bitnet", "quantlm-4bit", "quantlm-3bit")
    rows = [(name, *suite[name]) for name in (f"{each}-529k" for each in own)]
    return rows + [(f"{name}-529k", *row) for name, *row in (
        ("float-tuned", like("floatlm", "FloatLM", TUNED, {"train": {"start": FLOAT}})),
        ("ternaryllm", like("trilm", "TernaryLLM", DLT)),
        ("ternaryllm-taught", like("trilm", "TernaryLLM", DLT, TAUGHT)),
        ("trilm-adamw8bit", like("trilm", "TriLM", {"optimizer": {"name": "adamw8bit"}})),
        ("trilm-begun", like("trilm", "TriLM", {"train": {"start": FLOAT}})),
        ("trilm-taught", like("trilm", "TriLM", TAUGHT)),
        ("matmulfree", like("bitnet", "MatMul-free", MATMULFREE)),
        ("lrqat", like("floatlm", "LR-QAT", TUNED, LRQAT, {"train": {"start": FLOAT}})),
        ("qat", like("floatlm", "QAT", TUNED, QAT, {"train": {"start": FLOAT}})),
        ("spiel", like("floatlm", "SpIEL", TUNED, SPIEL, {"train": {"start": FLOAT}})),
        ("sparsegpt", like("quantlm-4bit", "SparseLM", pruned), "floatlm-529k"),
        ("sparse-tuned", like("floatlm", "SparseLM", TUNED, sparse("sparse"))),
        ("sparse-trilm", like("trilm", "SparseLM", sparse("ternary"))),
    )] + [
        (f"{name}-529k-seed{seed}", like("trilm", family, *change, {"seed": seed}))
        for seed in SEEDS for name, family, change in (("trilm", "TriLM", ()), ("ternaryllm", "TernaryLLM", (DLT,)))
    ]
