"""The choice of a backend as a table: problems and machines, those that are not here as well."""

import itertools

import pytest
import torch
from gpus import GPUS

from seqkernels.backends.call import Call, class_of_steps
from seqkernels.hardware import Machine
from seqkernels.select import BACKENDS, plan

THIS_MACHINE = Machine()
TRITON = Machine(triton=True)
PURE = Machine(native_missing="this install has no compiled part")
TABLE = [
    # device, dtype, transformed, machine, backend
    ("cpu", torch.float32, False, THIS_MACHINE, "cpu"),
    ("cpu", torch.float64, False, THIS_MACHINE, "cpu"),
    ("cpu", torch.bfloat16, False, THIS_MACHINE, "cpu"),
    ("cpu", torch.float16, False, THIS_MACHINE, "cpu"),
    ("cpu", torch.float32, True, THIS_MACHINE, "torch_eager"),
    ("cpu", torch.float32, False, PURE, "torch_eager"),
    ("cuda", torch.float32, False, THIS_MACHINE, "torch_eager"),
    ("cuda", torch.float32, False, TRITON, "triton"),
    ("cuda", torch.bfloat16, False, TRITON, "triton"),
    ("cuda", torch.float16, False, TRITON, "triton"),
    ("cuda", torch.float64, False, TRITON, "torch_eager"),
    ("cuda", torch.float32, True, TRITON, "torch_eager"),
    ("cpu", torch.float32, False, TRITON, "cpu"),
    ("cpu", torch.float32, False, PURE._replace(triton=True), "torch_eager"),
    # Triton's interpreter is for tests: nobody gets it unasked.
    ("cpu", torch.float32, False, PURE._replace(triton=True, interpreter=True), "torch_eager"),
    ("cuda", torch.float32, False, Machine(triton=True, interpreter=True), "torch_eager"),
    ("xpu", torch.float32, False, TRITON, "torch_eager"),
    ("meta", torch.float32, False, THIS_MACHINE, "torch_eager"),
]


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_plan(row):
    device, dtype, transformed, machine, backend = row
    chosen = plan(Call("gru", device, dtype, transformed), machine)
    assert chosen.backend == backend
    assert [refused for refused, _ in chosen.refusals] == [other for other in BACKENDS if other != backend]
    assert all(reason for _, reason in chosen.refusals)


MASKS = ("zoneout", "recurrent_dropout", "candidate_dropout")


@pytest.mark.parametrize(
    ("cell", "options", "backend"),
    [
        ("gru", MASKS, "triton"),
        ("lstm", MASKS[:1], "triton"),
        ("rnn_tanh", MASKS[:2], "triton"),
        ("lstm", ("zoneout", "proj_size"), "torch_eager"),
        ("gru", ("zoneout", "layer_norm"), "triton"),
        ("rnn_relu", ("layer_norm",), "triton"),
        ("gru", ("layer_norm", "blocks"), "torch_eager"),
    ],
)
def test_options_run_in_triton(cell, options, backend):
    chosen = plan(Call(cell, "cuda", torch.float32, hidden_size=64, options=options), TRITON)
    assert chosen.backend == backend
    if backend != "triton":
        assert dict(chosen.refusals)["triton"] == f"it has no kernel with {', '.join(options)}"


def test_a_forced_plan_is_the_same_for_any_number_of_steps():
    """explain says each different plan of a model's layers once."""
    machine = TRITON._replace(gpu=GPUS["NVIDIA H200"])
    calls = (Call("gru", "cuda", torch.float32, hidden_size=64, sequences=8, steps=steps) for steps in (4, 64))
    assert len({plan(call, machine, "triton") for call in calls}) == 1


def test_a_forced_backend_runs_or_is_refused_with_its_reason():
    call = Call("gru", "cpu", torch.float32)
    assert plan(call, THIS_MACHINE, "torch_eager").backend == "torch_eager"
    assert plan(call, Machine(forced_backend="torch_eager")).reason == "forced"
    with pytest.raises(ValueError, match="no compiled part"):
        plan(call, PURE, "cpu")
    with pytest.raises(ValueError, match="tensors are on cuda"):
        plan(Call("gru", "cuda", torch.float32), THIS_MACHINE, "cpu")
    with pytest.raises(ValueError, match="choose one of cpu, cuda, triton, cudnn, torch_eager"):
        plan(call, Machine(forced_backend="gpu"))


