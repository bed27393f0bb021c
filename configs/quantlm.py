"""QuantLM: a FloatLM quantized after training, and its rivals, by the name of a preset.

Command:  spectra quantize --checkpoint=runs/floatlm-99m --config=configs/quantlm.py:3bit --out=runs/quantlm-99m-3bit
Presets:  3bit 4bit 6bit 8bit (the paper's, by GPTQ) and those listed in PRESETS below
Chips:    one is enough: a block's matrices, their Hessians and the calibration text's hidden states at a time
Loss:     the paper prints none; six-task averages at 1.1b: FloatLM 54.9, 8 bit 54.8, 6 bit 55.0, 4 bit 54.4, 3 bit 52.6
Answers:  the QuantLM rows of the Spectra paper's tables (arXiv 2407.12327); it averages over three calibration sets:
          --config.quantize.seed=0, 1 and 2
"""

from spectra_jax import config
from spectra_jax.errors import one_of

# Groups of 128 and no zero points for 3 and 4 bits (section 4.2). No group is stated for 6 and 8 bits, and the paper's
# table of sizes counts none: one scale for each output.
PRESETS = {
    "3bit": {"method": "gptq", "bits": 3, "group": 128},
    "4bit": {"method": "gptq", "bits": 4, "group": 128},
    "6bit": {"method": "gptq", "bits": 6, "group": 0},
    "8bit": {"method": "gptq", "bits": 8, "group": 0},
    "rtn": {"method": "rtn", "grid": "absmax"},
    "awq": {"method": "awq", "bits": 4, "group": 128, "grid": "awq"},
    "nf4": {"method": "blockwise", "bits": 4, "group": 64, "grid": "nf4", "scale_dtype": "float32"},
    "fp4": {"method": "blockwise", "bits": 4, "group": 64, "grid": "fp4", "scale_dtype": "float32"},
    "nf4-double": {"method": "blockwise_double", "bits": 4, "group": 64, "grid": "nf4"},
    "smoothquant": {"method": "smoothquant", "bits": 8, "group": 0, "grid": "absmax"},
    "llm_int8": {"method": "llm_int8", "bits": 8, "group": 0, "grid": "absmax", "scale_dtype": "float32"},
    "sparsegpt-50": {"method": "sparsegpt", "sparsity": 0.5},
    "sparsegpt-2of4": {"method": "sparsegpt", "pattern": "2:4"},
    "magnitude-50": {"method": "magnitude", "sparsity": 0.5},
    "billm": {"method": "billm"},
    "pb-llm": {"method": "pbllm", "bits": 8, "salient": 0.1},
}


def get_config(preset: str = "4bit"):
    """Settings for `spectra quantize`; any of them is changed by --config.quantize.KEY=VALUE."""
    c = config.default()
    c.family, c.name = "QuantLM", f"quantlm-{preset}"
    c.quantize.update(PRESETS[one_of(preset, PRESETS, "configs/quantlm.py")])
    return c


def presets() -> list[str]:
    """Their names."""
    return list(PRESETS)
