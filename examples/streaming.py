"""A stream whose end nobody knows: the state is carried from chunk to chunk, or from step to step.

python examples/streaming.py
"""

import torch

import seqkernels as sk


def by_chunks(rnn: sk.GRU, stream: torch.Tensor, size: int) -> torch.Tensor:
    """Call the module with a few steps at a time; `state` [L, B, H] goes in and comes out."""
    outputs, state = [], None
    for chunk in stream.split(size):  # [T, B, I]
        output, state = rnn(chunk, state)
        outputs.append(output)
    return torch.cat(outputs)


def by_cells(rnn: sk.GRU, stream: torch.Tensor) -> torch.Tensor:
    """The same layer as a cell, one step a call: what a decoder that feeds its output back does."""
    cell = sk.GRUCell(rnn.input_size, rnn.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in rnn.state_dict().items()})
    outputs, state = [], None
    for step in stream:  # [B, I]
        state = cell(step, state)
        outputs.append(state)
    return torch.stack(outputs)


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    rnn = sk.GRU(8, 32)
    stream = torch.randn(60, 1, 8)
    whole, _ = rnn(stream)
    ways = {
        "chunks of 16": by_chunks(rnn, stream, 16),
        "one step a call": by_chunks(rnn, stream, 1),
        "a cell": by_cells(rnn, stream),
    }
    for name, outputs in ways.items():
        difference = (outputs - whole).abs().max().item()
        print(f"{name:>15}: differs from the whole sequence at once by at most {difference:.1e}")
        assert difference < 1e-6


if __name__ == "__main__":
    main()
