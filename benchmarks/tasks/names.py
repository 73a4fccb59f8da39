"""Which of 18 countries does a surname come from?

    codes of the letters -> embedding -> 2-layer GRU -> h_n of the last layer -> linear -> one score a country

Names differ in length, so a batch is packed: the recurrent layer sees no padding, and h_n is the state after each
name's own last letter.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence

from benchmarks import InputError
from benchmarks.data import names_files, read_names
from benchmarks.train import Task, epoch_seed

ASCII = 128


class NameClassifier(nn.Module):
    """PackedSequence of letter codes -> [B, countries] scores."""

    def __init__(self, rnn_class: type[nn.Module], countries: int, hidden: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(ASCII, hidden)
        self.rnn = rnn_class(hidden, hidden, num_layers=layers)
        self.linear = nn.Linear(hidden, countries)

    def forward(self, names: PackedSequence) -> Tensor:
        letters = PackedSequence(self.embedding(names.data), names.batch_sizes)
        _, h_n = self.rnn(letters)
        return self.linear(h_n[-1])


class NameClassification(Task):
    """Rows "name","country" of names_train.csv.gz and names_test.csv.gz; the metric is accuracy on the second."""

    name = "names"
    metric = "test accuracy"
    unit = "names"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(epochs=10, batch_size=64, lr=1e-3, hidden=100, layers=2)
        parser.add_argument("--data", type=Path, metavar="DIR", help="folder with names/names_{train,test}.csv.gz")

    def __init__(self, options: argparse.Namespace):
        self.options = options
        train_file, test_file = names_files(options.data)
        train, test = read_names(train_file), read_names(test_file)
        self.countries = sorted({country for _, country in train})
        if unknown := {country for _, country in test} - set(self.countries):
            raise InputError(f"{test_file} names countries that {train_file} does not: {', '.join(sorted(unknown))}.")
        self.train_names, self.train_countries = self.encode(train)
        self.test_names, self.test_countries = self.encode(test)
        self.samples = len(self.train_names)
        self.description = (
            f"{self.samples:,} train and {len(self.test_names):,} test names of {len(self.countries)} countries, "
            f"embedding {options.hidden}, {options.layers}-layer GRU of {options.hidden}, packed"
        )

    def encode(self, rows: list[tuple[str, str]]) -> tuple[list[Tensor], Tensor]:
        """A tensor of ASCII codes for each name, and the countries' numbers."""
        # The files are sorted by country: a --limit takes rows from all over the file.
        rows = rows[:: -(-len(rows) // (self.options.limit or len(rows)))]
        names = [torch.tensor(list(name.encode("ascii"))) for name, _ in rows]
        return names, torch.tensor([self.countries.index(country) for _, country in rows])

    def model(self, rnn_class: type[nn.Module]) -> nn.Module:
        return NameClassifier(rnn_class, len(self.countries), self.options.hidden, self.options.layers)

    def batches(self, epoch: int) -> Iterator[tuple[PackedSequence, Tensor]]:
        """A new order of the names in each epoch, the same for every module."""
        generator = torch.Generator().manual_seed(epoch_seed(self.options, epoch))
        order = torch.randperm(self.samples, generator=generator)
        for rows in order.split(self.options.batch_size):
            yield pack(self.train_names, self.train_countries, rows)

    def loss(self, model: nn.Module, names: PackedSequence, countries: Tensor, state: None) -> tuple[Tensor, None]:
        return cross_entropy(model(names), countries), None

    def evaluate(self, model: nn.Module) -> float:
        right = 0
        for rows in torch.arange(len(self.test_names)).split(1024):
            names, countries = pack(self.test_names, self.test_countries, rows)
            right += (model(names).argmax(dim=1) == countries).sum().item()
        return right / len(self.test_names)

    def format_metric(self, value: float) -> str:
        return f"{value:.1%}"


def pack(names: list[Tensor], countries: Tensor, rows: Tensor) -> tuple[PackedSequence, Tensor]:
    """The given rows as one packed batch, longest name first, and their countries in the same order."""
    longest_first = sorted(rows.tolist(), key=lambda row: -len(names[row]))
    batch = [names[row] for row in longest_first]
    lengths = [len(name) for name in batch]
    return pack_padded_sequence(pad_sequence(batch), lengths), countries[longest_first]
