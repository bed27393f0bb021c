"""Packages that can be called: `spectra_jax.train(...)` is `train` of api.py, `spectra_jax.train.loop` a module of it.

The packages' names are the verbs of the interface, and both are wanted. A module's class may be changed (Python's data
model, "Customizing module attribute access").
"""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module that calls the function of its name in api.py."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return _function(self)(*args, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_function(self))


def make_callable(name: str) -> None:
    """Makes the module of this name, which is being imported, a CallableModule."""
    sys.modules[name].__class__ = CallableModule


def _function(module: ModuleType) -> Any:
    # Only now: api.py is above everything, and who imports a package of it need not wait for the rest.
    return getattr(import_module("spectra_jax.api"), module.__name__.rpartition(".")[2])
