"""Who is measured. On a CPU every contender lives in a process of its own: threads that one library keeps spinning
would slow the next one several times.

A contender is made from the arguments of `Case`, on the same weights and input, and is called for one run.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from benchmarks import require
from benchmarks.cases import Case
from benchmarks.problems import lengths


class Unavailable(Exception):
    """This contender cannot run this case, or is not installed; the message says why."""


def weights(case: Case) -> nn.RNNBase:
    """torch.nn's module with the case's weights, in float32."""
    torch.manual_seed(0)
    return module_of(case, nn)


def module_of(case: Case, namespace: Any) -> Any:
    problem = case.shape
    return getattr(namespace, case.cell)(problem.I, problem.H, problem.layers)


def data(case: Case) -> Tensor:
    problem = case.shape
    return torch.randn(problem.T, problem.B, problem.I, generator=torch.Generator().manual_seed(1))


def inferring(run: Callable[[], list]) -> Callable[[], list]:
    """The run in inference mode. Who times it enters that once around many (`timing.answer_to`, `beside.measure`), as
    people do around a loop of calls: it takes up to a fifth of the shortest."""

    @functools.wraps(run)
    def in_mode() -> list:
        if torch.is_inference_mode_enabled():
            return run()
        with torch.inference_mode():
            return run()

    return in_mode


def prepared(case: Case, module: nn.Module, call: Callable[[Any], tuple] | None = None) -> Callable[[], list[Tensor]]:
    """A run of the module on the case: output, final state and, in training, the gradients of input and parameters.

    call: what to call on the input in the module's place, with its parameters.
    """
    call = call or module
    module = module.to(case.device, case.torch_dtype)
    x = data(case)
    if case.layout == "packed":
        packed: Any = pack_padded_sequence(x, lengths(case.shape), enforce_sorted=False)
        x, *rest = packed.to(case.device)
    x = x.to(case.device, case.torch_dtype).requires_grad_(case.mode == "train")
    given = PackedSequence(x, *rest) if case.layout == "packed" else x

    def states(final) -> list[Tensor]:
        return list(final) if isinstance(final, tuple) else [final]

    @inferring
    def infer() -> list[Tensor]:
        y, final = call(given)
        return [y.data if case.layout == "packed" else y, *states(final)]

    def train() -> list[Tensor]:
        module.zero_grad()
        x.grad = None
        y, final = call(given)
        y = y.data if case.layout == "packed" else y
        y.backward(torch.ones_like(y))
        return [y, *states(final), x.grad, *(p.grad for p in module.parameters())]

    return infer if case.mode == "infer" else train


def torch_nn(case: Case) -> Callable[[], list[Tensor]]:
    module = weights(case).to(case.device, case.torch_dtype)
    module.flatten_parameters()
    return prepared(case, module)


def seqkernels(
    case: Case, backend: str | None = None, recompute: bool = False, keep_packed: bool = True
) -> Callable[[], list[Tensor]]:
    if recompute and case.mode == "infer":
        raise Unavailable("nothing is saved, so that nothing is computed again")
    if not keep_packed and case.mode == "train":
        raise Unavailable("packed weights are kept where no gradients are wanted")
    sk = require("seqkernels")
    module = module_of(case, sk)
    module.recompute, module.keep_packed = recompute, keep_packed
    module.load_state_dict(weights(case).state_dict())
    module.backend = backend
    to = case.device, case.torch_dtype
    try:
        sk.explain(module.to(*to), data(case).to(*to))
    except ValueError as error:
        raise Unavailable(str(error)) from error
    return prepared(case, module)


class Loop(nn.Module):
    """The layer as people write it by hand: torch.nn's cell (one aten operation a step), step after step."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.cell = getattr(nn, f"{type(layer).__name__}Cell")(layer.input_size, layer.hidden_size)
        names = {name.removesuffix("_l0"): value for name, value in layer.state_dict().items()}
        self.cell.load_state_dict(names)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        state: Any = None
        outputs = []
        for step in x:
            state = self.cell(step, state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        final = tuple(s[None] for s in state) if isinstance(state, tuple) else state[None]
        return torch.stack(outputs), final


def loop(case: Case, compiled: bool = False) -> Callable[[], list[Tensor]]:
    if case.layout == "packed" or case.shape.layers > 1:
        raise Unavailable("a loop by hand over one padded layer only")
    module = Loop(weights(case))
    if compiled:
        if case.shape.T > MAX_UNROLLED:
            raise Unavailable(f"torch.compile writes a loop out step by step; {case.shape.T} of them take it minutes")
        module.compile()
    return prepared(case, module)


def in_dtype(
    dtype: str, contender: Callable[[Case], Callable[[], list[Tensor]]]
) -> Callable[[Case], Callable[[], list[Tensor]]]:
    """The contender in one dtype, whatever the case's: on a CPU 16 bits may well be slower, and of cuDNN's kernels the
    fastest are in float16."""

    def make(case: Case) -> Callable[[], list[Tensor]]:
        if case.dtype == dtype:
            raise Unavailable(f"the case is in {dtype} itself")
        return contender(case._replace(dtype=dtype))

    return make


def onnx_model(case: Case) -> Any:
    """The layer as one ONNX node, from torch's weights: gates in ONNX's order, biases side by side."""
    helper, numpy_helper, proto = require("onnx.helper"), require("onnx.numpy_helper"), require("onnx").TensorProto
    problem = case.shape
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
    if (case.mode, case.layout, case.dtype, case.device) != ("infer", "padded", "float32", "cpu"):
        raise Unavailable("padded inference in float32 on a CPU only")
    if case.shape.layers > 1:
        raise Unavailable("one layer only")


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


MAX_UNROLLED = 32  # steps
OUR_BACKENDS = ("cpu", "cuda", "triton", "cudnn", "torch_eager")
CONTENDERS: dict[str, Callable[[Case], Callable[[], list[Tensor]]]] = {
    "torch.nn": torch_nn,
    "seqkernels": seqkernels,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "torch.nn float32": in_dtype("float32", torch_nn),
    "torch.nn float16": in_dtype("float16", torch_nn),
    "seqkernels float32": in_dtype("float32", seqkernels),
    **{f"seqkernels {name}": functools.partial(seqkernels, backend=name) for name in OUR_BACKENDS},
    "seqkernels recompute": functools.partial(seqkernels, recompute=True),
    "seqkernels packing": functools.partial(seqkernels, keep_packed=False),  # its weights in every call
    "aten cells": loop,
    "compiled loop": functools.partial(loop, compiled=True),
}
OURS, OWN = "seqkernels", "torch.nn"  # what every case compares
USUAL = (OWN, OURS, "onnxruntime", "openvino")
PACKAGES = {"torch.nn": "torch", "aten": "torch", "compiled": "torch"}


def versions(name: str) -> str | None:
    package = name.split()[0]
    with contextlib.suppress(ImportError):
        return str(getattr(__import__(PACKAGES.get(package, package)), "__version__", None))
    return None


def errors(ours: list[Tensor], right: list[Tensor]) -> list[float]:
    """Relative error in the Euclidean norm, of each result; of one that should be zero, what it is."""
    found = []
    for value, spec in zip(ours, right, strict=True):
        value, spec = value.detach().double().flatten(), spec.detach().double().flatten()
        same = value.shape == spec.shape
        found.append((value - spec).norm().item() / (spec.norm().item() or 1) if same else math.inf)
    return found


def explain(case: Case) -> str:
    sk = require("seqkernels")
    case.set_precision()
    module = module_of(case, sk).to(case.device, case.torch_dtype)
    x = data(case).to(module.weight_ih_l0)
    given = lengths(case.shape) if case.layout == "packed" else None
    with torch.set_grad_enabled(case.mode == "train"):
        return str(sk.explain(module, x, lengths=given))
