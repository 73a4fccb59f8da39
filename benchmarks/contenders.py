"""Who is measured. Every contender lives in a process of its own: threads that one library keeps spinning would slow
the next one several times.

A contender is made from the arguments of `Case`, on the same weights and input, and is called for one run.
"""

import argparse
import contextlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks import require
from benchmarks.options import thread_count
from benchmarks.problems import PROBLEMS, lengths


class Case(NamedTuple):
    """What is timed: a problem, a cell, and how it is run."""

    problem: str
    cell: str  # GRU, LSTM, RNN
    mode: str  # infer, train
    layout: str  # padded, packed
    dtype: str  # float32, bfloat16, float16, float64
    threads: int


class Unavailable(Exception):
    """This contender cannot run this case, or is not installed; the message says why."""


def weights(case: Case) -> nn.Module:
    """torch.nn's module with the case's weights, in float32."""
    problem = PROBLEMS[case.problem]
    torch.manual_seed(0)
    return getattr(nn, case.cell)(problem.I, problem.H)


def data(case: Case) -> Tensor:
    problem = PROBLEMS[case.problem]
    return torch.randn(problem.T, problem.B, problem.I, generator=torch.Generator().manual_seed(1))


def torch_like(case: Case, namespace: Any) -> Callable[[], list[Tensor]]:
    """The module of `namespace` (torch.nn or seqkernels) on the case; a run returns output, state and gradients."""
    dtype = getattr(torch, case.dtype)
    module = getattr(namespace, case.cell)(*PROBLEMS[case.problem][2:])
    module.load_state_dict(weights(case).state_dict())
    module = module.to(dtype)
    x = data(case).to(dtype)
    if case.layout == "packed":
        packed = pack_padded_sequence(x, lengths(PROBLEMS[case.problem]), enforce_sorted=False)
        x, rest = packed.data, packed[1:]
    x = x.requires_grad_(case.mode == "train")
    given = PackedSequence(x, *rest) if case.layout == "packed" else x

    def states(final) -> list[Tensor]:
        return list(final) if isinstance(final, tuple) else [final]

    def infer() -> list[Tensor]:
        with torch.inference_mode():
            y, final = module(given)
        return [y.data if case.layout == "packed" else y, *states(final)]

    def train() -> list[Tensor]:
        module.zero_grad()
        x.grad = None
        y, final = module(given)
        y = y.data if case.layout == "packed" else y
        y.backward(torch.ones_like(y))
        return [y, *states(final), x.grad, *(p.grad for p in module.parameters())]

    return infer if case.mode == "infer" else train


def torch_nn(case: Case) -> Callable[[], list[Tensor]]:
    return torch_like(case, nn)


def seqkernels(case: Case) -> Callable[[], list[Tensor]]:
    return torch_like(case, require("seqkernels"))


def in_float32(contender: Callable[[Case], Callable[[], list[Tensor]]]) -> Callable[[Case], Callable[[], list[Tensor]]]:
    """The contender in float32, whatever the case's dtype: 16 bits may well be slower."""

    def make(case: Case) -> Callable[[], list[Tensor]]:
        if case.dtype == "float32":
            raise Unavailable("the case is in float32 itself")
        return contender(case._replace(dtype="float32"))

    return make


