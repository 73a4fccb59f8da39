"""Which of 18 countries does a surname come from?

    classifier   codes of the letters -> embedding -> GRU -> h_n of the last layer -> linear -> one score a country
    scratch      one-hot letters -> h = tanh(W [x, h] + b), a letter at a time -> linear -> one score a country

Names differ in length, so the classifier packs its batch: the recurrent layer sees no padding, and h_n is the state
after each name's own last letter. The model from scratch takes one name a step and plain gradient descent; its layer
is written out in torch operations on one side, and on the other is one call of the Elman kernel for the whole name.
"""

import argparse
import importlib
import string
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence

from benchmarks import InputError, training_report
from benchmarks.checkpoint import fingerprint
from benchmarks.data import ascii_name, names_files, read_language_files, read_lines, read_names
from benchmarks.distributed import World
from benchmarks.options import positive
from benchmarks.task import Batch, Run, Task, add_data_options, bucketed, cross_entropy, epoch_seed, sent, trainable

ASCII = 128
LETTERS = string.ascii_letters + " .,;'"  # of the model from scratch
BATCH_SIZE, LAYERS = 64, 2
EPOCHS_FROM_SCRATCH, STEPS_FROM_SCRATCH = 20, 5000  # 100,000 names, drawn with replacement


class NameClassifier(nn.Module):
    """Letter codes [B, T], longest name first, and lengths [B] -> [B, countries] scores.

    Codes may be on the host, where packing them takes no kernel for each letter.
    """

    def __init__(self, rnn_class: type[nn.Module], countries: int, hidden: int, layers: int, bidirectional: bool):
        super().__init__()
        self.embedding = nn.Embedding(ASCII, hidden)
        self.rnn = rnn_class(hidden, hidden, num_layers=layers, bidirectional=bidirectional)
        self.linear = nn.Linear(hidden * self.directions, countries)

    @property
    def directions(self) -> int:
        return 2 if self.rnn.bidirectional else 1

    def forward(self, codes: Tensor, lengths: Tensor) -> Tensor:
        # Packed inside the model, so that DataParallel can cut its input along the batch.
        names = pack_padded_sequence(codes, lengths.cpu(), batch_first=True)
        codes = sent(names.data, self.linear.weight.device) if names.data.device.type == "cpu" else names.data
        _, h_n = self.rnn(PackedSequence(self.embedding(codes), names.batch_sizes))
        return self.linear(torch.cat(h_n[-self.directions :].unbind(), dim=1))


