"""Compiled programs that outlive their process, so that a restart does not compile again."""

from pathlib import Path

import jax

FOLDER = Path.home() / ".cache" / "spectra_jax" / "xla"


def cache_folder(platform: str, processes: int) -> Path | None:
    """Where the programs of a platform ("cpu", "gpu", "tpu") are kept by default; None: they are not.

    Not on CPUs: XLA compiles for the instructions of one machine, and a home that another machine shares, or an image
    that is moved, would bring it programs that it cannot run. Not among several processes: JAX writes from the first
    one alone, and all wait for those that compile; a folder that all of them see is theirs to name, in
    JAX_COMPILATION_CACHE_DIR.
    """
    return FOLDER if platform != "cpu" and processes == 1 else None


def use_compile_cache(enabled: bool) -> None:
    """Turns JAX's persistent compilation cache on where it pays, unless JAX_COMPILATION_CACHE_DIR decided already.

    To be called after the devices are known and before anything is compiled.
    """
    folder = cache_folder(jax.default_backend(), jax.process_count())
    if enabled and folder and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