def onnx_model(case: Case) -> Any:
    """The layer as one ONNX node, from torch's weights: gates in ONNX's order, biases side by side."""
    helper, numpy_helper, proto = require("onnx.helper"), require("onnx.numpy_helper"), require("onnx").TensorProto
    problem = PROBLEMS[case.problem]
    order = {"GRU": (1, 0, 2), "LSTM": (0, 3, 1, 2), "RNN": (0,)}[case.cell]

    def reorder(w: Tensor) -> np.ndarray:
        chunks = w.detach().chunk(len(order))
        return torch.cat([chunks[i] for i in order]).numpy()

    w_ih, w_hh, b_ih, b_hh = (reorder(w) for w in weights(case).parameters())
    initial = {"W": w_ih, "R": w_hh, "B": np.concatenate([b_ih, b_hh])}
    initializers = [numpy_helper.from_array(value[None], name) for name, value in initial.items()]
    outputs = ["Y", "Y_h", "Y_c"] if case.cell == "LSTM" else ["Y", "Y_h"]
    options = {"linear_before_reset": 1} if case.cell == "GRU" else {}
    node = helper.make_node(case.cell, ["X", "W", "R", "B"], outputs, hidden_size=problem.H, **options)

    def value(name: str, *shape: int) -> Any:
        return helper.make_tensor_value_info(name, proto.FLOAT, shape)

    shapes = {"Y": (problem.T, 1, problem.B, problem.H)}
    graph = helper.make_graph(
        [node],
        case.cell,
        [value("X", problem.T, problem.B, problem.I)],
        [value(name, *shapes.get(name, (1, problem.B, problem.H))) for name in outputs],
        initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


def inference_only(case: Case) -> None:
    if case.mode != "infer" or case.layout != "padded" or case.dtype != "float32":
        raise Unavailable("padded inference in float32 only")


def onnxruntime(case: Case) -> Callable[[], list[Tensor]]:
    inference_only(case)
    ort = optional("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    model = onnx_model(case).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x = data(case).numpy()

    def run() -> list[Tensor]:
        y, *states = session.run(None, {"X": x})
        return [torch.from_numpy(y).flatten(0, 2), *map(torch.from_numpy, states)]

    return run


def openvino(case: Case) -> Callable[[], list[Tensor]]:
    inference_only(case)
    ov = optional("openvino")
    core = ov.Core()
    model = core.read_model(onnx_model(case).SerializeToString())
    options = {"INFERENCE_NUM_THREADS": case.threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", options).create_infer_request()
    x = data(case).numpy()

    def run() -> list[Tensor]:
        y, *states = request.infer([x], share_inputs=True, share_outputs=True).values()
        return [torch.from_numpy(y).flatten(0, 2), *map(torch.from_numpy, states)]

    return run


def optional(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise Unavailable(f"not installed: {error}") from error


CONTENDERS: dict[str, Callable[[Case], Callable[[], list[Tensor]]]] = {
    "torch.nn": torch_nn,
    "seqkernels": seqkernels,
    "torch.nn float32": in_float32(torch_nn),
    "seqkernels float32": in_float32(seqkernels),
    "onnxruntime": onnxruntime,
    "openvino": openvino,
}


def versions(name: str) -> str | None:
    package = name.removesuffix(" float32")
    package = {"torch.nn": "torch"}.get(package, package)
    with contextlib.suppress(ImportError):
        return str(getattr(__import__(package), "__version__", None))
    return None


def errors(ours: list[Tensor], right: list[Tensor]) -> list[float]:
    """Relative error in the Euclidean norm, of each result."""
    found = []
    for value, spec in zip(ours, right, strict=True):
        value, spec = value.detach().double().flatten(), spec.detach().double().flatten()
        found.append(math.inf if value.shape != spec.shape else ((value - spec).norm() / spec.norm()).item())
    return found


def explain(case: Case) -> str:
    sk = require("seqkernels")
    module = getattr(sk, case.cell)(*PROBLEMS[case.problem][2:], dtype=getattr(torch, case.dtype))
    return str(sk.explain(module, data(case).to(module.weight_ih_l0.dtype)))


def add_case_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--problem", nargs="+", default=["all"], choices=["all", *PROBLEMS], metavar="NAME")
    parser.add_argument("--cell", nargs="+", default=list(CASES["cell"]), choices=CASES["cell"])
    parser.add_argument("--mode", nargs="+", default=list(CASES["mode"]), choices=CASES["mode"])
    parser.add_argument("--layout", nargs="+", default=list(CASES["layout"]), choices=CASES["layout"])
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=CASES["dtype"])
    parser.add_argument("--contender", nargs="+", default=list(CONTENDERS), choices=list(CONTENDERS))
    parser.add_argument("--threads", nargs="+", type=thread_count, default=[torch.get_num_threads()], metavar="N")


CASES = {
    "cell": ("GRU", "LSTM", "RNN"),
    "mode": ("infer", "train"),
    "layout": ("padded", "packed"),
    "dtype": ("float32", "bfloat16", "float16", "float64"),
}
