"""Learn to spell: after each letter of "hello", say the letter of "ohlol" that stands there.

cell     one-hot letters -> RNNCell, stepped by hand: its 4 hidden units are the scores of the 4 letters
rnn      one-hot letters -> RNN over the whole word, likewise
rnn2     letters -> embedding -> 2-layer RNN -> linear -> scores
lstm2    the same with LSTM
gru2     the same with GRU
"""

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from benchmarks.distributed import World
from benchmarks.task import Batch, Run, Task, cross_entropy

LETTERS = "ehlo"
WORD, ANSWER = "hello", "ohlol"
VARIANTS = {"cell": "RNNCell", "rnn": "RNN", "rnn2": "RNN", "lstm2": "LSTM", "gru2": "GRU"}


class Stepping(nn.Module):
    """Letters [T] -> scores [T, letters], one call of the cell a step."""

    def __init__(self, cell_class: type[nn.Module]):
        super().__init__()
        self.rnn: Any = cell_class(len(LETTERS), len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        x = one_hot(letters, len(LETTERS)).to(self.rnn.weight_ih)
        h = x.new_zeros(1, len(LETTERS))
        scores = []
        for letter in x.split(1):
            h = self.rnn(letter, h)
            scores.append(h)
        return torch.cat(scores)


class Sequence(nn.Module):
    """Letters [T] -> scores [T, letters], the whole word in one call."""

    def __init__(self, rnn_class: type[nn.Module]):
        super().__init__()
        self.rnn: Any = rnn_class(len(LETTERS), len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        output, _ = self.rnn(one_hot(letters, len(LETTERS)).to(self.rnn.weight_ih_l0))
        return output


class Embedded(nn.Module):
    """Letters [T] -> scores [T, letters], with layers around the recurrent ones."""

    def __init__(self, rnn_class: type[nn.Module], embedding: int = 10, hidden: int = 8):
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), embedding)
        self.rnn = rnn_class(embedding, hidden, num_layers=2)
        self.linear = nn.Linear(hidden, len(LETTERS))

    def forward(self, letters: Tensor) -> Tensor:
        output, _ = self.rnn(self.embedding(letters))
        return self.linear(output)


class Hello(Task):
    """One word; the metric is the share of letters that are right."""

    name = "hello"
    metric = "spells"
    unit = "letters"
    samples = len(WORD)

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(epochs=15, lr=None, seed=2)  # at this seed every way has learned it by then, most do at any
        parser.add_argument("--only", choices=VARIANTS, help="one of the five ways (default: all)")

    @staticmethod
    def variants(options: argparse.Namespace) -> dict[str, argparse.Namespace]:
        chosen = [options.only] if options.only else list(VARIANTS)
        return {way: argparse.Namespace(**{**vars(options), "only": way}) for way in chosen}

    def __init__(self, options: argparse.Namespace, world: World = World()):  # noqa: B008
        options.lr = options.lr or (0.1 if options.only == "cell" else 0.05)
        super().__init__(options, world)
        self.cell = VARIANTS[options.only]
        self.letters, self.answer = (
            torch.tensor([LETTERS.index(letter) for letter in word], device=self.device) for word in (WORD, ANSWER)
        )
        self.description = f'"{WORD}" -> "{ANSWER}"'

    def model(self, rnn_class: type[nn.Module]) -> nn.Module:
        return {"cell": Stepping, "rnn": Sequence}.get(self.options.only, Embedded)(rnn_class)

    def batches(self, epoch: int) -> Iterator[Batch]:
        yield Batch(self.letters, self.answer)

    def loss(self, model: nn.Module, letters: Tensor, answer: Tensor, state: Any) -> tuple[Tensor, Any]:
        return cross_entropy(model(letters), answer), None

    def after_epoch(self, run: Run, epoch: int) -> None:
        epochs, loss = self.options.epochs, run.losses[-1].item()
        print(f"{run.label:18} {self.spelled(run.model)}  epoch [{epoch + 1}/{epochs}] loss = {loss:.3f}")

    def spelled(self, model: nn.Module) -> str:
        with torch.no_grad():
            return "".join(LETTERS[index] for index in model(self.letters).argmax(dim=1))

    def evaluate(self, model: nn.Module) -> float:
        return sum(a == b for a, b in zip(self.spelled(model), ANSWER, strict=True)) / len(ANSWER)

    def format_metric(self, value: float) -> str:
        return f"{value * len(ANSWER):.0f} of {len(ANSWER)}"
