"""Is a news item about the world, sports, business or science?

    words -> embedding -> RNN of 128 -> h at the sentence's end -> linear -> one score a class

Sentences differ in length, so where is the end? Three ways to take it, compared at several batch sizes:

    padded    a rectangle of words, and the output at its last position: the state has run on over the padding
    packed    a PackedSequence, and h_n: the state after each sentence's own last word
    lengths   the rectangle and its `lengths=`, and h_n: the same without packing (torch.nn has to pack here)
"""

import argparse
import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_sequence

from benchmarks.checkpoint import fingerprint
from benchmarks.data import NEWS_CLASSES, news_files, read_glove, read_news, tokens
from benchmarks.distributed import World
from benchmarks.options import positive
from benchmarks.task import Batch, Task, cross_entropy, epoch_seed, sent
from benchmarks.train import is_ours

PADDING, UNKNOWN = 0, 1
ENDS = ("padded", "packed", "lengths")
MIN_COUNT = 10  # a rarer word is <unk>


class NewsClassifier(nn.Module):
    """Words [B, T] and lengths [B], both on the host, where packing is cheap -> [B, classes] scores."""

    def __init__(self, rnn_class: type[nn.Module], words: int, vectors: Tensor | None, options: argparse.Namespace):
        super().__init__()
        self.end = options.end
        self.embedding = nn.Embedding(words, options.embedding, padding_idx=PADDING)
        if vectors is None:
            nn.init.normal_(
                self.embedding.weight[PADDING + 1 :], std=0.1
            )  # at 1 a tanh RNN saturates and learns by heart
        else:
            self.embedding.weight = nn.Parameter(vectors.clone(), requires_grad=False)
        self.rnn = rnn_class(options.embedding, options.hidden, batch_first=True)
        self.linear = nn.Linear(options.hidden, len(NEWS_CLASSES))

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        return self.linear(self.sentence_end(words, lengths))

    def sentence_end(self, words: Tensor, lengths: Tensor) -> Tensor:
        """[B, T] -> [B, hidden]"""
        device = self.linear.weight.device
        if self.end == "padded":
            return self.rnn(self.embedding(sent(words, device)))[0][:, -1]
        if self.end == "lengths" and is_ours(self.rnn):
            _, h_n = self.rnn(self.embedding(sent(words, device)), lengths=lengths)
        else:
            packed = sent(pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False), device)
            _, h_n = self.rnn(PackedSequence(self.embedding(packed.data), *packed[1:]))
        return (h_n[0] if isinstance(h_n, tuple) else h_n)[0]


