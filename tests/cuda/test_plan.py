"""What csrc/cuda/plan.cpp finds to fit on a GPU, the path that is chosen of it, and that a launch is what was planned.
On any machine: no GPU and no emulator takes part."""

import random

import pytest
import torch
from cuda_paths import fitting, found, path_names
from gpus import GPUS, MIG, RTX_5090, RTX_PRO_6000

import seqkernels as sk
from seqkernels import functional, hardware
from seqkernels.backends.call import RESETS, Call
from seqkernels.backends.cells import CELLS
from seqkernels.backends.cuda.launch import Launch, PassLaunch, cheapest
from seqkernels.backends.stack import SavedLayout
from seqkernels.hardware import THIS_MACHINE
from seqkernels.select import plan

pytestmark = pytest.mark.skipif(bool(THIS_MACHINE.native_missing), reason=THIS_MACHINE.native_missing)

H200, B200, A100, L4 = (GPUS[f"NVIDIA {name}"] for name in ("H200", "B200", "A100-SXM4-80GB", "L4"))
T4 = GPUS["Tesla T4"]
LAYERS = list(dict.fromkeys(cell.display_name for cell in CELLS.values()))
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# As much shared memory as an L4 has, on a GPU with clusters.
SMALL = H200._replace(name="a GPU with 99 KB", shared_memory=99 << 10)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("gpu", [A100, H200, L4, SMALL, MIG], ids=lambda gpu: gpu.name)
def test_which_layers_a_single_cta_takes(gpu, backward):
    def fits(hidden, dtype, **more):
        return bool(fitting("single CTA", gpu, "lstm", hidden, dtype, backward, **more))

    assert fits(256, HALF) and not fits(257, torch.float16)
    assert fits(128, SINGLE) and fits(128, SINGLE, tf32=True) and not fits(129, SINGLE, tf32=True)
    assert not fits(64, DOUBLE) and not fits(64, HALF, projected=True)
    assert not fitting("single CTA", T4, "lstm", 64, torch.float16, backward)


KIB = 1 << 10
RESIDENCY = [
    # cell, hidden size, dtype, TF32, GPU, backward, and KiB in registers, shared memory, L2
    ("gru", 128, HALF, False, L4, True, (96, 0, 0)),
    ("lstm", 128, HALF, False, H200, True, (128, 0, 0)),
    ("lstm", 100, torch.float16, False, L4, False, (128, 0, 0)),
    ("gru", 128, SINGLE, True, H200, False, (144, 48, 0)),
    ("lstm", 128, SINGLE, True, H200, True, (96, 160, 0)),
    ("lstm", 128, SINGLE, False, H200, False, (32, 192, 32)),
    ("lstm", 128, SINGLE, False, L4, False, (32, 64, 160)),
    ("gru", 256, HALF, False, H200, False, (120, 216, 48)),
    ("lstm", 256, HALF, False, H200, False, (96, 192, 224)),
    ("rnn_relu", 256, HALF, False, L4, True, (128, 0, 0)),
]


@pytest.mark.parametrize("row", RESIDENCY, ids=lambda row: " ".join(map(str, (*row[:4], row[4].name))))
def test_where_the_weights_of_a_single_cta_lie(row):
    cell, hidden, dtype, tf32, gpu, backward, expected = row
    (one,) = fitting("single CTA", gpu, cell, hidden, dtype, backward, tf32=tf32)
    assert tuple(one[place] / KIB for place in ("registers", "shared_weights", "l2")) == expected
    assert one["shared_weights"] < one["shared_memory"] <= gpu.shared_memory


def test_small_batches_are_spread_over_the_gpu():
    def tiles(directions, multiprocessors, *batches):
        gpu = A100._replace(multiprocessors=multiprocessors)
        sizes = [{"directions": directions, "sequences": sequences} for sequences in batches]
        return [fitting("single CTA", gpu, "gru", 64, HALF, **size)[0]["tile"] for size in sizes]

    assert tiles(1, 132, 0, 1, 132, 133, 1056, 5000) == [1, 1, 1, 2, 8, 8]
    assert tiles(2, 132, 66, 67, 528, 529) == [1, 2, 8, 8]
    # A tile is of one direction: by twos, 7 sequences both ways are 8 tiles, for which 7 CTAs would take two rounds.
    assert tiles(2, 7, 3, 7, 12, 24, 25) == [1, 3, 4, 8, 8]
    assert tiles(1, 1, 5) == tiles(2, 1, 5) == [5]


