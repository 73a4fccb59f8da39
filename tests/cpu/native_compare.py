"""Compares two outputs of native_check.cpp: `python native_compare.py ONE OTHER`, exit code 1 where they differ."""

import sys
from pathlib import Path

# Relative difference of the norm of a result, by the type it is stored in.
TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2}


def rows(path: str) -> list[list[str]]:
    return [line.split() for line in Path(path).read_text().splitlines()]


def main(one: str, other: str) -> int:
    first, second = rows(one), rows(other)
    if not first or [row[:2] for row in first] != [row[:2] for row in second]:
        print(f"{one} and {other} have different cases")
        return 1
    worst = 0.0
    for (scalar, cell, *a), (_, _, *b) in zip(first, second, strict=True):
        for x, y in zip(map(float, a), map(float, b), strict=True):
            relative = abs(x - y) / (TOLERANCE[scalar] * max(abs(x), 1e-30))
            worst = max(worst, relative)
            if not relative <= 1:
                print(f"{scalar} {cell}: {x} and {y} differ")
                return 1
    print(f"{len(first)} cases agree; the largest difference is {worst:.0%} of what is allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
