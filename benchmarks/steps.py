"""`python -m benchmarks steps`: microseconds of a step, of every path that a layer can take and of torch.nn.

A step is the slope between two long T, so that what a call costs drops out; forward, and backward without the weights'
gradients, over cell, dtype, H, B and directions. The layers that say most come first: an axis lists its values from the
one that most people run, or where our paths and cuDNN lie closest together, to what follows from others most safely,
and layers go by the sum of their places. A budget that ends early has then seen every axis vary around the middle,
rather than one corner in full.
"""

import argparse
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import InputError, record, require
from benchmarks.options import add_out, check_device, positive, positive_float
from benchmarks.problems import CELLS, operator_cell
from benchmarks.record import Row
from benchmarks.timing import timed

AXES: dict[str, tuple] = {
    "cell": ("gru", "lstm", "rnn_tanh"),
    "dtype": ("float32", "bfloat16", "tf32", "float16"),
    "H": (128, 256, 512, 1024, 768, 64, 2048),
    "B": (16, 64, 1),
    "directions": (1, 2),
}
STEPS = {"cuda": (1024, 3072), "cpu": (64, 192)}
INPUT_SIZE = 8  # so that a step is the recurrence, and hardly its input projection
RUNS = 5
MODULES = {operator_cell(name): name for name in CELLS}


class Layer(NamedTuple):
    cell: str
    dtype: str  # tf32: float32, whose factors may be rounded to TF32
    H: int
    B: int
    directions: int


class Contender(NamedTuple):
    """How one pass of a layer can be run."""

    name: str
    path: dict[str, Any]  # "path", "tile", "units" where there is a choice
    prepare: Callable[[int], Callable[[], Any]]  # for so many steps: a run


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda", help="cuda or cpu (%(default)s)")
    parser.add_argument(
        "--budget", type=positive_float, default=240.0, metavar="SECONDS", help="no layer begins after (%(default)s)"
    )
    parser.add_argument("--steps", type=positive, nargs=2, metavar="T", help="the two (1024 3072; on a CPU 64 192)")
    add_out(parser)


def run(options: argparse.Namespace) -> int:
    check_device(options.device)
    began, device = time.monotonic(), torch.device(options.device)
    steps = sorted(options.steps or STEPS[device.type])
    if steps[0] == steps[1]:
        raise InputError("--steps: a slope needs two different numbers.")
    require("seqkernels")
    file, shared = options.out / "steps.jsonl", {"benchmark": "steps", **provenance(device)}
    count = 0
    for layer in layers():
        if time.monotonic() - began >= options.budget:
            print(f"The budget of {options.budget:g} s is spent.")
            break
        for row in measure(layer, device, tuple(steps)):
            record.append(file, {**shared, **record.environment(), **tf32_of(layer), **layer._asdict(), **row})
            print(said({**layer._asdict(), **row}), flush=True)
            count += 1
    print(f"Rows: {count}, {file}")
    return 0


def layers() -> Iterator[Layer]:
    """All, the most informative first."""
    places = itertools.product(*(range(len(values)) for values in AXES.values()))
    for place in sorted(places, key=sum):
        yield Layer(*(values[i] for values, i in zip(AXES.values(), place, strict=True)))


def provenance(device: torch.device) -> Row:
    """What the environment does not say."""
    hardware = require("seqkernels.hardware")
    facts = hardware.gpu_of(device)._asdict() if device.type == "cuda" else None
    if facts and "MIG" in facts["name"]:
        print(f"{facts['name']} is a slice of a GPU: the rows are of the slice.")
    names = ("target", "shared_memory", "multiprocessors", "clusters")
    return {
        "run": record.environment()["time"],
        "device": device.type,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "gpu_facts": {name: facts[name] for name in names} if facts else None,
    }


def tf32_of(layer: Layer) -> Row:
    return {"tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": layer.dtype == "tf32"}}


