"""Training that survives being killed: all that the next step depends on, in one file, written whole or not at all."""

import contextlib
import fcntl
import glob
import hashlib
import io
import os
import pickle
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import InputError

# Options that change how far a training goes, where it is written or what is shown, but no step of it.
FREE = {"checkpoint", "save_every", "epochs", "out", "threads"}
FREE |= {"quantized", "interactive", "names", "sample", "prime", "temperature"}


# What a file begins with, before the SHA-256 of all that follows and a line's end; then comes what torch.save writes.
_BEGIN = b"seqkernels checkpoint "
_UNFINISHED = ".unfinished"


def save(path: Path, content: dict[str, Any]) -> None:
    """The file holds the old content or the new one, never a part, at whatever moment the process ends; and where there
    is no room for the new one, nothing of it is left behind."""
    written = io.BytesIO()
    torch.save(content, written)
    data = written.getvalue()
    unfinished = None
    try:
        # A name of its own: another process that writes the same file does not write into this one.
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=path.name + ".", suffix=_UNFINISHED, delete=False
        ) as file:
            unfinished = Path(file.name)
            file.write(_BEGIN + hashlib.sha256(data).hexdigest().encode() + b"\n" + data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        if unfinished:
            unfinished.unlink(missing_ok=True)  # only what failed is still there


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote; it runs no code from the file, and takes none that was damaged since."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.") from error
    if data.startswith(_BEGIN):
        checksum, _, data = data[len(_BEGIN) :].partition(b"\n")
        if checksum != hashlib.sha256(data).hexdigest().encode():
            raise InputError(f"{path} is damaged: its content is not what was saved.")
    content = None
    if data.startswith(b"PK") and zipfile.is_zipfile(io.BytesIO(data)):  # of other files torch may raise anything
        with contextlib.suppress(RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not {"task", "options", "runs"} <= content.keys():
        raise InputError(f"{path} is no checkpoint of `python -m benchmarks train`.")
    return content


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """For one process at a time: two trainings that continue one file would undo each other's.

    Raises:
        InputError: another process has it.
    """
    beside = path.with_name(path.name + ".lock")
    with beside.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(lock.fileno()).st_ino == beside.stat().st_ino  # else another has had it, and ended just now
        except OSError:
            mine = False
        if not mine:
            raise InputError(f"{path} is in use by another training: name another file, or wait for it.")
        for left in path.parent.glob(f"{glob.escape(path.name)}.*{_UNFINISHED}"):
            left.unlink()  # of a training that was killed while it saved
        try:
            yield
        finally:
            beside.unlink(missing_ok=True)


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
