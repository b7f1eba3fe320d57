"""megalm: train large language models, from a laptop to thousands of GPUs, with one command.

    import megalm

    run = megalm.train(["+model=tiny", "train.steps=200", "run.name=mine"])
    print(run.losses[-1], megalm.load(run.folder).generate("The "))

`train`, `plan`, `tokenize` and `load` are the functions of `megalm.library`. Importing this package imports nothing else.
"""

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

FUNCTIONS = ("load", "plan", "tokenize", "train")


class _Room(ModuleType):
    """A folder of this package that is called like a function of the library: a call goes to the function."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return getattr(importlib.import_module("megalm.library"), self.__name__.rpartition(".")[2])(*arguments, **named)


class _Package(ModuleType):
    """Gives out the library's functions; `megalm.train` and `megalm.plan` are folders, too."""

    def __getattr__(self, name: str) -> Any:
        if name not in FUNCTIONS:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if importlib.util.find_spec(f"{self.__name__}.{name}") is not None:
            return importlib.import_module(f"{self.__name__}.{name}")
        return getattr(importlib.import_module("megalm.library"), name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FUNCTIONS and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