HALF, SINGLE = torch.bfloat16, torch.float32
ON_GPUS = [
    # cell, hidden size, projected, dtype, TF32, and the widest tile on: A100, L4, laptop, H200, B200, MI300X
    ("gru", 10, False, SINGLE, True, (32, 32, 32, 32, 32, 32)),
    ("gru", 112, False, HALF, True, (128, 0, 0, 128, 128, 128)),  # 98 KB of weights
    ("gru", 100, False, HALF, True, (0, 0, 0, 128, 128, 128)),  # odd sizes take more registers
    ("lstm", 128, False, HALF, True, (128, 0, 0, 128, 128, 128)),  # 128 KB
    ("rnn_tanh", 128, False, HALF, True, (128, 128, 128, 128, 128, 128)),
    ("gru", 64, False, SINGLE, True, (64, 64, 64, 64, 64, 64)),
    ("gru", 100, False, SINGLE, True, (0, 0, 0, 128, 0, 0)),  # 192 KB
    ("lstm", 64, False, SINGLE, True, (0, 0, 0, 64, 64, 64)),
    ("lstm", 65, False, SINGLE, True, (0, 0, 0, 0, 0, 0)),
    ("gru", 32, False, SINGLE, False, (32, 32, 32, 32, 32, 32)),
    ("gru", 33, False, SINGLE, False, (0, 0, 0, 0, 0, 64)),  # AMD's matrix cores take float32 as it is
    ("gru", 129, False, HALF, True, (0, 0, 0, 0, 0, 0)),
    ("lstm", 32, True, HALF, True, (0, 0, 0, 0, 0, 0)),
]


@pytest.mark.parametrize("row", ON_GPUS, ids=str)
def test_the_tile_on_gpus_that_are_not_here(row):
    cell, hidden, projected, dtype, exact_or_tf32, widths = row
    gpus = [gpu for gpu in GPUS.values() if gpu.target != "sm_75"]
    for gpu, units in zip(gpus, widths, strict=True):
        tf32 = exact_or_tf32 and not gpu.amd
        call = Call(cell, "cuda", dtype, hidden_size=hidden, projected=projected, tf32=tf32)
        chosen = plan(call, TRITON._replace(gpu=gpu))
        assert chosen.backend == "triton"
        assert chosen.kernel.startswith(f"resident, 16 sequences by {units} units" if units else "stepwise"), gpu
        assert chosen.kernel in str(chosen)


