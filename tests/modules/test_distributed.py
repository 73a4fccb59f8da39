"""Several processes: FSDP2, which frees each weight between forward and backward, DDP, and checkpoints they share."""

import copy

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


def run_process(rank: int, rendezvous: str, run, *args) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=PROCESSES)
    run(*args)
    dist.destroy_process_group()


def in_processes(folder, run, *args) -> None:
    torch.multiprocessing.spawn(run_process, (str(folder / "rendezvous"), run, *args), PROCESSES)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("GRU", {"num_layers": 2, "bidirectional": True}),
        pytest.param("LSTM", {"proj_size": 3}, marks=pytest.mark.slow),
        pytest.param("LSTMCell", {}, marks=pytest.mark.slow),
    ],
)
def test_fsdp_frees_weights_between_forward_and_backward(name, options, tmp_path):
    in_processes(tmp_path, compare_with_torch, name, options)


LENGTHS = torch.tensor([5, 2, 4, 3], device="cpu")


def train_in_parallel(folder: str) -> None:
    """Two steps on a half of the batch each are those of one process on the whole; then a checkpoint of FSDP's."""
    torch.manual_seed(0)
    input, single = torch.randn(4, 5, 4), sk.LSTM(4, 6, num_layers=2, batch_first=True)
    shared = copy.deepcopy(single)
    parallel = torch.nn.parallel.DistributedDataParallel(shared)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for module, own in ((single, slice(None)), (parallel, mine)):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            module(input[own], lengths=LENGTHS[own])[0].square().sum(2).mean().backward()
            optimizer.step()
    torch.testing.assert_close(shared.state_dict(), single.state_dict())
    save_and_load(single, folder)


def save_and_load(trained: torch.nn.Module, folder: str) -> None:
    """Sharded over the processes, through a folder, into another sharded layer and into one of torch.nn's."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    mesh, sharded = init_device_mesh("cpu", (PROCESSES,)), copy.deepcopy(trained)
    fully_shard(sharded, mesh=mesh)
    checkpoint.save({"model": get_model_state_dict(sharded)}, checkpoint_id=folder)
    again = sk.LSTM(4, 6, num_layers=2, batch_first=True)
    fully_shard(again, mesh=mesh)
    state = {"model": get_model_state_dict(again)}
    checkpoint.load(state, checkpoint_id=folder)
    set_model_state_dict(again, state["model"])
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(parameter.full_tensor(), trained.get_parameter(name))
    whole = torch.nn.LSTM(4, 6, num_layers=2, batch_first=True)
    state = {"model": whole.state_dict()}
    checkpoint.load(state, checkpoint_id=folder)
    torch.testing.assert_close(whole.state_dict(), trained.state_dict())


def test_two_processes_train_as_one_and_their_checkpoints_load(tmp_path):
    in_processes(tmp_path, train_in_parallel, str(tmp_path / "checkpoint"))


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="there is no GPU")
def test_data_parallel_computes_what_the_module_does():
    module, x = sk.GRU(4, 6, batch_first=True).cuda(), torch.randn(4, 5, 4, device="cuda")
    torch.testing.assert_close(torch.nn.DataParallel(module)(x)[0], module(x)[0])


def test_a_replica_has_the_weights_it_is_given():
    """What nn.DataParallel does on each device: a copy whose parameters are put there as attributes."""
    module, x = sk.GRU(4, 6, num_layers=2), torch.randn(5, 3, 4)
    replica = module._replicate_for_data_parallel()
    for name, parameter in module.named_parameters():
        replica._parameters.pop(name, None)
        setattr(replica, name, parameter * 2)
    doubled = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in doubled.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(replica(x), doubled(x))
