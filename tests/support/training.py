"""Training runs of `python -m benchmarks`: starting one, and reading what it wrote."""

import argparse
import csv
import gzip
import json
import os
from pathlib import Path

from benchmarks import __main__ as command
from benchmarks import data

ROOT = Path(__file__).resolve().parents[2]
REAL_DATA = os.environ.get(data.VARIABLE)  # read before the tests hide it
TOPICS = (["war", "vote"], ["goal", "match"], ["stock", "market"], ["atom", "robot"])
LETTERS = {"Aland": "abcde", "Bland": "klmno", "Cland": "uvwxyz"}


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
