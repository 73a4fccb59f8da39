"""Weights that several processes share out among them: FSDP2, which frees each weight between forward and backward."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.distributed.device_mesh import init_device_mesh

import seqkernels as sk

PROCESSES = 2


def compare_with_torch(name: str, options: dict) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    input = torch.randn(3, 4) if name.endswith("Cell") else torch.randn(5, 3, 4)
    expected, rnn = getattr(torch.nn, name)(4, 6, **options), getattr(sk, name)(4, 6, **options)
    rnn.load_state_dict(expected.state_dict())
    mesh = init_device_mesh("cpu", (PROCESSES,))
    fully_shard(rnn, mesh=mesh, reshard_after_forward=True)

    def train(module: torch.nn.Module) -> torch.Tensor:
        output = module(input)
        y = output[0] if isinstance(output, tuple) else output
        y.square().sum().backward()
        return y.detach()

    for _ in range(2):  # a second step: weights come back into storages that were freed
        torch.testing.assert_close(train(rnn), train(expected))
        for sharded, whole in zip(rnn.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)


def run_process(rank: int, rendezvous: str, name: str, options: dict) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    compare_with_torch(name, options)
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GRU", {"num_layers": 2, "bidirectional": True}),
        pytest.param("LSTM", {"proj_size": 3}, marks=pytest.mark.slow),
        pytest.param("LSTMCell", {}, marks=pytest.mark.slow),
    ],
)
def test_fsdp_frees_weights_between_forward_and_backward(name, options, tmp_path):
    torch.multiprocessing.spawn(run_process, (str(tmp_path / "rendezvous"), name, options), PROCESSES)
