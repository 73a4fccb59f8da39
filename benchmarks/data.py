"""Where the tasks' data comes from: a folder the user names, or a checked download of the public originals."""

import csv
import gzip
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

from benchmarks import InputError, require

VARIABLE = "SEQKERNELS_DATA"

# 18 countries' surnames, from the PyTorchZeroToAll course: CSV rows "name","country" in ASCII, no header.
NAMES_URL = "https://raw.githubusercontent.com/hunkim/PyTorchZeroToAll/master/data/"
NAMES_SHA256 = {
    "names_train.csv.gz": "49b4bf41dce5bfeac989b46ca37cf7baccd9a0d2a855df82f86de67a9376268f",
    "names_test.csv.gz": "57d7758db533a42c99d513b2341a7e7b0f55c1e0e7d233b1ef6a4fa2f1adf753",
}


def data_folder(option: Path | None) -> Path | None:
    """The data folder of `--data` or, without it, of the environment; None where neither is given."""
    if option is not None:
        return option
    variable = os.environ.get(VARIABLE)
    return Path(variable) if variable else None


def names_files(option: Path | None) -> tuple[Path, Path]:
    """The train and the test file of the names data, downloaded where no folder is given."""
    folder = data_folder(option)
    train, test = (find_names(folder, file) if folder else download_names(file) for file in NAMES_SHA256)
    return train, test


def find_names(folder: Path, file: str) -> Path:
    """`folder/names/file` or `folder/file`."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; --data (or {VARIABLE}) names the folder that holds names/{file}.")
    for path in (folder / "names" / file, folder / file):
        if path.is_file():
            return path
    raise InputError(f"{folder} holds no names/{file}; --data (or {VARIABLE}) names the folder that does.")


def download_names(file: str) -> Path:
    """The file from the user's cache, where a first call puts it; its checksum is compared on every call."""
    pooch = require("pooch")
    cache = pooch.os_cache("seqkernels")
    pooch.get_logger().setLevel("ERROR")
    if not (cache / file).exists():
        print(f"Downloading {NAMES_URL}{file} to {cache}", file=sys.stderr)
    try:
        return Path(pooch.retrieve(NAMES_URL + file, NAMES_SHA256[file], fname=file, path=cache))
    except (OSError, ValueError) as error:  # no network or no cache folder; a checksum that differs
        raise InputError(
            f"{NAMES_URL}{file} cannot be downloaded ({innermost(error)}); "
            f"--data DIR or {VARIABLE}=DIR names a folder that holds names/{file}."
        ) from error


def innermost(error: BaseException) -> str:
    """What failed first: network libraries wrap one error in several others."""
    while error.__context__ is not None:
        error = error.__context__
    return " ".join(str(error).split()) or type(error).__name__


def read_names(path: Path) -> list[tuple[str, str]]:
    """The (name, country) rows of a gzipped CSV file, each checked: two fields, not empty, ASCII."""
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(checked_rows(path, file))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as gzipped CSV text: {error}.") from error
    if not rows:
        raise InputError(f'{path} has no rows; it should hold lines of the form "name","country".')
    return rows


def checked_rows(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    reader = csv.reader(lines)
    for row in reader:
        if len(row) != 2 or not all(row):
            raise InputError(f'{path}, line {reader.line_num}: expected "name","country" but found {row}.')
        name, country = row
        if not name.isascii():
            raise InputError(f"{path}, line {reader.line_num}: the name {name!r} has letters outside ASCII.")
        yield name, country


def read_text(path: Path) -> str:
    """A UTF-8 text file."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}.") from error


def python_documentation() -> str:
    """The language reference that `help()` shows, 0.5 MB of English and code in every Python's standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise InputError(f"this Python comes without its documentation ({error}); --text FILE names a text.") from error
    return "".join(topics[name] for name in sorted(topics))