LARGEST = [
    # cell, dtype, TF32, and the largest hidden size of a cluster forward, backward; of the persistent grid. 2112 units
    # are a block for each of the 132 multiprocessors.
    ("rnn_tanh", HALF, False, (1024, 1024), (2112, 2112)),
    ("gru", HALF, False, (832, 768), (2112, 2112)),
    ("lstm", torch.float16, False, (768, 768), (2048, 2112)),
    ("rnn_relu", SINGLE, True, (1024, 1024), (2112, 2112)),
    ("gru", SINGLE, True, (512, 512), (1408, 1536)),
    ("lstm", SINGLE, True, (512, 512), (1024, 1024)),
    ("rnn_tanh", SINGLE, False, (1024, 960), (2112, 2112)),
    ("gru", SINGLE, False, (512, 512), (1152, 1536)),
    ("lstm", SINGLE, False, (512, 512), (768, 1024)),
    ("ligru", HALF, False, (1024, 1024), (2112, 2112)),
    ("ligru", SINGLE, True, (736, 768), (1920, 2112)),
    ("ligru", SINGLE, False, (640, 512), (1536, 2048)),
]


@pytest.mark.parametrize("row", LARGEST, ids=lambda row: " ".join(map(str, row[:3])))
def test_the_largest_layers_of_several_blocks(row):
    cell, dtype, tf32, cluster, grid = row
    for backward in (False, True):
        for hidden in range(129, 2200):
            by_path = found(H200, cell, hidden, dtype, backward, tf32=tf32)
            for name, largest in (("cluster", cluster), ("persistent grid", grid)):
                able = [one for one in by_path[name] if not one["reason"]]
                assert bool(able) == (hidden <= largest[backward]), (name, hidden)


LARGEST_ON_BLACKWELL = [
    # GPU, cell, dtype, TF32, and the largest hidden size of a cluster forward, backward: on a B200 those of an H200, on
    # GB202 those of up to 8 blocks with 99 KB each
    *((B200, *row[:4]) for row in LARGEST),
    (RTX_5090, "rnn_tanh", HALF, False, (512, 512)),
    (RTX_5090, "gru", HALF, False, (512, 512)),
    (RTX_PRO_6000, "lstm", HALF, False, (384, 384)),
    (RTX_PRO_6000, "gru", SINGLE, True, (288, 256)),
    (RTX_PRO_6000, "lstm", SINGLE, False, (256, 256)),
]


@pytest.mark.parametrize("row", LARGEST_ON_BLACKWELL, ids=lambda row: " ".join(map(str, (row[0].name, *row[1:4]))))
def test_the_largest_layers_of_a_cluster_of_blackwell(row):
    gpu, cell, dtype, tf32, largest = row
    for backward in (False, True):
        for hidden in (129, largest[backward], largest[backward] + 1):
            able = fitting("cluster", gpu, cell, hidden, dtype, backward, tf32=tf32)
            assert bool(able) == (hidden <= largest[backward]), hidden
            assert not fitting("persistent grid", gpu, cell, hidden, dtype, backward, tf32=tf32)


