"""`make fuzz SECONDS=60` runs random seeds for so long; without FUZZ_SECONDS the first few, and with FUZZ_SEED one."""

import itertools
import os
import random
import time
from collections.abc import Iterator

import fuzz
import fuzz_files
import pytest
from operators import nan_in_fresh_memory

SUBJECTS = fuzz.SUBJECTS | fuzz_files.SUBJECTS
SEEDS_ON_CI = 150


def seeds() -> Iterator[int]:
    if "FUZZ_SEED" in os.environ:
        yield int(os.environ["FUZZ_SEED"])
    elif "FUZZ_SECONDS" in os.environ:
        end = time.monotonic() + float(os.environ["FUZZ_SECONDS"]) / len(SUBJECTS)
        yield from itertools.takewhile(
            lambda _: time.monotonic() < end, itertools.count(random.SystemRandom().randrange(1 << 30))
        )
    else:
        yield from range(SEEDS_ON_CI)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_random_calls_are_right_or_refused(subject):
    with nan_in_fresh_memory():
        for seed in seeds():
            try:
                SUBJECTS[subject](seed)
            except Exception as error:
                raise AssertionError(f"FUZZ_SEED={seed} pytest tests/ops/test_fuzz.py -k {subject}") from error