FULL = Machine(cuda_missing="", triton=True, cudnn=91300)  # CUDA kernels, Triton and cuDNN
ON_H200 = GPUS["NVIDIA H200"]
PLACES = ("NVIDIA H200", "NVIDIA A100-SXM4-80GB", "NVIDIA L4", "Tesla T4", "AMD Instinct MI300X")
DOUBLE = torch.float64
# cell, H, I, T, B, dtype, layouts, and what is chosen at each of PLACES, in inference and in training alike. Where two
# launches a step stand against two of cuDNN's, cuDNN is chosen until ours are measured, but for bfloat16, in which its
# calls begin late. tests/ops/test_measured_choice.py holds the choice against rows.
CHOICES = [
    # One block holds the layer: slower than cuDNN's block a sequence in float32, faster than its launches of packed
    # batches. No kernel of ours takes 16-bit products to sm_75 in one block, and cuDNN there no bfloat16.
    ("gru", 100, 100, 20, 64, SINGLE, "padded", "cudnn cudnn cudnn cudnn triton"),
    ("gru", 100, 100, 20, 64, SINGLE, "packed", "cuda cuda cuda cudnn triton"),
    ("gru", 128, 100, 50, 32, HALF, "padded packed", "cuda cuda cuda cuda triton"),
    ("lstm", 128, 100, 500, 32, torch.float16, "padded packed", "cuda cuda cuda cudnn triton"),
    ("rnn_tanh", 128, 100, 50, 8, SINGLE, "padded", "cudnn cudnn cudnn cudnn triton"),
    ("rnn_tanh", 128, 100, 50, 8, SINGLE, "packed", "cuda cuda cuda cudnn triton"),
    ("lstm", 64, 64, 500, 512, SINGLE, "padded packed", "cuda cuda cuda cudnn triton"),
    # In 16 bits up to 256, part of it read from L2.
    ("gru", 256, 128, 200, 32, HALF, "padded packed", "cuda cuda cuda cuda triton"),
    ("lstm", 256, 128, 200, 32, HALF, "padded packed", "cuda cuda cuda cuda triton"),
    # Wider: a cluster where there are clusters, else stepwise against whatever cuDNN has.
    ("gru", 257, 128, 200, 32, HALF, "padded packed", "cuda cudnn cudnn cuda triton"),
    ("gru", 160, 64, 1000, 16, SINGLE, "padded packed", "cuda cudnn cudnn cudnn triton"),
    ("rnn_relu", 384, 64, 100, 32, SINGLE, "padded packed", "cuda cudnn cudnn cudnn triton"),
    ("lstm", 768, 768, 1024, 16, torch.float16, "padded", "cudnn cudnn cudnn cudnn triton"),
    ("lstm", 768, 768, 1024, 16, torch.float16, "packed", "cuda cudnn cudnn cudnn triton"),
    ("lstm", 768, 768, 1024, 16, HALF, "padded packed", "cuda cudnn cudnn cuda triton"),
    # Too wide for a cluster: the persistent grid.
    ("gru", 1024, 1024, 64, 16, SINGLE, "padded packed", "cuda cudnn cudnn cudnn triton"),
    ("lstm", 1024, 1024, 64, 16, HALF, "padded packed", "cuda cuda cuda cuda triton"),
    ("lstm", 1024, 1024, 64, 16, torch.float16, "padded", "cudnn cudnn cudnn cudnn triton"),
    ("lstm", 1024, 1024, 64, 16, torch.float16, "packed", "cuda cudnn cudnn cudnn triton"),
    ("lstm", 1024, 1024, 64, 256, SINGLE, "padded", "cudnn cudnn cudnn cudnn triton"),
    # No kernel of Triton's takes float64.
    ("gru", 64, 64, 50, 64, DOUBLE, "padded packed", "cudnn cudnn cudnn cudnn torch_eager"),
    # What cuDNN does not take: lengths on the GPU, cells, many steps.
    ("gru", 512, 128, 200, 32, HALF, "device", "cuda cuda cuda cuda triton"),
    ("lstm", 512, 128, 200, 32, DOUBLE, "device", "cuda cuda cuda cuda torch_eager"),
    ("lstm", 512, 128, 1, 32, SINGLE, "cell", "cuda cuda cuda cuda triton"),
    ("gru", 512, 128, 65536, 2, torch.float16, "padded packed", "cuda cuda cuda cuda triton"),
]
WITHOUT_CUDA_KERNELS = [
    # A resident Triton kernel beats cuDNN's launches; a Triton launch a step does not.
    ("gru", 100, 100, 20, 64, HALF, "padded packed", "triton cudnn cudnn torch_eager triton"),
    ("gru", 64, 64, 20, 4096, SINGLE, "padded", "triton triton triton cudnn triton"),
    ("gru", 512, 64, 20, 64, SINGLE, "padded packed", "cudnn cudnn cudnn cudnn triton"),
    ("gru", 512, 64, 20, 64, SINGLE, "device", "triton triton triton torch_eager triton"),
]


def call_of(cell, hidden, input, steps, sequences, dtype, layout, training, gpu, layers=1, tf32=True) -> Call:
    return Call(
        cell=cell,
        device_type="cuda",
        dtype=dtype,
        layers=layers,
        hidden_size=hidden,
        tf32=tf32 and dtype == SINGLE and not gpu.amd,
        input_size=input,
        sequences=sequences,
        steps=class_of_steps(steps),
        layout=layout,
        training=training,
    )


@pytest.mark.parametrize(
    ("row", "machine"),
    [(row, FULL) for row in CHOICES] + [(row, FULL._replace(cuda_missing="none")) for row in WITHOUT_CUDA_KERNELS],
    ids=lambda value: str(value) if isinstance(value, tuple) and not isinstance(value, Machine) else "",
)
def test_the_choice_on_gpus_that_are_not_here(row, machine):
    *sizes, layouts, expected = row
    for layout, training in itertools.product(layouts.split(), (False, True)):
        found = []
        for name in PLACES:
            chosen = plan(call_of(*sizes, layout, training, GPUS[name]), machine._replace(gpu=GPUS[name]))
            assert {refused for refused, reason in chosen.refusals if reason} == set(BACKENDS) - {chosen.backend}
            found.append(chosen.backend)
        assert " ".join(found) == expected, (layout, training)