REASONS = [
    # path, the layer, whether it is projected, the GPU, and why it cannot run
    ("single CTA", "gru", 64, HALF, False, T4, "needs compute capability 8.0, the GPU has 7.5"),
    ("single CTA", "lstm", 64, HALF, True, H200, "takes a projection"),
    ("single CTA", "gru", 129, SINGLE, False, H200, "for 129 hidden units in float32"),
    ("cluster", "gru", 256, HALF, False, A100, "clusters need compute capability 9.0, the GPU has 8.0"),
    ("cluster", "lstm", 256, HALF, True, H200, "takes a projection"),
    ("cluster", "gru", 256, DOUBLE, False, H200, "takes float64"),
    ("cluster", "gru", 32, HALF, False, H200, "2 to 16 blocks, and 32 hidden units, 32 a block, make 1"),
    ("cluster", "gru", 1000, SINGLE, False, H200, "2 to 16 blocks, and 1000 hidden units, 32 a block, make 32"),
    ("cluster", "gru", 1000, SINGLE, False, H200, "the weights do not fit: a block needs"),
    ("cluster", "lstm", 512, HALF, False, MIG, "runs no cluster of 16 blocks"),
    ("cluster", "lstm", 250, HALF, False, H200._replace(clusters=()), "runs no cluster of 8 blocks"),
    ("cluster", "rnn_tanh", 576, HALF, False, RTX_5090, "runs no cluster of 9 blocks"),
    ("cluster", "lstm", 512, HALF, False, RTX_5090, "and may have 101376"),
    # Compiled for other GPUs alone, as by default.
    ("cluster", "gru", 256, HALF, False, B200._replace(clusters=16 * (0,)), "runs no cluster of 8 blocks"),
    (
        "persistent grid",
        "gru",
        1024,
        HALF,
        False,
        H200._replace(clusters=16 * (0,)),
        "in clusters of 4 at the same time",
    ),
    ("persistent grid", "gru", 1024, HALF, False, A100, "clusters need compute capability 9.0"),
    ("persistent grid", "gru", 1024, HALF, False, B200, "is for compute capability 9.0, the GPU has 10.0"),
    ("persistent grid", "lstm", 1024, HALF, True, H200, "takes a projection"),
    ("persistent grid", "gru", 1024, DOUBLE, False, H200, "takes float64"),
    ("persistent grid", "lstm", 1025, SINGLE, False, H200, "the weights do not fit"),
    ("persistent grid", "lstm", 900, SINGLE, False, SMALL, "and may have 101376"),
    ("persistent grid", "gru", 2113, HALF, False, H200, "136 blocks in clusters of 4 at the same time"),
    ("persistent grid", "gru", 257, HALF, False, MIG, "18 blocks in clusters of 2 at the same time"),
]


@pytest.mark.parametrize("row", REASONS, ids=lambda row: f"{row[0]}: {row[-1]}")
def test_what_cannot_run_says_why(row):
    name, cell, hidden, dtype, projected, gpu, reason = row
    for backward in (False, True):
        reasons = [one["reason"] for one in found(gpu, cell, hidden, dtype, backward, projected=projected)[name]]
        assert all(reasons) and any(reason in said for said in reasons), reasons


def test_no_gpu_is_without_a_path():
    for gpu in (*GPUS.values(), RTX_5090, MIG, SMALL):
        for cell, dtype in (("gru", DOUBLE), ("lstm", HALF)):
            assert fitting("stepwise", gpu, cell, 5000, dtype, projected=cell == "lstm")


PATHS = [
    # GPU, cell, H, dtype (exact), directions, sequences, and the paths forward and backward: sequences of a tile, units
    (H200, "lstm", 1024, HALF, 1, 1, "persistent grid 1 64", "persistent grid 1 32"),
    # 31 clusters of 4 are one group of 16 of them; but 66 clusters of 2 are two groups of 32, for two tiles at once,
    (H200, "lstm", 1024, HALF, 1, 8, "persistent grid 4 32", "persistent grid 4 32"),
    (H200, "lstm", 1024, HALF, 1, 16, "persistent grid 8 32", "persistent grid 8 32"),
    (H200, "gru", 1024, HALF, 1, 64, "persistent grid 8 32", "persistent grid 8 32"),
    (H200, "gru", 1024, HALF, 2, 8, "persistent grid 8 32", "persistent grid 8 32"),  # or both directions.
    (H200, "gru", 1536, HALF, 1, 16, "persistent grid 8 64", "persistent grid 8 32"),
    (H200, "lstm", 1536, HALF, 1, 64, "stepwise", "stepwise"),
    # 128 blocks are more than 31 clusters of 4; a direction follows upon the other.
    (H200, "lstm", 2048, HALF, 1, 8, "persistent grid 8 32", "persistent grid 8 32"),
    (H200, "lstm", 2048, HALF, 2, 5, "persistent grid 5 32", "persistent grid 5 32"),
    # Where clusters hold the weights as well: the exchange through L2 takes longer, and what each of fewer blocks has
    # to read of the weights.
    (H200, "gru", 768, HALF, 1, 16, "cluster 3 48", "cluster 3 48"),
    (H200, "lstm", 768, HALF, 1, 16, "cluster 3 48", "cluster 3 48"),
    (H200, "lstm", 1024, SINGLE, 1, 16, "stepwise", "persistent grid 8 32"),
    (H200, "lstm", 2113, HALF, 1, 1, "stepwise", "stepwise"),
    (H200, "lstm", 512, HALF, 1, 1, "cluster 1 32", "cluster 1 32"),
    (H200, "lstm", 512, HALF, 1, 120, "cluster 8 64", "cluster 8 64"),  # of smaller slices, half would have to wait
    (H200, "lstm", 512, HALF, 1, 10000, "stepwise", "stepwise"),
    (H200, "lstm", 64, HALF, 1, 1, "single CTA 1", "single CTA 1"),
    (A100, "lstm", 1024, HALF, 1, 1, "stepwise", "stepwise"),
    (A100, "gru", 300, HALF, 1, 16, "stepwise", "stepwise"),
    (B200, "gru", 768, HALF, 1, 16, "cluster 2 48", "cluster 2 48"),
    (B200, "gru", 1024, HALF, 1, 16, "stepwise", "stepwise"),
    (B200._replace(clusters=16 * (0,)), "gru", 768, HALF, 1, 16, "stepwise", "stepwise"),  # built for other GPUs
    (RTX_5090, "lstm", 384, HALF, 1, 16, "cluster 1 48", "cluster 1 48"),
    (RTX_5090, "lstm", 512, HALF, 1, 16, "stepwise", "stepwise"),
    (MIG, "lstm", 400, HALF, 1, 4, "cluster 2 64", "cluster 2 64"),
    (MIG, "lstm", 512, HALF, 1, 4, "stepwise", "stepwise"),
]


