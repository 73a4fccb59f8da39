"""A zoo: models of other people's packages that hold recurrent layers, with random weights.

For `make test-models`, which installs the packages into an environment of their own, and for `python -m benchmarks
models`. Importing this file imports none of them. A builder makes a model and what calls it: defaults and inputs of a
size that the package is used with, as far as one core runs that in some seconds.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Call = Callable[[Any], Any]  # of the model, with inputs; gives outputs


class Entry(NamedTuple):
    build: Callable[[], tuple[nn.Module, Call]]
    swapped: int  # so many recurrent modules
    package: str  # what has to be imported
    dtype: torch.dtype = torch.float64  # for tests


def outputs(results: Any) -> list[Tensor]:
    """The floating tensors of what a call gives."""
    return [y for y in pytree.tree_leaves(results) if isinstance(y, Tensor) and y.is_floating_point()]


def loss_of(results: Any) -> Tensor:
    first, *others = (y.square().mean() for y in outputs(results) if y.requires_grad)
    return sum(others, first)


def attentive_fp() -> tuple[nn.Module, Call]:
    """64 molecules of 20 atoms; writes `relu_` into what a GRUCell gives."""
    from torch_geometric.nn.models import AttentiveFP

    molecules, atoms = 64, 20
    batch = torch.arange(molecules).repeat_interleave(atoms)
    ends = torch.randint(atoms, (2, molecules, 2 * atoms)) + atoms * torch.arange(molecules)[:, None]
    x, edges = torch.randn(molecules * atoms, 39), ends.flatten(1)
    edge_attributes = torch.randn(edges.shape[1], 10)
    model = AttentiveFP(39, 200, 1, edge_dim=10, num_layers=2, num_timesteps=2, dropout=0.2)
    return model, lambda model: model(x, edges, edge_attributes, batch)


def lstm_aggregation() -> tuple[nn.Module, Call]:
    from torch_geometric.nn import LSTMAggregation

    x, index = torch.randn(2000, 64), torch.arange(200).repeat_interleave(10)
    return LSTMAggregation(64, 128), lambda model: model(x, index)


def open_unmix() -> tuple[nn.Module, Call]:
    from openunmix.model import OpenUnmix

    spectrogram = torch.rand(1, 2, 2049, 255)  # six seconds
    return OpenUnmix(nb_bins=2049, nb_channels=2, max_bin=1487), lambda model: model(spectrogram)


def demucs() -> tuple[nn.Module, Call]:
    from demucs.demucs import Demucs

    wave = torch.randn(1, 2, 22050)
    return Demucs(["voice", "rest"], channels=8, lstm_layers=2), lambda model: model(wave)


def hdemucs() -> tuple[nn.Module, Call]:
    from torchaudio.models import HDemucs

    wave = torch.randn(1, 2, 44100)
    return HDemucs(["voice", "rest"], channels=8), lambda model: model(wave)


def tacotron2() -> tuple[nn.Module, Call]:
    """Trained by teacher forcing, on two LSTMCells a frame."""
    from torchaudio.models import Tacotron2

    tokens, lengths = torch.randint(148, (2, 40)), torch.tensor([40, 31])
    frames, frame_lengths = torch.randn(2, 80, 10), torch.tensor([10, 8])
    return Tacotron2(), lambda model: model(tokens, lengths, frames, frame_lengths)[:3]


def wave_rnn() -> tuple[nn.Module, Call]:
    from torchaudio.models import WaveRNN

    model = WaveRNN([4, 4, 4], n_classes=256, hop_length=64, n_res_block=2, n_rnn=256, n_fc=256)
    wave, spectrogram = torch.randn(2, 1, (16 - 5 + 1) * 64), torch.randn(2, 1, 128, 16)
    return model, lambda model: model(wave, spectrogram)


def encodec() -> tuple[nn.Module, Call]:
    """The encoder and decoder of speech at 24 kHz, half a second, without the quantizer between them."""
    from transformers import EncodecConfig, EncodecModel

    model, wave = EncodecModel(EncodecConfig()), torch.randn(1, 1, 12000)
    return model, lambda model: model.decoder(model.encoder(wave))


def parakeet() -> tuple[nn.Module, Call]:
    """The LSTM that predicts the next of 24 tokens."""
    from transformers import ParakeetTDTConfig
    from transformers.models.parakeet.modeling_parakeet import ParakeetRNNTDecoder

    config = ParakeetTDTConfig()
    tokens = torch.randint(config.vocab_size, (8, 24))
    return ParakeetRNNTDecoder(config), lambda model: model(tokens)


def crdnn() -> tuple[nn.Module, Call]:
    from speechbrain.lobes.models.CRDNN import CRDNN
    from speechbrain.nnet.RNN import LSTM

    features = torch.randn(4, 100, 80)
    model = CRDNN(input_size=80, rnn_class=LSTM, rnn_layers=2, rnn_neurons=256, cnn_channels=[32, 64])
    return model, lambda model: model(features)


def gluonts_deepar() -> tuple[nn.Module, Call]:
    from gluonts.torch.model.deepar.module import DeepARModel

    model = DeepARModel("D", context_length=60, prediction_length=14)
    past, batch = model.past_length, 32
    inputs = {
        "feat_static_cat": torch.zeros(batch, 1, dtype=torch.long),
        "feat_static_real": torch.randn(batch, 1),
        "past_time_feat": torch.randn(batch, past, 1),
        "past_target": torch.rand(batch, past) + 1,
        "past_observed_values": torch.ones(batch, past),
        "future_time_feat": torch.randn(batch, 14, 1),
        "future_target": torch.rand(batch, 14) + 1,
        "future_observed_values": torch.ones(batch, 14),
    }
    return model, lambda model: model.loss(**inputs)


def darts_rnn() -> tuple[nn.Module, Call]:
    from darts.models.forecasting.rnn_model import _RNNModule
    from darts.utils.data.torch_datasets.utils import PLModuleInput

    model = _RNNModule(
        name="LSTM",
        input_size=3,
        hidden_dim=64,
        num_layers=2,
        target_size=1,
        nr_params=1,
        dropout=0.1,
        input_chunk_length=48,
        output_chunk_length=1,
    )
    series = PLModuleInput(torch.randn(32, 48, 3))
    return model, lambda model: model(series).prediction


def dprnn() -> tuple[nn.Module, Call]:
    """Separates half a second of two voices."""
    from asteroid.models import DPRNNTasNet

    wave = torch.randn(1, 1, 4000)
    return DPRNNTasNet(n_src=2, n_repeats=2), lambda model: model(wave)


def recurrent_ppo() -> tuple[nn.Module, Call]:
    """What RecurrentPPO evaluates and trains: 16 sequences of 16 steps, in which episodes begin."""
    import gymnasium
    from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
    from sb3_contrib.common.recurrent.type_aliases import RNNStates
    from stable_baselines3.common.utils import FloatSchedule

    sequences, steps = 16, 16
    observations, actions = gymnasium.spaces.Box(-1, 1, (8,)), gymnasium.spaces.Discrete(4)
    policy = RecurrentActorCriticPolicy(observations, actions, FloatSchedule(1e-3))
    states = RNNStates(*((torch.zeros(1, sequences, 256), torch.zeros(1, sequences, 256)) for _ in range(2)))
    seen, done = torch.randn(sequences * steps, 8), torch.randint(4, (sequences * steps,))
    starts = (torch.rand(sequences * steps) < 0.1).to(seen.dtype)
    return policy, lambda policy: policy.evaluate_actions(seen, done, states, starts)


def torchrl_lstm() -> tuple[nn.Module, Call]:
    from tensordict import TensorDict
    from torchrl.modules import LSTMModule

    model = LSTMModule(input_size=32, hidden_size=128, in_key="seen", out_key="known")
    seen, starts = torch.randn(16, 20, 32), torch.zeros(16, 20, 1, dtype=torch.bool)
    starts[:, 0] = True

    def call(model: nn.Module) -> Any:
        states = {name: torch.zeros(16, 20, 1, 128) for name in ("recurrent_state_h", "recurrent_state_c")}
        inputs = TensorDict({"seen": seen, "is_init": starts, **states}, batch_size=[16, 20])
        return model(inputs)["known"]

    return model, call


def by_hand(cell: str, batch: int, size: int) -> tuple[nn.Module, Call]:
    """A cell in a loop of 20 steps."""
    x, h = torch.randn(20, batch, size), torch.zeros(batch, size)

    def call(model: nn.Module) -> Any:
        state = (h, h) if cell == "LSTMCell" else h
        for x_t in x:
            state = model(x_t, state)
        return state

    return getattr(nn, cell)(size, size), call


ZOO = {
    f"torch {cell} by hand, {batch} x {size}": Entry(functools.partial(by_hand, cell, batch, size), 1, "torch")
    for cell in ("RNNCell", "GRUCell", "LSTMCell")
    for batch, size in ((1, 128), (64, 128), (16, 512))
} | {
    "torch_geometric AttentiveFP": Entry(attentive_fp, 3, "torch_geometric"),
    "torch_geometric LSTMAggregation": Entry(lstm_aggregation, 1, "torch_geometric"),
    "openunmix OpenUnmix": Entry(open_unmix, 1, "openunmix"),
    "demucs Demucs": Entry(demucs, 5, "demucs"),
    "torchaudio HDemucs": Entry(hdemucs, 4, "torchaudio"),
    "torchaudio Tacotron2": Entry(tacotron2, 3, "torchaudio"),
    "torchaudio WaveRNN": Entry(wave_rnn, 2, "torchaudio"),
    "transformers EnCodec": Entry(encodec, 2, "transformers"),
    "transformers Parakeet's decoder": Entry(parakeet, 1, "transformers"),
    "speechbrain CRDNN": Entry(crdnn, 1, "speechbrain"),
    "gluonts DeepAR": Entry(gluonts_deepar, 1, "gluonts"),
    "darts RNNModel": Entry(darts_rnn, 1, "darts"),
    "asteroid DPRNNTasNet": Entry(dprnn, 4, "asteroid"),
    "sb3_contrib RecurrentPPO": Entry(recurrent_ppo, 2, "sb3_contrib", torch.float32),  # it makes every observation one
    "torchrl LSTMModule": Entry(torchrl_lstm, 1, "torchrl"),
}
