"""Swap our modules into a model that is made of torch.nn's, and back: same parameters, same results, same state dict.

python examples/swap_in.py
"""

import time

import torch
from torch import nn

import seqkernels as sk


class Tagger(nn.Module):
    """A tag for every token: what a model of torch.nn's modules may look like."""

    def __init__(self, tokens: int = 1000, tags: int = 12) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 64)
        self.rnn = nn.LSTM(64, 128, num_layers=2, batch_first=True, bidirectional=True)
        self.output = nn.Linear(2 * 128, tags)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.output(self.rnn(self.embedding(tokens))[0])


def milliseconds(model: nn.Module, tokens: torch.Tensor, repeats: int = 5) -> float:
    """Of a training step, the best of a few."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        model(tokens).square().mean().backward()
        times.append(time.perf_counter() - begin)
    return min(times) * 1e3


def main() -> None:
    torch.manual_seed(0)
    model, tokens = Tagger(), torch.randint(1000, (16, 40))
    expected, torchs = model(tokens), milliseconds(model, tokens)
    keys = list(model.state_dict())

    print(sk.swap_in(model))
    difference = (model(tokens) - expected).abs().max().item()
    ours = milliseconds(model, tokens)
    print(f"largest difference of a logit: {difference:.1e}")
    print(f"training step: torch.nn {torchs:.1f} ms, seqkernels {ours:.1f} ms")
    assert difference < 1e-5
    assert list(model.state_dict()) == keys

    print(sk.explain(model.rnn, model.embedding(tokens)))
    print(sk.swap_out(model))
    assert type(model.rnn) is nn.LSTM


if __name__ == "__main__":
    main()
