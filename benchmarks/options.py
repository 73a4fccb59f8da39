"""Command-line options: each refuses what it does not take in one sentence."""

import argparse
import math
import re
from pathlib import Path

import torch

from benchmarks import InputError, record

MAX_THREADS = 1024


def add_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=record.RESULTS, metavar="DIR", help="for the result rows (benchmarks/results)"
    )


def add_conditions(parser: argparse.ArgumentParser) -> None:
    """Where short cases are measured, how often, and where their rows go."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument("--threads", type=thread_count, default=torch.get_num_threads(), metavar="N", help="of a CPU")
    parser.add_argument("--rounds", type=round_count, default=15, metavar="N", help="of all contenders (%(default)s)")
    add_out(parser)


def check_device(name: str) -> None:
    """
    Raises:
        InputError: a device that is not measured on, or a GPU where torch sees none.
    """
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise InputError(f"--device {name}: it is cpu or cuda.")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"--device {name}: torch sees no GPU here.")


def natural(text: str) -> int:
    if not text.isdecimal() or len(text) > 9:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at most nine digits")
    return int(text)


def positive(text: str) -> int:
    if (number := natural(text)) == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def thread_count(text: str) -> int:
    if (number := positive(text)) > MAX_THREADS:
        raise argparse.ArgumentTypeError(f"must be at most {MAX_THREADS}")
    return number


def round_count(text: str) -> int:
    if (number := positive(text)) < 2:
        raise argparse.ArgumentTypeError("must be at least 2, or there is no spread to judge by")
    return number


def positive_float(text: str) -> float:
    number = real(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return number


def probability(text: str) -> float:
    number = real(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")
    return number


def real(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
