"""Which character comes next?

    codes of the characters -> embedding -> 2-layer GRU -> linear -> one score for each character that may follow

The text is cut into B equally long streams that are read side by side, a chunk of T characters at a time. The state
at a chunk's end is carried into the next chunk, but the gradient is not (truncated backpropagation through time).
With --lines, every line is a sequence of its own that starts from nothing; a batch of lines is packed.

Training gives the model the true character before each one it is to predict (teacher forcing), or its own likeliest
prediction (free running), or, by the toss of a coin for each step of training, the one or the other.
"""

import argparse
import ast
import dataclasses
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from benchmarks import InputError, checkpoint, require
from benchmarks.checkpoint import fingerprint
from benchmarks.data import python_documentation, read_text
from benchmarks.distributed import World
from benchmarks.options import natural, positive, probability
from benchmarks.task import Batch, Run, Task, add_data_options, bucketed, cross_entropy, epoch_seed, sent

BATCH_SIZE, CHUNK = 4, 100  # small batches learn more from every character
NO_PRIME = "--prime needs one character or more to begin with."
NONE, BETWEEN = "none", r",(?![^(]*\))"  # options; commas but for those in parentheses
HELD_OUT = 0.1  # the share of the text, its tail, that only the metric sees


class CharacterModel(nn.Module):
    """Codes [T, B], or packed, and the state before them -> scores [rows, characters] and the state after them."""

    def __init__(self, rnn_class: type[nn.Module], characters: int, options: argparse.Namespace):
        super().__init__()
        self.embedding = nn.Embedding(characters, options.embedding)
        # Of torch.nn are only the weights that all contenders start from.
        own = cell_options(options.regularize) if rnn_class.__module__.startswith("seqkernels.") else {}
        sizes = options.embedding, options.hidden
        try:
            self.rnn = rnn_class(*sizes, num_layers=options.layers, dropout=options.dropout, **own)
        except ValueError as error:
            if not own:
                raise
            raise InputError(f"--regularize {options.regularize!r}: {error}.") from error
        self.linear = nn.Linear(options.hidden, characters)

    def forward(self, codes: Tensor | PackedSequence, state: Any) -> tuple[Tensor, Any]:
        if isinstance(codes, PackedSequence):
            output, state = self.rnn(PackedSequence(self.embedding(codes.data), codes.batch_sizes), state)
            return self.linear(output.data), state
        output, state = self.rnn(self.embedding(codes), state)
        return self.linear(output).flatten(0, 1), state


def cell_options(text: str) -> dict[str, Any]:
    """The arguments of a layer that "zoneout=0.1,layer_norm=True" names, or NONE.

    Raises:
        InputError: they are none of `seqkernels.CellOptions`.
    """
    if text == NONE:
        return {}
    options = require("seqkernels").CellOptions
    # Blocks have other weights than torch.nn's, which all trainings begin with.
    known = [field.name for field in dataclasses.fields(options) if field.name != "blocks"]
    pairs = [one.partition("=") for one in re.split(BETWEEN, text)]
    try:
        check_names([name for name, *_ in pairs], known)
        found = {name: literal(value) for name, _, value in pairs}
        options(**found)
    except (TypeError, ValueError) as error:
        raise InputError(f"--regularize {text!r}: {error}. It takes NAME=VALUE, of {', '.join(known)}.") from error
    return found


def check_names(names: list[str], known: list[str]) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"no regularizer is named {name}" if name else "an option has no name")
        if names.count(name) > 1:
            raise ValueError(f"{name} is given twice")


def literal(text: str) -> Any:
    """A number or True; other text stays text."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def run_freely(model: nn.Module, codes: Tensor | PackedSequence, state: Any) -> tuple[Tensor, Any]:
    """As the model's forward, but only the first step sees a true character, each other one the prediction before."""
    steps = codes.data.split(codes.batch_sizes.tolist()) if isinstance(codes, PackedSequence) else codes.unbind()
    predicted, scores = steps[0], []
    for step in steps:
        here = len(step)  # packed: sequences that have ended are at the back
        step_scores, state = model(predicted[None, :here], cut(state, here))
        predicted = step_scores.detach().argmax(dim=1)
        scores.append(step_scores)
    return torch.cat(scores), state


def cut(state: Any, sequences: int) -> Any:
    """The state of the first sequences; an LSTM's is a pair."""
    if isinstance(state, tuple):
        return tuple(part[:, :sequences].contiguous() for part in state)
    return state if state is None else state[:, :sequences].contiguous()


def detached(state: Any) -> Any:
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


