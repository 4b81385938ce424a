"""Lets SGLang's Python tree be imported where its compiled parts cannot be installed.

Python runs this file first when its folder is on ``PYTHONPATH``. Every name can be imported from the packages below,
and using one fails: what a test passes through is SGLang's own code in plain torch.
"""

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any, ClassVar

MISSING = (
    "sgl_kernel",
    "torchvision",
    "torchaudio",
    "torchcodec",
    "decord",
    "cuda",
    "flashinfer",
    "soundfile",
    "humming",
    "outlines",
    "tilelang",
)


class _Absent(type):
    """Attributes of what is missing are missing too."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{cls.__name__}.{name}")

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{cls.__name__} is not installed here")


def _absent(name: str) -> Any:
    return _Absent(name, (), {})


class _Module(ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _absent(f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        asked = sys._getframe(2).f_globals.get("__name__") == "importlib.util"  # whether it is there: it is not
        if fullname.split(".")[0] in MISSING and not asked:
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


sys.meta_path.append(_Finder())  # after the others: what is installed is used
