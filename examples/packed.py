"""Sequences of different lengths, four ways: packed, by lengths, by cu_seqlens, and each sequence alone.

python examples/packed.py
"""

import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import seqkernels as sk


def main() -> None:
    torch.manual_seed(0)
    rnn = sk.GRU(16, 32, batch_first=True)
    sequences = [torch.randn(length, 16) for length in (7, 2, 12, 5)]
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    padded = pad_sequence(sequences, batch_first=True)  # [B, T, I]

    alone = [rnn(sequence)[1][0] for sequence in sequences]  # unbatched: final states [H]

    packed = pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False)
    output, h_packed = rnn(packed)  # a PackedSequence, as from torch.nn
    output, _ = pad_packed_sequence(output, batch_first=True)

    output_lengths, h_lengths = rnn(padded, lengths=lengths)  # no packing: any order, zeros allowed

    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    _, h_rows = sk.functional.gru(torch.cat(sequences), None, list(rnn.parameters()), cu_seqlens=ends)

    steps = int(lengths.max()) * len(sequences)
    print(f"{len(sequences)} sequences, {int(lengths.sum())} steps that are computed, of {steps} in the padded batch")
    for name, states in (("packed", h_packed), ("lengths", h_lengths), ("cu_seqlens", h_rows)):
        difference = max((a - b).abs().max().item() for a, b in zip(alone, states[0], strict=True))
        print(f"{name:>10}: final states differ from each sequence alone by at most {difference:.1e}")
        assert difference < 1e-6
    assert torch.equal(output, output_lengths)


if __name__ == "__main__":
    main()
