"""Where the tasks' data comes from: a folder the user names, or a checked download of the public originals."""

import csv
import gzip
import os
import re
import sys
import unicodedata
import zlib
from collections.abc import Iterator, Set
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import InputError, require

VARIABLE = "SEQKERNELS_DATA"

# 18 countries' surnames, from the PyTorchZeroToAll course: CSV rows "name","country" in ASCII, no header.
NAMES_URL = "https://raw.githubusercontent.com/hunkim/PyTorchZeroToAll/master/data/"
NAMES_SHA256 = {
    "names_train.csv.gz": "49b4bf41dce5bfeac989b46ca37cf7baccd9a0d2a855df82f86de67a9376268f",
    "names_test.csv.gz": "57d7758db533a42c99d513b2341a7e7b0f55c1e0e7d233b1ef6a4fa2f1adf753",
}

# AG News in four classes, from its authors' repository: CSV rows "1".."4","title","description", no header.
NEWS_URL = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"
NEWS_MD5 = {"train.csv": "b1a00f826fdfbd249f79597b59e1dc12", "test.csv": "d52ea96a97a2d943681189a97654912d"}
NEWS_CLASSES = ("World", "Sports", "Business", "Sci/Tech")
LANGUAGES_URL = "https://download.pytorch.org/tutorial/data.zip"  # of PyTorch's tutorial, one text file a language
SPACED = re.compile(r"(['.,()!?])")  # punctuation that is a word of its own
DROPPED = re.compile(r"<br />|[;:]")  # punctuation that only divides words

# Letters of European names that Unicode does not take apart into a plain one and an accent.
PLAIN = str.maketrans(dict(zip("łŁøØđĐıʽ’\xa0", "lLoOdDi'' ", strict=True)))  # noqa: RUF001
PLAIN |= str.maketrans({"ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe"})


def data_folder(option: Path | None) -> Path | None:
    """The data folder of `--data` or, without it, of the environment; None where neither is given."""
    if option is not None:
        return option
    variable = os.environ.get(VARIABLE)
    return Path(variable) if variable else None


def names_files(option: Path | None) -> tuple[Path, Path]:
    """The train and the test file of the names data, downloaded where no folder is given."""
    folder = data_folder(option)
    train, test = (
        find(folder, "names", file) if folder else download(NAMES_URL, file, checksum, "names")
        for file, checksum in NAMES_SHA256.items()
    )
    return train, test


def news_files(option: Path | None) -> tuple[Path, Path]:
    """The train and the test file of AG News, downloaded where no folder is given; a train_subset.csv will do."""
    folder = data_folder(option)
    if folder is None:
        train, test = (download(NEWS_URL, file, f"md5:{md5}", "ag_news_csv") for file, md5 in NEWS_MD5.items())
        return train, test
    try:
        return find(folder, "ag_news_csv", "train.csv"), find(folder, "ag_news_csv", "test.csv")
    except InputError:
        if not folder.is_dir():
            raise
        return find(folder, "ag_news_csv", "train_subset.csv", "train.csv"), find(folder, "ag_news_csv", "test.csv")


def find(folder: Path, kind: str, file: str, called: str | None = None) -> Path:
    """`folder/kind/file` or `folder/file`."""
    file_name = f"{kind}/{called or file}"
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; --data (or {VARIABLE}) names the folder that holds {file_name}.")
    for path in (folder / kind / file, folder / file):
        if path.is_file():
            return path
    raise InputError(f"{folder} holds no {file_name}; --data (or {VARIABLE}) names the folder that does.")