@pytest.mark.parametrize("row", PATHS, ids=lambda row: " ".join(map(str, (row[0].name, *row[1:6]))))
def test_the_paths_of_both_passes(row):
    gpu, cell, hidden, dtype, directions, sequences, *expected = row
    call = Call(cell, "cuda", dtype, hidden_size=hidden, directions=directions, sequences=sequences)
    for backward in (False, True):
        (path, tile, units, _), microseconds = cheapest(call, gpu, backward)
        assert 0.1 < microseconds < 1000 or sequences > 1000
        assert " ".join([path_names()[path], *(str(size) for size in (tile, units) if size)]) == expected[backward]


@pytest.mark.parametrize("sequences", [8, 128])
@pytest.mark.parametrize("hidden", [512, 640, 768])
def test_an_odd_number_of_units_is_no_cliff(hidden, sequences):
    odd, even = (Call("lstm", "cuda", HALF, hidden_size=size, sequences=sequences) for size in (hidden - 1, hidden))
    assert cheapest(odd, H200, False)[0] == cheapest(even, H200, False)[0]


# ---- what explain says is what is launched


@pytest.fixture
def launched(monkeypatch) -> list[tuple[PassLaunch, bool]]:
    """How the passes of calls were launched, on an H200 that is not here: nothing is computed."""
    machine = THIS_MACHINE._replace(cuda_missing="", emulator=True, gpu=H200)
    monkeypatch.setattr(hardware, "machine_of", lambda device: machine)
    monkeypatch.setattr(hardware, "THIS_MACHINE", machine)  # where there is no emulator
    launches = []

    def cuda_forward(cell, x, weights, h_0, c_0, batch_sizes, save, tf32, *launch):
        *launch, layers, _ = launch
        launches.append((PassLaunch(*launch), tf32))
        D, P = len(h_0) // layers, h_0.shape[2]
        y = x.new_zeros(len(x), D * P)
        c_n = h_0.new_zeros(*h_0.shape[:2], 0) if c_0 is None else torch.zeros_like(c_0)
        layout = SavedLayout.of(cell, x, weights, h_0, layers)
        saved = x.new_zeros(layout.shape() if save else (len(x), D, 0))
        return y, torch.zeros_like(h_0), c_n, saved

    def cuda_backward(cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, *more):
        *_, tf32, path, tile, units, chunks, _, _ = more
        launches.append((PassLaunch(path, tile, units, chunks), tf32))
        c = h_0.new_zeros(*h_0.shape[:2], 0) if c_0 is None else torch.zeros_like(c_0)
        return torch.zeros_like(x), [torch.zeros_like(weight) for weight in weights], torch.zeros_like(h_0), c

    monkeypatch.setattr(torch.ops.seqkernels, "cuda_forward", cuda_forward, raising=False)
    monkeypatch.setattr(torch.ops.seqkernels, "cuda_backward", cuda_backward, raising=False)
    return launches