@torch.no_grad()
def generate(
    model: nn.Module, characters: str, prime: str, length: int, temperature: float, generator: torch.Generator
) -> str:
    """`prime` and `length` characters more, one step at a time from a carried state.

    Scores are divided by the temperature before one is drawn: below 1 the likely ones get likelier, at 0 the likeliest
    is taken.

    Raises:
        InputError: a character of `prime` that the model does not know, or no prime.
    """
    device = next(model.parameters()).device
    codes = encode(prime, characters, "--prime").to(device)
    if not len(codes):
        raise InputError(NO_PRIME)
    scores, state = model(codes[:, None], None)
    drawn = []
    for _ in range(length):
        if temperature > 0:
            last = scores[-1].double()
            if not last.isfinite().all():
                raise InputError("the model's scores are no finite numbers: its training has diverged.")
            shares = ((last - last.max()) / temperature).softmax(dim=0)
            code = shares.cpu().multinomial(1, generator=generator).to(device)
        else:
            code = scores[-1].argmax(dim=0, keepdim=True)
        drawn.append(characters[code])
        scores, state = model(code[None], state)
    return prime + "".join(drawn)


class CharacterModelling(Task):
    """Any text; the metric is bits per character on its held-out tail."""

    name = "charlm"
    metric = "bits / char"
    unit = "chars"

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        add_data_options(parser, BATCH_SIZE)
        parser.set_defaults(epochs=4, lr=1e-3)
        parser.add_argument("--text", type=Path, metavar="FILE", help="the text (default: Python's own documentation)")
        parser.add_argument("--cell", choices=("GRU", "LSTM", "RNN"), default="GRU", help="(%(default)s)")
        parser.add_argument(
            "--embedding", type=positive, default=128, metavar="E", help="numbers a character (%(default)s)"
        )
        parser.add_argument("--hidden", type=positive, default=256, metavar="H", help="hidden units (%(default)s)")
        parser.add_argument("--layers", type=positive, default=2, help="(%(default)s)")
        parser.add_argument("--dropout", type=probability, default=0.0, help="between layers (%(default)s)")
        parser.add_argument(
            "--regularize",
            nargs="+",
            default=NONE,
            metavar="NAME=VALUE",
            help="options of seqkernels' cells (docs/cells.md), such as zoneout=0.1,weight_dropout=0.3; each is a "
            "training of its own (%(default)s)",
        )
        parser.add_argument("--chunk", type=positive, metavar="T", help=f"characters a step ({CHUNK})")
        parser.add_argument("--lines", action="store_true", help="line by line instead of in chunks")
        parser.add_argument(
            "--teacher-forcing",
            type=probability,
            default=1.0,
            metavar="P",
            help="how likely a step of training sees true characters, not its own (%(default)s)",
        )
        parser.add_argument(
            "--sample", type=natural, default=200, metavar="N", help="characters to write at the end (200)"
        )
        add_generation_options(parser)

    @staticmethod
    def variants(options: argparse.Namespace) -> dict[str, argparse.Namespace]:
        if options.regularize == NONE:
            return {"": options}
        texts = dict.fromkeys(options.regularize)
        if any(cell_options(text) for text in texts) and options.module != "seqkernels":
            raise InputError("--regularize is of seqkernels' layers alone: give --module seqkernels.")
        return {text: argparse.Namespace(**{**vars(options), "regularize": text}) for text in texts}

    def __init__(self, options: argparse.Namespace, world: World = World()):  # noqa: B008
        super().__init__(options, world)
        self.cell = options.cell
        if options.lines and options.chunk:
            raise InputError("--chunk cuts a text that --lines cuts at its lines: leave out one of them.")
        options.batch_size, options.chunk = options.batch_size or BATCH_SIZE, options.chunk or CHUNK
        text = (read_text(options.text) if options.text else python_documentation())[: options.limit]
        source = options.text or "Python's documentation"
        held_out = int(len(text) * HELD_OUT)
        if held_out < 2 * options.batch_size:
            needed = math.ceil(2 * options.batch_size / HELD_OUT)
            raise InputError(
                f"{source} gives {len(text):,} characters; --batch-size {options.batch_size} needs {needed:,} or more."
            )
        self.characters = "".join(sorted({*text, "\n"}))
        self.whole = encode(text, self.characters)
        if not options.prime:
            raise InputError(NO_PRIME)
        encode(options.prime, self.characters, "--prime")
        train, rest = text[:-held_out], text[-held_out:]
        self.train: Any  # streams [T, B], or lines [T] each
        self.held_out: Any
        if options.lines:
            self.train, self.held_out = self.encode_lines(train), self.encode_lines(rest)
            if not self.train or not self.held_out:
                raise InputError(f"{source} has no line to train on, or none in its last tenth: leave out --lines.")
            self.samples = sum(len(line) - 1 for line in self.train)
        else:
            self.train, self.held_out = self.encode_streams(train), self.encode_streams(rest)
            self.samples = self.train[1:].numel()
        cut = "line by line" if options.lines else f"chunks of {options.chunk}"
        self.description = (
            f"{len(text):,} characters of {source}, {len(self.characters)} different ones, embedding "
            f"{options.embedding}, {options.layers}-layer {self.cell} of {options.hidden}, {cut}"
        )

    def encode_streams(self, text: str) -> Tensor:
        return streams(encode(text, self.characters), self.options.batch_size).to(self.device)

    def encode_lines(self, text: str) -> list[Tensor]:
        """Every line with the end of the line before it and its own."""
        return [encode(f"\n{line}\n", self.characters) for line in text.splitlines() if line]

    def facts(self) -> dict[str, Any]:
        return {"characters": self.characters, "data": fingerprint(self.whole)}

    def model(self, rnn_class: type[nn.Module]) -> nn.Module:
        return CharacterModel(rnn_class, len(self.characters), self.options)

    def batches(self, epoch: int) -> Iterator[Batch]:
        if not self.options.lines:
            return (Batch(*chunk) for chunk in chunks(self.train, self.options.chunk))
        generator = torch.Generator().manual_seed(epoch_seed(self.options, epoch))
        batches = bucketed(torch.tensor([len(line) for line in self.train]), self.options.batch_size, generator)
        return (self.pack([self.train[row] for row in rows]) for rows in batches)

    def pack(self, lines: list[Tensor]) -> Batch:
        """Lines as one packed batch, longest first, and the characters that follow, in the same order."""
        lines = sorted(lines, key=len, reverse=True)
        codes, following = (pack_sequence([line[part] for line in lines]) for part in (slice(0, -1), slice(1, None)))
        return Batch(sent(codes, self.device), sent(following.data, self.device))

    def loss(self, model: nn.Module, codes: Any, following: Tensor, state: Any) -> tuple[Tensor, Any]:
        p = self.options.teacher_forcing
        forced = p == 1 or (p > 0 and torch.rand(()).item() < p)
        scores, state = model(codes, state) if forced else run_freely(model, codes, state)
        return cross_entropy(scores, following.flatten()), None if self.options.lines else detached(state)

    def evaluate(self, model: nn.Module) -> float:
        """With the true characters, however it was trained."""
        if self.options.lines:
            size = self.options.batch_size
            batches = (self.pack(self.held_out[i : i + size]) for i in range(0, len(self.held_out), size))
        else:
            batches = (Batch(*chunk) for chunk in chunks(self.held_out, self.options.chunk))
        nats, count, state = torch.zeros((), dtype=torch.float64, device=self.device), 0, None
        for codes, following, _ in batches:
            scores, state = model(codes, None if self.options.lines else state)
            nats += cross_entropy(scores, following.flatten()) * following.numel()
            count += following.numel()
        return nats.item() / count / math.log(2)

    def format_metric(self, value: float) -> str:
        return f"{value:.3f}"

    def finish(self, runs: list[Run], out: Path) -> list[Path]:
        options, run = self.options, runs[-1]
        if options.sample:
            generator = torch.Generator().manual_seed(options.seed)
            text = generate(run.model, self.characters, options.prime, options.sample, options.temperature, generator)
            print(f"{run.label} writes at temperature {options.temperature}:\n{text}")
        return []