class ElmanByHand(nn.Module):
    """x [T, 1, I] -> the last h [1, H], with one linear layer over input and hidden state."""

    backend = None

    def __init__(self, input_size: int, hidden_size: int):
        super().__init__()
        self.sizes = [input_size, hidden_size]
        self.combined = nn.Linear(input_size + hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(1, self.sizes[1])
        for letter in x:
            h = torch.tanh(self.combined(torch.cat([letter, h], dim=1)))
        return h


class ElmanByKernel(ElmanByHand):
    """The same layer and parameters: the columns of its one matrix are W_ih and W_hh."""

    def forward(self, x: Tensor) -> Tensor:
        functional = importlib.import_module("seqkernels.functional")
        w_ih, w_hh = self.combined.weight.split(self.sizes, dim=1)
        bias = self.combined.bias
        _, h_n = functional.rnn(x, None, [w_ih, w_hh, bias, torch.zeros_like(bias)], backend=self.backend)
        return h_n[0]


class NameClassifierFromScratch(nn.Module):
    """Letters [T] of one name -> [1, countries] scores."""

    def __init__(self, elman_class: type[ElmanByHand], countries: int, hidden: int):
        super().__init__()
        self.rnn = elman_class(len(LETTERS), hidden)
        self.linear = nn.Linear(hidden, countries)

    def forward(self, letters: Tensor) -> Tensor:
        return self.linear(self.rnn(one_hot(letters, len(LETTERS)).to(self.linear.weight)[:, None]))


class Names(NamedTuple):
    """Names as the models take them: letters [N, T], behind each name's own zeros; lengths [N]; countries [N]."""

    letters: Tensor  # these two on the host, where they are cut, and packing wants lengths
    lengths: Tensor
    countries: Tensor  # on the host, too, until a batch is asked for
    device: torch.device

    def batch(self, rows: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Of some names, longest first: (letters [B, T], lengths [B]) and countries [B]."""
        lengths = self.lengths[rows]
        return (self.letters[rows, : lengths[0]], lengths), sent(self.countries[rows], self.device)

    def one(self, row: int) -> tuple[Tensor, Tensor]:
        """Letters [T] and country [1]."""
        letters, country = self.letters[row, : self.lengths[row]], self.countries[row : row + 1]
        return sent(letters, self.device), sent(country, self.device)


class NameClassification(Task):
    """Names and their countries, from the CSV pair or from one text file a language; the metric is test accuracy."""

    name = "names"
    metric = "test accuracy"
    unit = "names"
    shards_batches = True

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add_data_options(parser, BATCH_SIZE)
        parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the names (default: download)")
        parser.add_argument(
            "--form",
            choices=("csv", "text"),
            default="csv",
            help="names/names_{train,test}.csv.gz, or names/by_language/*.txt with accents (%(default)s)",
        )
        parser.add_argument("--model", choices=("classifier", "scratch"), default="classifier", help="(%(default)s)")
        parser.add_argument("--hidden", type=positive, metavar="H", help="hidden units (100; from scratch: 128)")
        parser.add_argument("--layers", type=positive, help=f"of the GRU ({LAYERS})")
        parser.add_argument("--bidirectional", action="store_true", help="a GRU in both directions")
        parser.add_argument("--data-parallel", action="store_true", help="cut batches over all GPUs of this machine")
        parser.add_argument("--interactive", action="store_true", help="afterwards, ask for names")
        parser.add_argument(
            "--names", type=Path, metavar="FILE", help="afterwards, predict the names in FILE, one a line"
        )

    def __init__(self, options: argparse.Namespace, world: World = World()):  # noqa: B008
        self.from_scratch = options.model == "scratch"
        if self.from_scratch and (options.batch_size or options.layers or options.bidirectional):
            raise InputError(
                "--model scratch is one layer, one direction and one name a step, without options for these."
            )
        options.batch_size = options.batch_size or (1 if self.from_scratch else BATCH_SIZE)
        options.layers = options.layers or (1 if self.from_scratch else LAYERS)
        options.hidden = options.hidden or (128 if self.from_scratch else 100)
        options.epochs = options.epochs or (EPOCHS_FROM_SCRATCH if self.from_scratch else 10)
        options.lr = options.lr or (0.005 if self.from_scratch else 1e-3)
        super().__init__(options, world)
        self.cell = "RNN" if self.from_scratch else "GRU"
        if self.from_scratch and (options.data_parallel or world.size > 1):
            raise InputError("--model scratch takes one name a step, which cannot be divided.")
        self.questions = read_lines(options.names) if options.names else []
        for name in self.questions:
            self.letters(ascii_name(name))
        if options.form == "csv":
            train_file, test_file = names_files(options.data)
            train, test = read_names(train_file), read_names(test_file)
            if unknown := {country for _, country in test} - {country for _, country in train}:
                raise InputError(
                    f"{test_file} names countries that {train_file} does not: {', '.join(sorted(unknown))}."
                )
        else:
            train, test = read_language_files(options.data)
        self.countries = sorted({country for _, country in train})
        self.train, self.test = self.encode(train), self.encode(test)
        names = len(self.train.lengths)
        self.samples = min(STEPS_FROM_SCRATCH, options.limit or STEPS_FROM_SCRATCH) if self.from_scratch else names
        layers = f"embedding {options.hidden}, {options.layers}-layer GRU of {options.hidden}, packed"
        if options.bidirectional:
            layers = layers.replace("GRU", "bidirectional GRU")
        self.description = (
            f"{names:,} train and {len(self.test.lengths):,} test names of {len(self.countries)} countries, "
            + (f"a tanh RNN of {options.hidden} from scratch, one name a step" if self.from_scratch else layers)
        )

    def encode(self, rows: list[tuple[str, str]]) -> Names:
        # The files are sorted by country: a --limit takes rows from all over the file.
        rows = rows[:: -(-len(rows) // (self.options.limit or len(rows)))]
        names = [self.letters(name) for name, _ in rows]
        lengths = torch.tensor([len(name) for name in names])
        countries = torch.tensor([self.countries.index(country) for _, country in rows])
        return Names(pad_sequence(names, batch_first=True), lengths, countries, self.device)

    def letters(self, name: str) -> Tensor:
        """A name in ASCII as the model takes it: its codes, or its letters' places among LETTERS."""
        if not self.from_scratch:
            return torch.tensor(list(name.encode("ascii")))
        # As the lecture does, without the letters that are not among its 57.
        known = [LETTERS.index(letter) for letter in name if letter in LETTERS]
        if not known:
            raise InputError(f"{name!r} has no letter that --model scratch knows.")
        return torch.tensor(known)

    def named(self, label: str) -> str:
        if self.from_scratch:
            return "by hand" if label.startswith("nn.") else "by kernel"
        return label

    def facts(self) -> dict[str, Any]:
        return {"countries": self.countries, "data": fingerprint(self.train.letters, self.train.countries)}

    def model(self, rnn_class: type[nn.Module]) -> nn.Module:
        options, countries = self.options, len(self.countries)
        if self.from_scratch:
            elman_class = ElmanByHand if rnn_class is nn.RNN else ElmanByKernel
            return NameClassifierFromScratch(elman_class, countries, options.hidden)
        return NameClassifier(rnn_class, countries, options.hidden, options.layers, options.bidirectional)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.from_scratch:
            return torch.optim.SGD(trainable(model), lr=self.options.lr, fused=True)
        return super().optimizer(model)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """A new order of the names in each epoch, the same for every module."""
        generator = torch.Generator().manual_seed(epoch_seed(self.options, epoch))
        if self.from_scratch:
            for row in torch.randint(len(self.train.lengths), (self.samples,), generator=generator).tolist():
                yield Batch(*self.train.one(row))
            return
        for rows in bucketed(self.train.lengths, self.options.batch_size, generator):
            rows, weight = self.world.shard(rows)
            yield Batch(*self.train.batch(rows), weight)

    def loss(self, model: nn.Module, names: Any, countries: Tensor, state: Any) -> tuple[Tensor, Any]:
        return cross_entropy(self.scores(model, names), countries), None

    def scores(self, model: nn.Module, names: Any) -> Tensor:
        return model(names) if self.from_scratch else model(*names)

    def evaluate(self, model: nn.Module) -> float:
        return (self.predictions(model).cpu() == self.test.countries).float().mean().item()

    def predictions(self, model: nn.Module) -> Tensor:
        """[test names] The likeliest countries' numbers."""
        lengths = self.test.lengths
        if self.from_scratch:
            return torch.cat([model(self.test.one(row)[0]).argmax(dim=1) for row in range(len(lengths))])
        predicted = torch.empty_like(self.test.countries, device=self.device)
        for rows in lengths.argsort(descending=True).split(1024):
            predicted[sent(rows, self.device)] = model(*self.test.batch(rows)[0]).argmax(dim=1)
        return predicted

    def format_metric(self, value: float) -> str:
        return f"{value:.1%}"

    def finish(self, runs: list[Run], out: Path) -> list[Path]:
        run = runs[-1]
        with torch.no_grad():
            predicted = self.predictions(run.model)
            confusion = torch.zeros(len(self.countries), len(self.countries))
            confusion.index_put_((self.test.countries, predicted.cpu()), torch.tensor(1.0), accumulate=True)
            path = out / "train-names-confusion.png"
            training_report.plot_confusion(confusion, self.countries, f"names: {run.label} on the test names", path)
            for name in self.questions:
                print(self.answer(run.model, name))
            if self.options.interactive:
                self.interact(run.model)
        return [path]

    def interact(self, model: nn.Module) -> None:
        """Answer names from the keyboard until an empty line or the end of the input."""
        print("A surname (an empty line ends):", file=sys.stderr)
        for line in sys.stdin or ():  # None where it was closed before Python started
            if not line.strip():
                break
            print(self.answer(model, line.strip()), flush=True)

    def answer(self, model: nn.Module, name: str) -> str:
        """The three likeliest countries."""
        try:
            letters = self.letters(ascii_name(name))
        except InputError as error:
            return str(error)
        names = letters.to(self.device) if self.from_scratch else (letters[None], torch.tensor([len(letters)]))
        scores = self.scores(model, names)
        likeliest = scores[0].softmax(dim=0).topk(min(3, len(self.countries)))
        pairs = zip(likeliest.values.tolist(), likeliest.indices.tolist(), strict=True)
        return f"{name}: " + ", ".join(f"{self.countries[index]} {share:.0%}" for share, index in pairs)