def download(url: str, file: str, checksum: str, kind: str) -> Path:
    """The file from the user's cache, where a first call puts it; its checksum is compared on every call."""
    pooch = require("pooch")
    cache = pooch.os_cache("seqkernels") / kind
    pooch.get_logger().setLevel("ERROR")
    if not (cache / file).exists():
        print(f"Downloading {url}{file} to {cache}", file=sys.stderr)
    try:
        return Path(pooch.retrieve(url + file, checksum, fname=file, path=cache))
    except (OSError, ValueError) as error:  # no network or no cache folder; a checksum that differs
        raise InputError(
            f"{url}{file} cannot be downloaded ({innermost(error)}); "
            f"--data DIR or {VARIABLE}=DIR names a folder that holds {kind}/{file}."
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


def read_language_files(option: Path | None) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Train and test rows (name, language) of a folder with one text file a language; every third name is for the test.

    Accents are dropped, as letters of ASCII alone are learned.
    """
    folder = data_folder(option)
    if folder is None:
        raise InputError(f"--form text needs --data DIR (or {VARIABLE}), a folder of text files as in {LANGUAGES_URL}.")
    places = (folder / "names" / "by_language", folder / "by_language", folder)
    files = next((files for place in places if (files := sorted(place.glob("*.txt")))), None)
    if files is None:
        raise InputError(
            f"{folder} holds no names/by_language/*.txt; --data (or {VARIABLE}) names the folder that does."
        )
    train, test = [], []
    for path in files:
        rows = [(ascii_name(name), path.stem) for name in read_lines(path)]
        test += rows[2::3]
        train += [row for index, row in enumerate(rows) if index % 3 != 2]
    if not test:
        raise InputError(f"{files[0].parent} holds too few names; each file needs three or more, one a line.")
    return train, test


def ascii_name(name: str) -> str:
    """The name without accents: every letter in ASCII.

    Raises:
        InputError: a letter that has no form in ASCII.
    """
    parts = unicodedata.normalize("NFKD", name.translate(PLAIN))
    plain = "".join(letter for letter in parts if unicodedata.category(letter) != "Mn")  # Mn: an accent by itself
    if not plain.isascii() or not plain.strip():
        raise InputError(f"{name!r} has letters that have no form in ASCII.")
    return plain.strip()


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file that are not empty."""
    lines = [line.strip() for line in read_text(path).splitlines()]
    if not any(lines):
        raise InputError(f"{path} has no lines.")
    return [line for line in lines if line]


def read_news(path: Path) -> list[tuple[str, int]]:
    """The (title and description, class 0..3) rows of a CSV file in AG News' form, each checked."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(checked_news(path, file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read as CSV text: {error}.") from error
    if not rows:
        raise InputError(f'{path} has no rows; it should hold lines of the form "class 1..4","title","description".')
    return rows


def checked_news(path: Path, lines: Iterator[str]) -> Iterator[tuple[str, int]]:
    reader = csv.reader(lines)
    for row in reader:
        if len(row) != 3 or row[0] not in ("1", "2", "3", "4"):
            shown = ", ".join(map(repr, row))[:80]
            raise InputError(
                f'{path}, line {reader.line_num}: expected "class 1..4","title","description" but found {shown}.'
            )
        yield f"{row[1]} {row[2]}", int(row[0]) - 1


def tokens(text: str) -> list[str]:
    """Words in lower case, by the rules of torchtext's "basic_english" tokenizer."""
    return SPACED.sub(r" \1 ", DROPPED.sub(" ", text.lower().replace('"', ""))).split()


def read_glove(path: Path, width: int, words: Set[str]) -> dict[str, Tensor]:
    """The vectors of `words` from a file in GloVe's text form: a word and its numbers a line.

    Raises:
        InputError: a line of another width, or no numbers.
    """
    vectors, number = {}, 0
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):
                found = line.rstrip().count(" ")
                # A few words of the large files have spaces of their own; the first line's has none.
                if found < width or (number == 1 and found > width):
                    raise InputError(f"{path}, line {number}: the model takes {width} numbers a word, found {found}.")
                word, *numbers = line.rstrip().rsplit(" ", width)
                if word in words:
                    vectors[word] = torch.tensor([float(value) for value in numbers])
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}.") from error
    except ValueError as error:  # no number
        raise InputError(f"{path}, line {number}: {error}.") from error
    if not number:
        raise InputError(f"{path} has no word vectors.")
    return vectors


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