def measure(layer: Layer, device: torch.device, steps: tuple[int, int]) -> Iterator[Row]:
    """A row for each contender and pass; what cannot run says why, once a process."""
    if device.type == "cpu" and layer.dtype == "tf32":
        return
    allowed, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, layer.dtype == "tf32"
    try:
        for backward in (False, True):
            for contender in contenders(layer, device, backward):
                short, long = (microseconds(contender.prepare(T), device) for T in steps)
                us = (long - short) / (steps[1] - steps[0])
                if us <= 0:
                    print(f"{contender.name}: {steps[1]} steps took no longer than {steps[0]}; left out as noise.")
                    continue
                way = {"pass": "backward" if backward else "forward", "contender": contender.name, **contender.path}
                yield {**way, "T": list(steps), "us": us, "fixed_us": short - us * steps[0]}
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def microseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of one run: on a GPU by its own clock, with the next runs in the queue before the first one ends."""
    run()
    if device.type != "cuda":
        return min(timed(run) for _ in range(RUNS)) * 1e6
    events = [torch.cuda.Event(enable_timing=True) for _ in range(RUNS + 1)]
    run()  # so that the GPU is at work when the first event is recorded
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize(device)
    return sorted(a.elapsed_time(b) for a, b in itertools.pairwise(events))[RUNS // 2] * 1e3


# ---- who can run a layer


def contenders(layer: Layer, device: torch.device, backward: bool) -> Iterator[Contender]:
    select, hardware = require("seqkernels.select"), require("seqkernels.hardware")
    machine, call = hardware.machine_of(device), call_of(layer, device, backward)
    for backend in ("cpu",) if device.type == "cpu" else ("cuda", "triton"):
        if reason := select.unsupported(backend, call, machine):
            say_once(f"{backend} left out: {reason}")
            continue
        for launch, path in launches(backend, call, machine, backward):
            yield Contender(backend, path, ours(backend, layer, device, backward, launch))
    name = "torch.nn" if device.type == "cpu" else "cudnn"
    reason = select.unsupported("cudnn", call, machine) if name == "cudnn" else None
    if reason:
        say_once(f"cudnn left out: {reason}")
    else:
        yield Contender(name, {}, torch_nn(layer, device, backward))


def call_of(layer: Layer, device: torch.device, backward: bool):
    return require("seqkernels.backends.call").Call(
        layer.cell,
        device.type,
        dtype_of(layer),
        directions=layer.directions,
        hidden_size=layer.H,
        tf32=layer.dtype == "tf32",
        input_size=INPUT_SIZE,
        sequences=layer.B,
        training=backward,
        cudnn=torch.backends.cudnn.enabled,
    )


def launches(backend: str, call, machine, backward: bool) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """What its operators are told, and how that is called: of the CUDA kernels all that can run."""
    if backend != "cuda":
        module = require(f"seqkernels.backends.{backend}")
        yield list(module.plan_launch(call, machine)), {"path": module.kernel(call, machine) or None}
        return
    launch = require("seqkernels.backends.cuda.launch")
    for found in launch.candidates(call, machine.gpu, backward):
        if found["reason"]:
            say_once(f"cuda, {found['path']}, left out of such layers: {found['reason']}")
            continue
        chosen = launch.PassLaunch(launch.path_names().index(found["path"]), found["tile"], found["units"])
        other, _ = launch.cheapest(call, machine.gpu, not backward)
        passes = (other, chosen) if backward else (chosen, other)
        yield list(launch.Launch(call.tf32, *passes).to_ints()), {n: found[n] for n in ("path", "tile", "units")}


_said: set[str] = set()


def say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        print(text, flush=True)


def dtype_of(layer: Layer) -> torch.dtype:
    return getattr(torch, layer.dtype.replace("tf32", "float32"))


def module_of(layer: Layer, device: torch.device) -> nn.RNNBase:
    torch.manual_seed(0)
    module = getattr(nn, MODULES[layer.cell])(INPUT_SIZE, layer.H, bidirectional=layer.directions == 2)
    return module.to(device, dtype_of(layer)).requires_grad_(False)


def ours(backend: str, layer: Layer, device: torch.device, backward: bool, launch: list[int]):
    """A run of the backend's operator, for so many steps."""
    weights = list(module_of(layer, device).parameters())
    forward = getattr(torch.ops.seqkernels.recurrence_forward, backend)
    backward_op = getattr(torch.ops.seqkernels.recurrence_backward, backend)

    def prepare(T: int) -> Callable[[], Any]:
        x = torch.randn(T * layer.B, INPUT_SIZE, device=device, dtype=dtype_of(layer))
        h_0 = x.new_zeros(layer.directions, layer.B, layer.H)
        c_0 = torch.zeros_like(h_0) if layer.cell == "lstm" else None
        given = (layer.cell, x, weights, h_0, c_0, None)
        if not backward:
            return lambda: forward(*given, False, launch)
        y, h_n, _, saved = forward(*given, True, launch)
        grads = torch.ones_like(y), torch.zeros_like(h_n), None if c_0 is None else torch.zeros_like(c_0)
        return lambda: backward_op(layer.cell, *grads, *given[1:], y, saved, False, False, launch)

    return prepare


def torch_nn(layer: Layer, device: torch.device, backward: bool):
    module = module_of(layer, device)

    def prepare(T: int) -> Callable[[], Any]:
        x = torch.randn(T, layer.B, INPUT_SIZE, device=device, dtype=dtype_of(layer))
        if not backward:
            return lambda: inferred(module, x)
        y = module(x.requires_grad_())[0]
        ones = torch.ones_like(y)
        return lambda: torch.autograd.grad(y, x, ones, retain_graph=True)

    return prepare


def inferred(module: nn.Module, x: Tensor) -> Any:
    with torch.inference_mode():
        return module(x)


def said(row: Row) -> str:
    layer = f"{row['cell']}, {row['dtype']}, H {row['H']}, B {row['B']}, D {row['directions']}, {row['pass']}"
    path = " ".join(str(row[name]) for name in ("path", "units") if row.get(name))
    return f"{layer:48} {row['contender']} {path}: {row['us']:.2f} us a step"
