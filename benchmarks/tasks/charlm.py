"""Which character comes next?

    codes of the characters -> embedding -> 2-layer GRU -> linear -> one score for each character that may follow

The text is cut into B equally long streams that are read side by side, a chunk of T characters at a time. The state
at a chunk's end is carried into the next chunk, but the gradient is not (truncated backpropagation through time).
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import InputError
from benchmarks.data import python_documentation, read_text
from benchmarks.train import Task, positive

HELD_OUT = 0.1  # the share of the text, its tail, that only the metric sees


class CharacterModel(nn.Module):
    """Codes [T, B] and the state before them -> scores [T, B, characters] and the state after them."""

    def __init__(self, rnn_class: type[nn.Module], characters: int, embedding: int, hidden: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(characters, embedding)
        self.rnn = rnn_class(embedding, hidden, num_layers=layers)
        self.linear = nn.Linear(hidden, characters)

    def forward(self, codes: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        output, state = self.rnn(self.embedding(codes), state)
        return self.linear(output), state


class CharacterModelling(Task):
    """Any text; the metric is bits per character on its held-out tail."""

    name = "charlm"
    metric = "bits / char"
    unit = "chars"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(epochs=3, batch_size=32, lr=2e-3, embedding=128, hidden=256, layers=2)
        parser.add_argument("--text", type=Path, metavar="FILE", help="the text (default: Python's own documentation)")
        parser.add_argument("--chunk", type=positive, default=100, metavar="T", help="characters a step (%(default)s)")

    def __init__(self, options: argparse.Namespace):
        self.options = options
        text = (read_text(options.text) if options.text else python_documentation())[: options.limit]
        source = options.text or "Python's documentation"
        characters = sorted(set(text))
        numbers = {character: number for number, character in enumerate(characters)}
        codes = torch.tensor([numbers[character] for character in text])
        held_out = int(len(text) * HELD_OUT)
        if held_out < 2 * options.batch_size:
            needed = math.ceil(2 * options.batch_size / HELD_OUT)
            raise InputError(
                f"{source} gives {len(text):,} characters; --batch-size {options.batch_size} needs {needed:,} or more."
            )
        self.characters = len(characters)
        self.train = streams(codes[:-held_out], options.batch_size)
        self.held_out = streams(codes[-held_out:], options.batch_size)
        self.samples = self.train[1:].numel()
        self.description = (
            f"{len(text):,} characters of {source}, {self.characters} different ones, "
            f"embedding {options.embedding}, {options.layers}-layer GRU of {options.hidden}, chunks of {options.chunk}"
        )

    def model(self, rnn_class: type[nn.Module]) -> nn.Module:
        options = self.options
        return CharacterModel(rnn_class, self.characters, options.embedding, options.hidden, options.layers)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        return chunks(self.train, self.options.chunk)

    def loss(self, model: nn.Module, codes: Tensor, following: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
        scores, state = model(codes, state)
        return cross_entropy(scores.flatten(0, 1), following.flatten()), state.detach()

    def evaluate(self, model: nn.Module) -> float:
        nats, state = 0.0, None
        for codes, following in chunks(self.held_out, self.options.chunk):
            loss, state = self.loss(model, codes, following, state)
            nats += loss.item() * following.numel()
        return nats / self.held_out[1:].numel() / math.log(2)

    def format_metric(self, value: float) -> str:
        return f"{value:.3f}"


def streams(codes: Tensor, count: int) -> Tensor:
    """One long row of codes -> [T, B], a contiguous part of the text in each of the B columns."""
    length = len(codes) // count
    return codes[: length * count].view(count, length).t().contiguous()


def chunks(text: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The streams' characters from top to bottom, `size` steps at a time, each with the character that follows it."""
    return zip(text[:-1].split(size), text[1:].split(size), strict=True)
