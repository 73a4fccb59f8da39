"""seqkernels: fast exact RNN, GRU and LSTM for PyTorch, as drop-in modules.

>>> import torch, seqkernels as sk
>>> rnn = sk.GRU(128, 256, num_layers=2)
>>> output, h_n = rnn(torch.randn(50, 32, 128), lengths=torch.randint(1, 51, (32,)))
"""

import torch

if torch.__version__ < "2.10":
    raise ImportError(f"seqkernels needs torch 2.10 or newer, and this is {torch.__version__}: pip install -U torch")

from seqkernels import functional, torch_ao
from seqkernels.cell_options import CellOptions
from seqkernels.convert import swap_in, swap_out
from seqkernels.explanation import explain
from seqkernels.modules import GRU, LSTM, RNN, GRUCell, LiGRU, LSTMCell, RNNCell, is_recurrent
from seqkernels.patch import patch_torch
from seqkernels.quantization import quantize_

__version__ = "0.2.0"

torch_ao.register()

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CellOptions",
    "GRUCell",
    "LSTMCell",
    "LiGRU",
    "RNNCell",
    "explain",
    "functional",
    "is_recurrent",
    "patch_torch",
    "quantize_",
    "swap_in",
    "swap_out",
]