@pytest.mark.parametrize(
    ("cell", "hidden", "dtype", "options", "with_triton", "without"),
    [
        ("gru", 128, HALF, ("layer_norm",), "cuda single CTA", "cuda single CTA"),  # which computes in float32
        ("lstm", 64, SINGLE, ("zoneout", "layer_norm"), "cuda single CTA", "cuda single CTA"),
        # A resident Triton kernel beats launches of ours, which beat Triton's.
        ("rnn_tanh", 32, SINGLE, ("layer_norm",), "triton resident", "cuda stepwise"),
        ("gru", 512, HALF, ("layer_norm",), "cuda stepwise", "cuda stepwise"),
        ("gru", 32, DOUBLE, ("layer_norm",), "cuda stepwise", "cuda stepwise"),
        ("lstm", 64, SINGLE, ("layer_norm", "blocks"), "torch_eager", "torch_eager"),
    ],
)
def test_layer_norm_on_an_h200(cell, hidden, dtype, options, with_triton, without):
    call = call_of(cell, hidden, hidden, 50, 32, dtype, "padded", True, ON_H200)._replace(options=options)
    for triton, expected in ((True, with_triton), (False, without)):
        chosen = plan(call, FULL._replace(gpu=ON_H200, triton=triton))
        assert f"{chosen.backend} {chosen.kernel}".startswith(expected)


