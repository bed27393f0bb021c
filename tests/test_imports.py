"""Who may import whom: read from the source, not from what happens to be loaded."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Layer -> the layers that it may import beside itself. A layer is a module or a package of
# spectra_jax; a file belongs to the longest name here that its own begins with, so `train` is what
# of that package has no row of its own.
BASE = {"errors", "values", "schema", "checks", "suite", "config", "hardware", "progress"}
MODEL = BASE | {"sharding", "weights", "model"}
STEP = MODEL | {"train", "train.loss"}
RUN = STEP | {
    "data", "distributed", "record", "stored", "checkpoint", "metrics", "timer", "evaluate", "train.guard",
    "train.workdir", "train.start",
}
ALLOWED = {
    "errors": set(),
    "callable": set(),
    "hardware": {"errors"},
    "progress": {"errors"},
    "arguments": set(),
    "parser": {"errors", "arguments"},
    "metrics": {"errors"},
    "timer": set(),
    "values": {"errors"},
    "schema": {"values"},
    "suite": {"errors"},
    "checks": {"errors", "schema", "values"},
    "config": {"errors", "schema", "checks", "suite"},
    "sharding": {"errors", "schema"},
    "weights": {"errors", "schema", "sharding"},
    "model": {"errors", "checksum", "schema", "suite", "sharding", "weights"},
    "data": {"errors", "schema", "suite"},
    "checksum": set(),
    "distributed": {"errors"},
    "record": {"errors", "checksum"},
    "retention": {"schema"},
    "stored": {"errors", "checksum", "distributed", "record"},
    "checkpoint": {"errors", "progress", "schema", "distributed", "record", "retention", "stored"},
    "train.loss": {"sharding"},
    "train": MODEL | {"callable", "checksum", "train.loss"},
    "train.guard": {"errors"},
    "train.start": STEP | {"data", "serve", "stored", "train.workdir"},
    "train.workdir": BASE | {"data"},
    "evaluate": MODEL | {"callable", "data", "train.loss"},
    "train.loop": RUN,
    "serve": MODEL | {"data", "checksum", "stored", "checkpoint", "train.workdir"},
    "serve.pack": MODEL | {"stored", "made", "serve", "train.workdir"},
    "evaluate.scoring": MODEL | {"data", "serve"},
    "evaluate.windows": {"errors", "data", "evaluate", "evaluate.scoring", "serve"},
    "evaluate.items": {"evaluate.scoring"},
    "evaluate.alignment": {"errors", "evaluate", "evaluate.items", "evaluate.windows"},
    "evaluate.tasks": {
        "errors", "data", "evaluate", "evaluate.alignment", "evaluate.items", "evaluate.scoring", "serve",
    },
    "evaluate.converters": {"errors", "data", "evaluate.tasks"},
    "evaluate.adapter": {"errors", "evaluate.scoring", "evaluate.windows", "serve"},
    "evaluate.harness": {"errors", "evaluate", "evaluate.adapter", "serve"},
    "evaluate.report": MODEL | {"data", "evaluate", "evaluate.windows", "evaluate.tasks", "serve"},
    "made": BASE | {"checkpoint", "train.workdir", "weights"},
    "calibration": {"errors", "schema", "data", "serve"},
    "quantize": MODEL | {
        "callable", "calibration", "made", "checksum", "record", "stored", "train.workdir", "serve",
    },
    "prune": STEP | {"callable", "calibration", "data", "made", "record", "stored", "train.workdir", "serve"},
    "interop": MODEL | {"data", "record", "stored", "made", "serve"},
    "analysis.plots.style": {"errors"},
    "analysis.plots": {"errors", "metrics", "analysis.plots.style", "analysis.scaling_laws", "analysis.accelerators"},
    "analysis.accelerators": {"errors"},
    "analysis.fitting": set(),
    "analysis.scaling_laws": {"errors", "analysis.fitting"},
    "analysis": MODEL | {
        "analysis.plots", "analysis.accelerators", "analysis.scaling_laws", "checkpoint", "data", "evaluate",
        "evaluate.items", "evaluate.tasks", "evaluate.windows", "metrics", "record", "serve", "stored", "train",
        "train.workdir",
    },
    "sparse_delta": STEP | {"checksum", "serve", "stored", "made", "train.start", "train.workdir"},
    "verify": BASE | {"metrics", "record", "stored", "checkpoint"},
    "plan": STEP | {"callable", "stored"},
}
# Modules that exist for `python -m spectra_jax.COMMAND`: they hand over to the command line.
ENTRIES = {
    "checkpoints", "prepare", "import", "export", "plot", "generate", "harness", "train.__main__", "evaluate.__main__",
    "quantize.__main__", "prune.__main__", "plan.__main__", "delta", "pack",
}
ALLOWED |= dict.fromkeys(ENTRIES, {"cli", "callable"})
# The command line, and commands that compose all the rest.
COMMANDS = {"api", "cli", "quickstart", "sweep", "compare", "analyze", "report"}
ALLOWED |= dict.fromkeys(COMMANDS, set(ALLOWED) - ENTRIES | COMMANDS)

# Package -> the layers that may import it; every other import of it is refused.
OWNERS = {
    "ml_collections": {"config"},
    "absl": {"cli", "config"},
    "orbax": {"checkpoint", "stored"},
    "grain": {"data"},
    "array_record": {"data"},
    "tensorflow_datasets": {"data"},
    "pallas_kernels": {"weights"},
    "matplotlib": {"analysis", "analysis.plots", "analysis.plots.style"},
    "tensorflow": set(),
    "clu": set(),
    "jax._src": set(),
    "torch": set(),
    "transformers": set(),
    "safetensors": {"interop", "quantize"},
    "gguf": {"interop"},
    "lm_eval": {"evaluate.adapter", "evaluate.harness"},
}


def sources(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    """`spectra_jax/data/loader.py` -> `spectra_jax.data.loader`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_main_guard(node: ast.AST) -> bool:
    """`if __name__ == "__main__":`, where a module hands over to the command line."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports(node: ast.AST, package: list[str]) -> Iterator[str]:
    """Dotted names that the code imports, inside functions too; `from a import b` gives `a.b`."""
    for child in ast.iter_child_nodes(node):
        if is_main_guard(child):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            above = package[: len(package) - child.level + 1] if child.level else []
            start = ".".join(above + ([child.module] if child.module else []))
            yield from (f"{start}.{alias.name}" for alias in child.names)
        yield from imports(child, package)


def imports_of(path: Path) -> set[str]:
    package = list(path.relative_to(ROOT).parts[:-1])
    return set(imports(ast.parse(path.read_text()), package))


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def layer_of(name: str) -> str | None:
    """The layer of a module or of a name imported from one; None where the table has none."""
    name = name.removeprefix("spectra_jax.")
    return max((layer for layer in ALLOWED if under(name, layer)), key=len, default=None)


@pytest.mark.parametrize("path", sources("spectra_jax"), ids=module_of)
def test_arrows_between_layers(path):
    module, layer = module_of(path), layer_of(module_of(path))
    if module == "spectra_jax":
        allowed = {"serve"}  # `spectra_jax.load`, for notebooks
    else:
        assert layer, f"{module} is in no layer: add it to ALLOWED"
        allowed = ALLOWED[layer] | {layer}
    for name in imports_of(path):
        if under(name, "spectra_jax"):
            assert layer_of(name) in allowed, (
                f"{module} imports {name}; it may import {sorted(allowed)}"
            )


def test_arrows_never_turn_back():
    """The table has no cycle: layers stand in a line in which each imports only earlier ones."""
    rest = {
        layer: set(allowed) - {layer}
        for layer, allowed in ALLOWED.items()
        if layer not in COMMANDS | ENTRIES
    }
    while rest:
        free = {layer for layer, needs in rest.items() if not needs & set(rest)}
        assert free, f"these layers import one another: {sorted(rest)}"
        rest = {layer: needs for layer, needs in rest.items() if layer not in free}


@pytest.mark.parametrize("path", sources("spectra_jax"), ids=module_of)
def test_packages_with_an_owner(path):
    layer = layer_of(module_of(path))
    for name in imports_of(path):
        for package, owners in OWNERS.items():
            if under(name, package):
                assert layer in owners, (
                    f"{module_of(path)} imports {name}; only {sorted(owners)} may"
                )


def test_kernels_are_reached_through_two_doors():
    for path in sources("spectra_jax"):
        for name in imports_of(path):
            if under(name, "pallas_kernels"):
                doors = ("pallas_kernels.api", "pallas_kernels.parallel")
                assert name.startswith(doors), f"{module_of(path)} imports {name}"


def test_kernels_know_nothing_of_the_project():
    for path in sources("pallas_kernels"):
        for name in imports_of(path):
            assert not under(name, "spectra_jax"), f"{module_of(path)} imports {name}"
            assert not any(under(name, refused) for refused, owners in OWNERS.items() if not owners)


@pytest.mark.parametrize("folder", ["spectra_jax", "pallas_kernels", "configs", "benchmarks", "launch"])
def test_no_private_jax(folder):
    for path in sources(folder):
        tree = ast.parse(path.read_text())
        private = [
            ast.unparse(n)
            for n in ast.walk(tree)
            if isinstance(n, ast.Attribute) and n.attr == "_src"
        ]
        private += [n for n in imports_of(path) if under(n, "jax._src")]
        assert not private, f"{path.relative_to(ROOT)}: {private}"


def test_the_test_sees_what_it_should(tmp_path):
    """Every form of import is found, and the guard's are not."""
    source = (
        "import a.b\nfrom c import d\nfrom . import e\nfrom ..x import y\n"
        "def f():\n    import g\n"
        "if __name__ == '__main__':\n    from h import i\n"
    )
    found = set(imports(ast.parse(source), ["spectra_jax", "data"]))
    assert found == {"a.b", "c.d", "spectra_jax.data.e", "spectra_jax.x.y", "g"}
    assert layer_of("spectra_jax.train.loop.Loop") == "train.loop"
    assert layer_of("spectra_jax.train.step") == "train"
    assert layer_of("spectra_jax.training") is None
