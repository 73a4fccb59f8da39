"""Training runs of `python -m benchmarks`: starting one, and reading what it wrote."""

import argparse
import csv
import gzip
import json
import os
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import data
from benchmarks.distributed import World
from benchmarks.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
REAL_DATA = os.environ.get(data.VARIABLE)  # read before the tests hide it
TOPICS = (["war", "vote"], ["goal", "match"], ["stock", "market"], ["atom", "robot"])
LETTERS = {"Aland": "abcde", "Bland": "klmno", "Cland": "uvwxyz"}
REAL = pytest.mark.skipif(not REAL_DATA, reason="SEQKERNELS_DATA does not name the folder with the real data")
TEXT = "the quick brown fox jumps over the lazy dog.\n" * 120
LINES = ("--batch-size", 4, "--hidden", 24, "--embedding", 8)
QUICK = (*LINES, "--chunk", 20)


def write_csv(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "wt", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)


def run(*arguments: object) -> int:
    """The command's exit code, also where argparse raises it."""
    try:
        return command.main([str(argument) for argument in arguments])
    except SystemExit as error:
        return error.code


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def only_row(out: Path) -> dict:
    (row,) = rows(out)
    return row


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def options(name: str, *arguments: object) -> argparse.Namespace:
    return command.make_parser().parse_args(["train", name, *map(str, arguments)])


def refused(capsys, tmp_path: Path, says: str, *arguments: object) -> None:
    out = tmp_path / "out"
    assert run(*arguments, "--module", "torch", "--out", out) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and error.startswith("python -m benchmarks: ")
    assert not out.exists()


def names_task(*arguments: object, world: World = World()):  # noqa: B008
    return TASKS["names"](options("names", *arguments), world)
