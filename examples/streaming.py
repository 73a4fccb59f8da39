"""A stream without a known end: the state is carried from step to step, or from chunk to chunk.

python examples/streaming.py
"""

from collections.abc import Iterator

import torch

import seqkernels as sk


def microphone(steps: int) -> Iterator[torch.Tensor]:
    """Features of one step after the other, [B, I]."""
    yield from torch.randn(steps, 1, 8, generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    rnn = sk.GRU(8, 32, num_layers=2)
    heard, state = [], None
    for x_t in microphone(60):
        y_t, state = rnn.step(x_t, state)
        heard.append(y_t)
    by_steps = torch.stack(heard)

    stream = torch.stack(list(microphone(60)))
    whole, h_n = rnn(stream)
    assert torch.allclose(state, h_n, atol=1e-6)

    y_t, state = torch.empty(1, 32), torch.zeros(2, 1, 32)
    for x_t in microphone(60):
        rnn.step(x_t, state, out=(y_t, state))  # nothing is allocated for the caller, the state is updated in place
    assert torch.allclose(state, h_n, atol=1e-6)

    outputs, state = [], None
    for chunk in stream.split(16):  # a few steps at a time
        output, state = rnn(chunk, state)
        outputs.append(output)

    for name, y in {"one step a call": by_steps, "chunks of 16": torch.cat(outputs)}.items():
        difference = (y - whole).abs().max().item()
        print(f"{name:>15}: differs from the whole sequence at once by at most {difference:.1e}")
        assert difference < 1e-6


if __name__ == "__main__":
    main()
