"""What every test runs under: 8 CPU devices, quick compilation, no silent broadcasting of ranks, checked annotations.

Nothing of the package may be imported before this file has run: the hook rewrites modules as they
are loaded.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ warnings
os.environ.setdefault(
    "HF_HUB_OFFLINE", "1"
)  # transformers is an oracle here; its hub is never asked

import jax  # noqa: E402
import pytest  # noqa: E402
from absl import flags  # noqa: E402
from compilation import QUICK  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

# Most of a test is compilation. XLA_FLAGS= in front of pytest tests what XLA optimizes, as it does for users.
os.environ.setdefault("XLA_FLAGS", QUICK)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook(["spectra_jax", "pallas_kernels"], "beartype.beartype")

if not flags.FLAGS.is_parsed():
    flags.FLAGS(["pytest"])  # grain's worker processes ask for parsed flags


def pytest_configure(config):
    """Warnings that other packages raise against one another."""
    config.addinivalue_line(
        "filterwarnings", r"ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"
    )


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Compiled programs go with the file that made them: each holds maps of memory, of which a process has 65,530."""
    yield
    jax.clear_caches()
