"""A LiGRU in plain PyTorch operations, which stands for torch.nn's where torch.nn has none.

The formula is that of speechbrain.nnet.RNN.LiGRU without batch norm; the module is used as torch.nn.GRU is.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence


class LiGRU(nn.Module):
    def __init__(
        self, input_size, hidden_size, num_layers=1, bias=True, batch_first=False, bidirectional=False, dtype=None
    ):
        super().__init__()
        self.hidden_size, self.num_layers, self.batch_first = hidden_size, num_layers, batch_first
        self.directions = ("", "_reverse") if bidirectional else ("",)
        gates = 2 * hidden_size
        for layer in range(num_layers):
            features = len(self.directions) * hidden_size if layer else input_size
            for direction in self.directions:
                shapes = {"weight_ih": (gates, features), "weight_hh": (gates, hidden_size)}
                shapes |= {"bias_ih": (gates,), "bias_hh": (gates,)} if bias else {}
                for name, shape in shapes.items():
                    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
                    self.register_parameter(f"{name}_l{layer}{direction}", parameter)

    def forward(self, x: Tensor | PackedSequence, h_0: Tensor | None = None):
        if isinstance(x, PackedSequence):
            h_0 = h_0 if h_0 is None or x.sorted_indices is None else h_0.index_select(1, x.sorted_indices)
            steps, h_n = self.run(list(x.data.split(x.batch_sizes.tolist())), h_0)
            h_n = h_n if x.unsorted_indices is None else h_n.index_select(1, x.unsorted_indices)
            return x._replace(data=torch.cat(steps)), h_n
        batch = 0 if self.batch_first else 1  # its dimension
        if x.dim() == 2:
            y, h_n = self(x.unsqueeze(batch), None if h_0 is None else h_0.unsqueeze(1))
            return y.squeeze(batch), h_n.squeeze(1)
        steps, h_n = self.run(list(x.unbind(1 - batch)), h_0)
        return torch.stack(steps, 1 - batch), h_n

    def run(self, steps: list[Tensor], h_0: Tensor | None) -> tuple[list[Tensor], Tensor]:
        """All layers. A step is ``[its sequences, features]``, the longest sequences first."""
        if h_0 is None:
            h_0 = steps[0].new_zeros(self.num_layers * len(self.directions), len(steps[0]), self.hidden_size)
        h_n = []
        for layer in range(self.num_layers):
            both = []
            for direction in self.directions:
                ys, h = [], h_0[len(h_n)]
                for x in reversed(steps) if direction else steps:
                    ys.append(self.step(x, h[: len(x)], f"_l{layer}{direction}"))
                    h = torch.cat([ys[-1], h[len(x) :]])
                both.append(ys[::-1] if direction else ys)
                h_n.append(h)
            steps = [torch.cat(ys, -1) for ys in zip(*both, strict=True)]
        return steps, torch.stack(h_n)

    def step(self, x: Tensor, h: Tensor, place: str) -> Tensor:
        w_ih, w_hh, b_ih, b_hh = (
            getattr(self, name + place, None) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        a, z = (nn.functional.linear(x, w_ih, b_ih) + nn.functional.linear(h, w_hh, b_hh)).chunk(2, -1)
        z = torch.sigmoid(z)
        return z * h + (1 - z) * torch.relu(a)
