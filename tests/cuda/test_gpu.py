"""What only a GPU can show of the CUDA kernels: streams, graphs, several GPUs, and sizes that outgrow a grid."""

import concurrent.futures
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import seqkernels as sk
from seqkernels import hardware, select
from seqkernels.backends.precision import NATIVE_DTYPES


def _missing() -> str:
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    if hardware.THIS_MACHINE.emulator:
        return "the CUDA kernels run on the CPU here; SEQKERNELS_TEST_DEVICE=cuda runs these tests"
    return hardware.THIS_MACHINE.cuda_missing


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing())

TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs here")

STEPS, SEQUENCES, INPUT = 12, 5, 16
# By the path that a float32 layer takes with compute capability 9.0; without clusters all but the first are stepwise.
HIDDEN = {"single CTA": 64, "cluster": 300, "persistent grid": 700, "stepwise": 2500}
FORMS = ("padded", "packed", "lengths")


@pytest.fixture(params=HIDDEN)
def hidden(request) -> int:
    """Of a layer that takes one of the paths."""
    return HIDDEN[request.param]


def layer(cell: str, hidden: int, device: str = "cuda", **options) -> nn.Module:
    torch.manual_seed(0)
    module = getattr(sk, cell)(INPUT, hidden, device=device, **options)
    module.backend = "cuda"
    return module


def batch(seed: int = 0, device: str = "cuda") -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(STEPS, SEQUENCES, INPUT, generator=generator, device="cpu").to(device)


def lengths_of(device: str = "cuda") -> Tensor:
    return torch.tensor([5, STEPS, 1, 0, 7], device=device)