@pytest.mark.parametrize("seed", range(60))
def test_a_launch_is_what_explain_says(seed, launched):
    draw = random.Random(seed)
    name, dtype = draw.choice(LAYERS), draw.choice([SINGLE, HALF, torch.float16])
    hidden = draw.choice([draw.randint(1, 128), draw.randint(129, 256), draw.randint(257, 900)])
    sequences, both = draw.choice([draw.randint(1, 128), draw.randint(129, 1000)]), draw.random() < 0.5
    rnn = getattr(sk, name)(3, hidden, num_layers=draw.randint(1, 2), bidirectional=both, dtype=dtype, device="cpu")
    rnn.backend = "cuda"
    x = torch.zeros(2, sequences, 3, dtype=dtype, device="cpu")
    said = sk.explain(rnn, x).kernel
    if draw.random() < 0.5:
        y, _ = rnn(x)
    else:
        module = functional.rnn if name == "RNN" else getattr(functional, name.lower())
        weights = [weight for layer in rnn.all_weights for weight in layer]
        y, _ = module(x, None, weights, num_layers=rnn.num_layers, bidirectional=both, backend="cuda")
    y.sum().backward()
    assert len(launched) == 2  # with all layers
    forward, backward = launched
    assert str(Launch(False, forward[0], backward[0])) == said


def test_pieces_are_launched_as_their_sequences_are(launched):
    """Where nothing was planned, as in compiled code, there are more states than sequences."""
    pieces, weights = torch.arange(6).expand(40, 6), [torch.zeros(96, 3), torch.zeros(96, 32)]
    for batch_sizes, given in ((None, pieces), (torch.full((40,), 6), pieces.flatten())):
        args = "gru", torch.zeros(240, 3), weights, torch.zeros(1, 246, 32), None, batch_sizes, False
        torch.ops.seqkernels.recurrence_forward.cuda(*args, [], 1, given)
    call = Call("gru", "cuda", SINGLE, hidden_size=32, sequences=6, options=(RESETS,))
    expected, _ = cheapest(call, hardware.gpu_of(torch.zeros(0).device), False)
    assert expected.tile == 6 and [launch for launch, _ in launched] == [expected] * 2


def test_what_is_said_of_a_gpu_names_its_clusters():
    assert hardware.said_of(GPUS["NVIDIA H200"]).endswith("(sm_90, 132 multiprocessors, clusters of up to 16 blocks)")
    assert hardware.said_of(MIG).endswith("(sm_90, 16 multiprocessors, clusters of up to 7 blocks)")
    assert hardware.said_of(GPUS["Tesla T4"]) == "Tesla T4 (sm_75, 40 multiprocessors)"  # nobody has asked for them
    without = GPUS["Tesla T4"]._replace(clusters=16 * (0,))
    assert hardware.said_of(without).endswith("multiprocessors, no clusters: wide layers go by steps)")


def test_a_build_without_code_for_a_gpus_clusters_says_so():
    gpu, reason = B200._replace(clusters=16 * (0,)), "no clusters, as the CUDA kernels here have no code for those of"
    assert f"{reason} sm_100. Remedy: build them with TORCH_CUDA_ARCH_LIST" in hardware.said_of(gpu)
    machine = hardware.Machine(cuda_missing="", gpu=gpu)
    wide, narrow = (Call("gru", "cuda", HALF, hidden_size=hidden, sequences=16) for hidden in (512, 128))
    assert f"stepwise; {reason}" in str(plan(wide, machine))
    assert reason not in str(plan(narrow, machine)) and reason not in str(plan(wide, machine._replace(gpu=B200)))
    # Nor where clusters would change nothing.
    beyond, projected = wide._replace(hidden_size=1024), wide._replace(cell="lstm", projected=True)
    assert all("stepwise" in str(plan(call, machine)) for call in (beyond, projected))
    assert not any(reason in str(plan(call, machine)) for call in (beyond, projected))