WIDE = [
    # cell, H, and what an H200 chooses for 1, 8, 16 and 64 sequences: where cuDNN has launches in every step; and where
    # it has its persistent kernel, for an LSTM of up to 1024 units in float16, padded
    ("lstm", 1024, "cuda cuda cuda cudnn", "cuda cudnn cudnn cudnn"),
    ("lstm", 1536, "cuda cuda cuda cudnn", "cuda cuda cuda cudnn"),
    ("lstm", 2048, "cuda cuda cuda cudnn", "cuda cuda cuda cudnn"),
    ("gru", 1024, "cuda cuda cuda cudnn", "cuda cuda cuda cudnn"),
    ("gru", 1536, "cuda cuda cuda cudnn", "cuda cuda cuda cudnn"),
    ("gru", 2048, "cuda cuda cuda cudnn", "cuda cuda cuda cudnn"),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("row", WIDE, ids=str)
def test_the_choice_for_wide_layers(row, training):
    cell, hidden, launches, persistent = row
    for name, layout, expected in (
        ("NVIDIA H200", "packed", launches),
        ("NVIDIA H200", "padded", persistent),
        ("NVIDIA A100-SXM4-80GB", "padded", "cudnn cudnn cudnn cudnn"),  # without clusters ours are stepwise
    ):
        gpu = GPUS[name]
        given = 64, torch.float16, layout, training, gpu
        problems = [call_of(cell, hidden, hidden, given[0], n, *given[1:]) for n in (1, 8, 16, 64)]
        assert " ".join(plan(call, FULL._replace(gpu=gpu)).backend for call in problems) == expected


def test_figures_that_were_published_of_clusters():
    assert (16 * ON_H200.clusters_of(16), 8 * ON_H200.clusters_of(8), ON_H200.clusters_of(1)) == (112, 120, 132)


def test_a_plan_names_the_paths_of_both_passes():
    call = call_of("lstm", 1024, 1024, 64, 16, SINGLE, "padded", True, ON_H200, tf32=False)
    chosen = plan(call, FULL._replace(gpu=ON_H200))
    assert chosen.kernel == "forward stepwise, backward persistent grid with 32 units a cluster"
    assert chosen.kernel in str(chosen)


@pytest.mark.parametrize(
    ("cell", "hidden", "dtype", "kernel"),
    [
        ("gru", 128, SINGLE, "single CTA"),
        ("lstm", 256, HALF, "single CTA"),
        ("lstm", 129, SINGLE, "stepwise"),
        ("lstm", 64, torch.float16, "stepwise"),
        ("ligru", 64, SINGLE, "stepwise"),
        ("gru", 64, DOUBLE, "stepwise"),
    ],
)
def test_a_layer_with_masks_runs_by_a_single_cta_or_step_by_step(cell, hidden, dtype, kernel):
    call = call_of(cell, hidden, 64, 50, 32, dtype, "padded", True, ON_H200)._replace(options=("zoneout",))
    assert plan(call, FULL._replace(gpu=ON_H200), "cuda").kernel == kernel
    assert "us a step forward and backward without zoneout, " in plan(call, FULL._replace(gpu=ON_H200)).reason


def test_a_plan_says_what_it_weighed():
    gpu = GPUS["NVIDIA H200"]
    said = str(plan(call_of("gru", 128, 128, 50, 32, HALF, "padded", True, gpu), FULL._replace(gpu=gpu)))
    assert "cuda: compiled kernels" in said and "us a step forward and backward" in said
    assert "not cudnn: about" in said and "measured on an NVIDIA H200 (PERSIST_STATIC_SMALL_H)" in said
    assert (
        "estimated, as nobody measured it on an NVIDIA H200" in said and "not torch_eager" in said and "not cpu" in said
    )


def test_a_plan_says_whether_its_gpu_was_measured():
    gpu = GPUS["NVIDIA A100-SXM4-80GB"]
    said = str(plan(call_of("gru", 128, 128, 50, 32, HALF, "padded", True, gpu), FULL._replace(gpu=gpu)))
    assert said.count("estimated for a GPU nobody measured") == 3 and "measured on" not in said


REFUSALS = [
    ({"cudnn": False}, {}, "torch.backends.cudnn.enabled is False"),
    ({"compiled": True}, {}, "torch.compile"),
    ({"transformed": True}, {}, "torch.func transforms"),
    ({"layout": "cell"}, {}, "not for a cell"),
    ({"layout": "device"}, {}, "lengths are on the GPU"),
    ({"steps": class_of_steps(65536)}, {}, "at most 65535 steps"),
    ({"capturing": True}, {}, "CUDA graph"),
    ({}, {"cudnn": 0}, "no cuDNN"),
    ({}, {"cudnn": 91200}, "not cuDNN 91200"),
    ({}, {"gpu": GPUS["Tesla T4"]}, "compute capability 8.0"),
    ({}, {"gpu": GPUS["AMD Instinct MI300X"]}, "MIOpen, not cuDNN"),
    ({"device_type": "cpu"}, {"cudnn": 0}, "tensors are on cpu"),
    ({"dtype": torch.float8_e4m3fn}, {}, "does not take torch.float8_e4m3fn"),
]


@pytest.mark.parametrize(("change", "machine", "reason"), REFUSALS, ids=[reason for *_, reason in REFUSALS])
def test_cudnn_is_refused_with_a_reason(change, machine, reason):
    gpu = GPUS["NVIDIA H200"]
    call = call_of("gru", 512, 128, 200, 32, HALF, "padded", True, gpu)
    assert plan(call, FULL._replace(gpu=gpu), "cudnn").backend == "cudnn"
    with pytest.raises(ValueError, match=reason):
        plan(call._replace(**change), FULL._replace(gpu=gpu)._replace(**machine), "cudnn")


def test_cudnn_that_may_not_repeat_its_bits_is_for_those_who_name_it():
    machine = FULL._replace(gpu=GPUS["NVIDIA H200"])
    call = call_of("gru", 512, 128, 200, 32, HALF, "padded", True, machine.gpu)._replace(deterministic=True)
    assert plan(call, machine).backend == "cuda" and "the same bits" in str(plan(call, machine))
    assert plan(call, machine, "cudnn").backend == "cudnn"


def test_steps_have_few_classes():
    assert len({class_of_steps(steps) for steps in range(1, 70000)}) == 18
    assert class_of_steps(65535) == 65535 < class_of_steps(65536)


def test_what_has_no_triton_says_how_to_get_it():
    assert "pip install triton" in str(plan(Call("gru", "cuda", SINGLE), THIS_MACHINE))
    t4 = plan(Call("gru", "cuda", SINGLE), TRITON._replace(gpu=GPUS["Tesla T4"]))
    assert t4.backend == "torch_eager" and "compute capability 8.0" in str(t4)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        plan(Call("gru", "cpu", SINGLE), TRITON, "triton")
    assert plan(Call("gru", "cpu", SINGLE), Machine(triton=True, interpreter=True), "triton").backend == "triton"


def test_no_gpu_gives_the_cpu_its_kernels():
    chosen = plan(Call("gru", "cpu", SINGLE, hidden_size=128), TRITON)
    assert (chosen.backend, chosen.kernel) == ("cpu", "")


def test_a_dtype_that_no_backend_takes_is_refused():
    with pytest.raises(ValueError, match="is no floating dtype"):
        plan(Call("gru", "cpu", torch.complex64), THIS_MACHINE)
    with pytest.raises(ValueError, match=r"torch computes nothing in torch\.float8"):
        plan(Call("gru", "cpu", torch.float8_e4m3fn), THIS_MACHINE)