def caller(module: nn.Module, form: str, lengths: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A call of the module on a padded batch, and its output, in one of the forms that a batch can have."""
    if form == "padded":
        return lambda x: module(x)[0]
    if form == "lengths":
        lengths = lengths_of() if lengths is None else lengths
        return lambda x: module(x, lengths=lengths)[0]
    # What packing tells the host must be there before: only the rows are new in each call.
    packed = pack_padded_sequence(batch(), lengths_of("cpu").clamp(min=1), enforce_sorted=False)
    return lambda x: module(packed._replace(data=x.flatten(0, 1)[: len(packed.data)]))[0].data


def both_passes(call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    x = x.detach().requires_grad_()
    y = call(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))]


def assert_same_bits(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, same in zip(found, expected, strict=True):
        assert torch.equal(ours, same)


def test_the_machine_is_one_that_the_kernels_are_for():
    device = torch.device("cuda", 0)
    machine = hardware.machine_of(device)
    assert machine.gpu.driver >= (12, 0)
    has_clusters = int(machine.gpu.target.removeprefix("sm_")) >= 90
    assert len(machine.gpu.clusters) == 16 and any(machine.gpu.clusters) == has_clusters
    for dtype in NATIVE_DTYPES:
        assert select.unsupported("cuda", select.Call("gru", "cuda", dtype), machine) is None


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_two_runs_give_the_same_bits(cell, form, hidden):
    module = layer(cell, hidden, num_layers=2, bidirectional=True)
    call, x = caller(module, form), batch()
    assert_same_bits(both_passes(call, module, x), both_passes(call, module, x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_nothing_waits_for_the_gpu(cell, form, hidden):
    module = layer(cell, hidden, num_layers=2, bidirectional=True)
    call, x = caller(module, form), batch()
    both_passes(call, module, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        both_passes(call, module, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", FORMS)
def test_both_passes_run_on_the_current_stream(form, hidden):
    module = layer("LSTM", hidden)
    call, x = caller(module, form), batch()
    expected = both_passes(call, module, x)
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # clocks: what did not wait for this stream would still see zeros
        late.copy_(x)
        found = both_passes(call, module, late)
    torch.cuda.synchronize()
    assert_same_bits(found, expected)


def captured(run: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """A graph of `run`, and what it writes to."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_a_graph_replays_on_new_data(cell, form, hidden):
    module = layer(cell, hidden, num_layers=2, bidirectional=True)
    x, lengths = batch(), lengths_of()
    call = caller(module, form, lengths)
    graph, results = captured(lambda: both_passes(call, module, x))
    for seed, fewer in ((1, 0), (2, 1)):
        x.copy_(batch(seed))
        lengths.copy_((lengths_of() - fewer).clamp(min=0))
        graph.replay()
        assert_same_bits([result.clone() for result in results], both_passes(call, module, x))


# ---- layers that run at the same time, on streams of their own


@pytest.fixture(params=["single CTA", "cluster"])
def wavefront(request) -> tuple[nn.Module, Tensor]:
    """A stack that is planned as a wavefront, and its input."""
    module = layer("LSTM", HIDDEN[request.param], num_layers=3)
    x = torch.randn(1000, SEQUENCES, INPUT)
    planned = sk.explain(module, x)
    if planned.kernel.count("as a wavefront") < 1 + ("backward" in planned.kernel):  # in both passes
        pytest.skip(f"no wavefront is planned on this GPU: {planned}")
    return module, x


def padded(module: nn.Module) -> Callable[[Tensor], Tensor]:
    return caller(module, "padded")


def test_a_wavefront_gives_what_its_layers_give(wavefront):
    module, x = wavefront
    exact = torch.nn.LSTM(INPUT, module.hidden_size, num_layers=3, dtype=torch.float64)
    exact.load_state_dict(module.state_dict())
    right = both_passes(padded(exact), exact, x.double())
    for ours, expected in zip(both_passes(padded(module), module, x), right, strict=True):
        assert (ours.double() - expected).norm() <= 1e-5 * expected.norm()


def test_a_wavefront_begins_and_ends_on_the_current_stream(wavefront):
    module, x = wavefront
    expected = both_passes(padded(module), module, x)
    late, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        found = both_passes(padded(module), module, late)
        late.zero_()  # behind all that reads it
        kept = [result.clone() for result in found]
    stream.synchronize()
    assert_same_bits(kept, expected)


def test_a_wavefront_is_captured_and_waits_for_nothing(wavefront):
    module, x = wavefront
    expected = both_passes(padded(module), module, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert_same_bits(both_passes(padded(module), module, x), expected)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph, results = captured(lambda: both_passes(padded(module), module, x))
    assert_same_bits(both_passes(padded(module), module, x), expected)  # between capture and replay
    x.mul_(0.5)
    graph.replay()
    assert_same_bits([result.clone() for result in results], both_passes(padded(module), module, x))


def test_graphs_of_wavefronts_replay_beside_eager_calls(wavefront):
    module, x = wavefront
    expected = both_passes(padded(module), module, x)
    graphs = [captured(lambda: both_passes(padded(module), module, x)) for _ in range(2)]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    for graph, _ in graphs:
        graph.replay()
        with torch.cuda.stream(stream):
            eager = both_passes(padded(module), module, x)
        assert_same_bits(eager, expected)
    torch.cuda.synchronize()
    for _, results in graphs:
        assert_same_bits(results, expected)


def test_a_wavefront_among_graphed_callables(wavefront):
    module, x = wavefront
    expected = both_passes(padded(module), module, x)
    graphed = torch.cuda.make_graphed_callables(module, (x.clone().requires_grad_(),))
    assert_same_bits(both_passes(padded(graphed), module, x), expected)


def test_wavefronts_of_several_threads(wavefront):
    module, x = wavefront
    expected = padded(module)(x).detach()

    def run(_: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
            found = [padded(module)(x) for _ in range(8)]
            torch.cuda.current_stream().synchronize()
        return found

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for found in threads.map(run, range(8)):
            assert_same_bits(found, [expected] * len(found))


@TWO_GPUS
def test_a_wavefront_on_the_other_gpu(wavefront):
    module, x = wavefront
    expected = both_passes(padded(module), module, x)
    with torch.cuda.device(0):
        found = both_passes(padded(module.to("cuda:1")), module, x.to("cuda:1"))
        assert torch.cuda.current_device() == 0
    for ours, right in zip(found, expected, strict=True):
        assert ours.device.index == 1 and relative_error(ours.to(right.device), right) < 1e-5


MASKS = {"zoneout": 0.1, "recurrent_dropout": 0.3, "candidate_dropout": 0.3}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
@pytest.mark.parametrize("hidden", [64, 300], ids=["single CTA", "stepwise"])
def test_masks_within_the_recurrence(hidden, cell, form):
    """Right, without waiting, and others in each replay."""
    module, x = layer(cell, hidden, num_layers=2, bidirectional=True, **MASKS), batch()
    call, found = caller(module, form), []
    for backend, mode in (("torch_eager", "default"), ("cuda", "default"), ("cuda", "error")):
        module.backend = backend
        torch.manual_seed(0)
        torch.cuda.set_sync_debug_mode(mode)
        try:
            found.append(both_passes(call, module, x))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    expected, ours, again = found
    assert_same_bits(ours, again)
    for name, value, right in zip(("y", "x", *dict(module.named_parameters())), ours, expected, strict=True):
        assert relative_error(value, right) < 1e-4, name
    graph, (y, *_) = captured(lambda: both_passes(call, module, x))
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(y.clone())
    assert not torch.equal(*replays)


def mask_of(seed: int = 0, device: str = "cuda") -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.rand(STEPS, SEQUENCES, generator=generator, device="cpu") < 0.3).to(device)


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_a_graph_replays_with_other_resets(cell, hidden):
    module, x, mask = layer(cell, hidden, num_layers=2), batch(), mask_of()
    graph, results = captured(lambda: both_passes(lambda x: module(x, reset=mask)[0], module, x))
    mask.copy_(mask_of(1))
    graph.replay()
    expected = both_passes(lambda x: module(x, reset=mask)[0], module, x)
    torch.testing.assert_close(results, expected, rtol=1e-3, atol=1e-3)  # other tiles, so other sums


@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_masks_on_the_cpu_do_not_wait_and_give_the_same(cell, hidden):
    module, x = layer(cell, hidden, num_layers=2), batch()
    of_gpu, of_cpu = mask_of(), mask_of(device="cpu")

    def on_cpu(x: Tensor) -> Tensor:
        return module(x, reset=of_cpu)[0]

    expected = both_passes(lambda x: module(x, reset=of_gpu)[0], module, x)
    both_passes(on_cpu, module, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = both_passes(on_cpu, module, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_a_replay_drops_other_units(form, hidden):
    module = layer("GRU", hidden, num_layers=2, dropout=0.5)
    call, x = caller(module, form), batch()
    graph, (y, *_) = captured(lambda: both_passes(call, module, x))
    replays = []
    for _ in range(2):
        graph.replay()
        replays.append(y.clone())
    assert not torch.equal(*replays)
    module.eval()
    graph, (y, *_) = captured(lambda: both_passes(call, module, x))
    graph.replay()
    assert torch.equal(y, call(x))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("form", FORMS)
def test_dropout_comes_from_torchs_generator(form, seed, hidden):
    module = layer("GRU", hidden, num_layers=2, dropout=0.5)
    call, x, runs = caller(module, form), batch(), []
    for _ in range(2):
        torch.manual_seed(seed)
        runs.append(both_passes(call, module, x))
    assert_same_bits(*runs)


@TWO_GPUS
@pytest.mark.parametrize("form", FORMS)
def test_the_gpu_of_the_tensors_is_the_one_that_runs(form, hidden):
    found = []
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        with torch.cuda.device(0):
            module = layer("LSTM", hidden, device)
            call = caller(module, form, lengths_of(device)) if form != "packed" else packed_on(module, device)
            found.append([result.cpu() for result in both_passes(call, module, batch(device=device))])
            assert torch.cuda.current_device() == 0
    if torch.cuda.get_device_capability(0) == torch.cuda.get_device_capability(1):
        assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


def packed_on(module: nn.Module, device: str) -> Callable[[Tensor], Tensor]:
    packed = pack_padded_sequence(batch(device=device), lengths_of("cpu").clamp(min=1), enforce_sorted=False)
    return lambda x: module(packed._replace(data=x.flatten(0, 1)[: len(packed.data)]))[0].data


def relative_error(found: Tensor, right: Tensor) -> float:
    return ((found.to(right) - right).norm() / right.norm()).item()


@pytest.mark.parametrize(("steps", "sequences"), [(70_000, 2), (2, 70_000)], ids=["steps", "sequences"])
@pytest.mark.parametrize("form", ["padded", "lengths"])
@pytest.mark.parametrize("hidden", [HIDDEN["single CTA"], HIDDEN["cluster"]])
def test_more_than_65535(steps, sequences, form, hidden):
    module = layer("GRU", hidden)
    # On the CPU, where a batch may have any size; but so many steps take it minutes.
    spec = nn.GRU(INPUT, hidden, device="cpu" if sequences > 65535 else "cuda", dtype=torch.float64)
    spec.load_state_dict(module.state_dict())
    x = torch.randn(steps, sequences, INPUT, device="cuda")
    lengths = torch.full((sequences,), steps, device="cuda")
    if form == "lengths":
        lengths[1::2] = steps // 2
    runs = (torch.arange(steps, device="cuda").unsqueeze(1) < lengths).unsqueeze(2)
    y, *grads = both_passes(caller(module, form, lengths), module, x)

    def specified(x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):  # it takes no more than 65,535 steps
            return spec(x)[0] * runs.to(x)

    right, *rights = both_passes(specified, spec, x.to(spec.weight_hh_l0))
    assert relative_error(y, right) < 1e-5
    for name, ours, right in zip(("x", *dict(module.named_parameters())), grads, rights, strict=True):
        assert relative_error(ours, right) < 1e-4, name


def test_a_failure_before_is_not_swallowed():
    """In a process of its own: after it, CUDA is of no more use."""
    code = """if True:
        import torch, seqkernels as sk
        rnn = sk.GRU(8, 16, device="cuda")
        rnn.backend = "cuda"
        x = torch.randn(3, 2, 8, device="cuda")
        with torch.inference_mode():
            rnn(x)
            torch.cuda.synchronize()
            torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")]  # fails on the GPU, while the host goes on
            try:
                torch.cuda._sleep(1)
                for _ in range(1000):
                    y, _ = rnn(x)
            except Exception as error:
                print("RAISED", error)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "RAISED" in done.stdout, done.stderr
