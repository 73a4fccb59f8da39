"""Training runs and timings of `seqkernels` beside `torch.nn`; `python -m benchmarks --help` lists them."""

import importlib
from types import ModuleType


class InputError(Exception):
    """What the user gave cannot be used; the message is one sentence for them (exit code 2, no traceback)."""


def require(name: str) -> ModuleType:
    """Import an optional dependency, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(
            f"{name} cannot be imported ({error}): "
            "`pip install --no-build-isolation -e '.[benchmarks]'` installs what benchmarks need."
        ) from error