class NewsClassification(Task):
    """AG News, or a folder with files of its form; the metric is accuracy on the test file."""

    name = "news"
    metric = "test accuracy"
    unit = "items"
    shards_batches = True

    @staticmethod
    def add_options(parser: argparse.ArgumentParser) -> None:
        parser.set_defaults(epochs=7, lr=3e-4, clip=0.25)
        parser.add_argument(
            "--data", type=Path, metavar="DIR", help="folder with ag_news_csv/{train,test}.csv (download)"
        )
        parser.add_argument("--limit", type=positive, metavar="N", help="use about N items, for a quick look")
        parser.add_argument("--cell", choices=("RNN", "GRU", "LSTM"), default="RNN", help="(%(default)s)")
        parser.add_argument("--end", nargs="+", choices=ENDS, default=list(ENDS), help="ways to take the end (all)")
        parser.add_argument(
            "--batch-size", nargs="+", type=positive, default=[4, 8, 32], metavar="B", help="items a step (4 8 32)"
        )
        parser.add_argument("--embedding", type=positive, default=100, metavar="E", help="numbers a word (%(default)s)")
        parser.add_argument("--hidden", type=positive, default=128, metavar="H", help="hidden units (%(default)s)")
        parser.add_argument("--glove", type=Path, metavar="FILE", help="word vectors to use, frozen (default: random)")

    @staticmethod
    def variants(options: argparse.Namespace) -> dict[str, argparse.Namespace]:
        pairs = itertools.product(dict.fromkeys(options.end), dict.fromkeys(options.batch_size))
        return {
            f"{end}, batch {size}": argparse.Namespace(**{**vars(options), "end": end, "batch_size": size})
            for end, size in pairs
        }

    def __init__(self, options: argparse.Namespace, world: World = World()):  # noqa: B008
        super().__init__(options, world)
        self.cell = options.cell
        self.words, (self.train_items, self.train_classes), (self.test_items, self.test_classes) = load(
            *news_files(options.data), options.limit
        )
        self.vectors = glove_vectors(options.glove, options.embedding, self.words) if options.glove else None
        self.samples = len(self.train_items)
        vectors = "frozen GloVe vectors" if options.glove else "embedding"
        self.description = (
            f"{self.samples:,} train and {len(self.test_items):,} test items, {len(self.words) + 2:,} words, "
            f"{vectors} of {options.embedding}, {self.cell} of {options.hidden}"
        )

    def facts(self) -> dict[str, Any]:
        texts = (*self.train_items, self.train_classes, *([] if self.vectors is None else [self.vectors]))
        return {"words": len(self.words), "items": self.samples, "data": fingerprint(*texts)}

    def model(self, rnn_class: type[nn.Module]) -> nn.Module:
        return NewsClassifier(rnn_class, len(self.words) + 2, self.vectors, self.options)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """A new order of the items in each epoch, the same for every module.

        Not in buckets of one length: those leave little padding, and what padding does is the question here.
        """
        generator = torch.Generator().manual_seed(epoch_seed(self.options, epoch))
        for rows in torch.randperm(self.samples, generator=generator).split(self.options.batch_size):
            rows, weight = self.world.shard(rows)
            yield Batch(*self.batch(self.train_items, self.train_classes, rows), weight)

    def batch(self, items: list[Tensor], classes: Tensor, rows: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The given rows: (words [B, T], lengths [B]) and classes [B]."""
        chosen = [items[row] for row in rows.tolist()]
        words = pad_sequence(chosen, batch_first=True, padding_value=PADDING)
        return (words, torch.tensor([len(item) for item in chosen])), sent(classes[rows], self.device)

    def loss(self, model: nn.Module, news: Any, classes: Tensor, state: Any) -> tuple[Tensor, Any]:
        return cross_entropy(model(*news), classes), None

    def evaluate(self, model: nn.Module) -> float:
        """In batches of the size that was trained with: what padding does depends on it."""
        right = torch.zeros((), dtype=torch.int64, device=self.device)
        for rows in torch.arange(len(self.test_items)).split(self.options.batch_size):
            news, classes = self.batch(self.test_items, self.test_classes, rows)
            right += (model(*news).argmax(dim=1) == classes).sum()
        return right.item() / len(self.test_items)

    def format_metric(self, value: float) -> str:
        return f"{value:.1%}"


@functools.lru_cache(maxsize=1)
def load(train_file: Path, test_file: Path, limit: int | None) -> tuple:
    """The vocabulary of the train file (word -> number), and both files as (word numbers of each item, classes)."""
    train, test = read_news(train_file)[:limit], read_news(test_file)[:limit]
    counts = Counter(token for text, _ in train for token in tokens(text))
    frequent = sorted(word for word, count in counts.items() if count >= MIN_COUNT)
    words = {word: number for number, word in enumerate(frequent, UNKNOWN + 1)}
    return words, encode(train, words), encode(test, words)


def encode(rows: list[tuple[str, int]], words: dict[str, int]) -> tuple[list[Tensor], Tensor]:
    """An item without any word is one unknown word."""
    items = [torch.tensor([words.get(token, UNKNOWN) for token in tokens(text)] or [UNKNOWN]) for text, _ in rows]
    return items, torch.tensor([number for _, number in rows])


def glove_vectors(path: Path, width: int, words: dict[str, int]) -> Tensor:
    """[words + 2, width]: the file's vector for each word, zeros for those it does not have."""
    glove = cached_glove(path, width, frozenset(words))
    vectors = torch.zeros(len(words) + 2, width)
    for word, number in words.items():
        if word in glove:
            vectors[number] = glove[word]
    return vectors


@functools.lru_cache(maxsize=1)
def cached_glove(path: Path, width: int, words: frozenset[str]) -> dict[str, Tensor]:
    return read_glove(path, width, words)
