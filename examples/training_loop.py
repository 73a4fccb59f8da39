"""A training loop of your own: variable lengths, clipping, a learning rate that falls, and torch.compile if asked for.

The task: of a sequence of bits, say whether the ones are odd or even in number, which takes a state.

python examples/training_loop.py [--compile] [--steps 300]
"""

import argparse

import torch
from torch import nn

import seqkernels as sk

LONGEST = 16


class Parity(nn.Module):
    def __init__(self, hidden: int = 32) -> None:
        super().__init__()
        self.rnn = sk.GRU(1, hidden, batch_first=True)
        self.output = nn.Linear(hidden, 1)

    def forward(self, bits: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        _, h_n = self.rnn(bits, lengths=lengths)  # the state at the end of each sequence
        return self.output(h_n[0]).squeeze(1)


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bits [B, T, 1], lengths [B], and whether the ones within the length are odd [B]."""
    bits, lengths = torch.randint(2, (size, LONGEST)), torch.randint(1, LONGEST + 1, (size,))
    within = torch.arange(LONGEST) < lengths.unsqueeze(1)
    return bits.unsqueeze(2).float(), lengths, ((bits * within).sum(1) % 2).float()


def main(arguments: list[str] | None = None) -> float:
    """Train, print as it goes, and return the accuracy on sequences that were not trained on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = Parity()
    forward = torch.compile(model, fullgraph=True) if options.compile else model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    for step in range(options.steps):
        bits, lengths, odd = batch(128)
        loss = nn.functional.binary_cross_entropy_with_logits(forward(bits, lengths), odd)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 50 == 0 or step + 1 == options.steps:
            print(f"step {step:4}: loss {loss.item():.4f}")
    with torch.no_grad():
        bits, lengths, odd = batch(2000)
        accuracy = ((forward(bits, lengths) > 0) == (odd > 0)).float().mean().item()
    print(f"accuracy {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