def encode(text: str, characters: str, source: str = "the text") -> Tensor:
    """The characters' places in `characters`, [len(text)]."""
    places = {character: place for place, character in enumerate(characters)}
    if unknown := sorted(set(text) - set(characters)):
        raise InputError(f"{source} has {unknown[0]!r}, which the model does not know.")
    return torch.tensor([places[character] for character in text], dtype=torch.int64)


def streams(codes: Tensor, count: int) -> Tensor:
    """One long row of codes -> [T, B], a contiguous part of the text in each of the B columns."""
    length = len(codes) // count
    return codes[: length * count].view(count, length).t().contiguous()


def chunks(text: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The streams' characters from top to bottom, `size` steps at a time, each with the character that follows it."""
    return zip(text[:-1].split(size), text[1:].split(size), strict=True)


def add_generation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prime", default="\n", metavar="TEXT", help="what a sample begins with (a new line)")
    parser.add_argument("--temperature", type=temperature, default=0.8, metavar="X", help="of a sample (%(default)s)")


def temperature(text: str) -> float:
    """0 or a positive number."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not 0 or a positive number")
    return number


def load_model(path: Path, rnn_class: type[nn.Module]) -> tuple[CharacterModel, str]:
    """The model of a checkpoint of this task (of the last module it trained), and its characters."""
    content = read_checkpoint(path)
    characters = content["facts"]["characters"]
    options = argparse.Namespace(**{"regularize": NONE, **content["options"]})
    if options.regularize != NONE and not rnn_class.__module__.startswith("seqkernels."):
        raise InputError(f"{path} was trained with --regularize {options.regularize}, which torch.nn does not have.")
    model = CharacterModel(rnn_class, len(characters), options).to(dtype=getattr(torch, options.dtype))
    model.load_state_dict(content["runs"][-1]["model"])
    return model.eval(), characters


def cell_of(path: Path) -> str:
    return read_checkpoint(path)["options"]["cell"]


def read_checkpoint(path: Path) -> dict[str, Any]:
    content = checkpoint.load(path)
    if content["task"] != CharacterModelling.name:
        raise InputError(f"{path} is a checkpoint of the task {content['task']}; generating needs one of charlm.")
    return content
