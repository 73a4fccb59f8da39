"""Training that survives being killed: all that the next step depends on, in one file, written whole or not at all."""

import hashlib
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import InputError

# Options that change how far a training goes, where it is written or what is shown, but no step of it.
FREE = {"checkpoint", "save_every", "epochs", "out", "threads"}
FREE |= {"interactive", "names", "sample", "prime", "temperature"}


def save(path: Path, content: dict[str, Any]) -> None:
    """The file holds the old content or the new one, never a part, at whatever moment the process ends."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with unfinished.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote; it runs no code from the file."""
    content = None
    try:
        with path.open("rb") as file:
            if zipfile.is_zipfile(file):  # torch's files are; of others it may raise anything
                file.seek(0)
                content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    except (RuntimeError, pickle.UnpicklingError):  # a zip file of something else
        content = None
    if not isinstance(content, dict) or not {"task", "options", "runs"} <= content.keys():
        raise InputError(f"{path} is no checkpoint of `python -m benchmarks train`.")
    return content


def check(path: Path, content: dict[str, Any], task: str, options: dict[str, Any]) -> None:
    """Continue only what was begun with the same options."""
    if content["task"] != task:
        raise InputError(f"{path} is a checkpoint of the task {content['task']}, not of {task}.")
    for name, value in content["options"].items():
        if name not in FREE and options.get(name) != value:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{path} was begun with {option} {value}, not {options.get(name)}: name another file.")


def fingerprint(*tensors: Tensor) -> str:
    """Of what was trained on: other data of the same size is other data."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
        digest.update(b";")
    return digest.hexdigest()


def random_state(device: torch.device) -> dict[str, Any]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
