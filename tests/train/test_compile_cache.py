"""Where compiled programs are kept."""

from pathlib import Path

import jax
import pytest

from spectra_jax.train.compile_cache import FOLDER, cache_folder, use_compile_cache


@pytest.mark.parametrize(
    ("platform", "processes", "folder"), [("gpu", 1, FOLDER), ("tpu", 1, FOLDER), ("tpu", 4, None), ("cpu", 1, None)]
)
def test_programs_are_kept_where_it_pays(platform, processes, folder):
    assert cache_folder(platform, processes) == folder
    assert FOLDER == Path("~/.cache/spectra_jax/xla").expanduser()


@pytest.mark.parametrize("chosen", [None, "/elsewhere"])
def test_nothing_changes_on_a_cpu(chosen):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", chosen)
    try:
        use_compile_cache(True)
        assert jax.config.jax_compilation_cache_dir == chosen
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
