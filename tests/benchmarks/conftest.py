"""The surroundings of a benchmark: its package on the path, and data folders of small size."""

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))  # last, so that an installed seqkernels goes before the source folder

from training import LETTERS, TEXT, TOPICS, write_csv

from benchmarks import data


@pytest.fixture(autouse=True)
def _no_data_from_outside(monkeypatch):
    monkeypatch.delenv(data.VARIABLE, raising=False)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A data folder of the real one's form: three countries, each with letters of its own, and news of four kinds."""
    choose = random.Random(0)
    for file, count in (("names_train.csv.gz", 150), ("names_test.csv.gz", 30)):
        countries = sorted(choose.choices(list(LETTERS), k=count))
        rows = [("".join(choose.choices(LETTERS[land], k=choose.randint(1, 9))).title(), land) for land in countries]
        write_csv(tmp_path / "data" / "names" / file, rows)
    for file, count in (("train.csv", 160), ("test.csv", 40)):
        items = []
        for index in range(count):
            topic = index % 4
            items.append((topic + 1, "A title", " ".join(choose.choices(TOPICS[topic], k=choose.randint(3, 20)))))
        write_csv(tmp_path / "data" / "ag_news_csv" / file, items)
    return tmp_path / "data"


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "text.txt"
