"""`quantize_`: a model's layers and cells become quantized ones (`seqkernels.quantized`), in place."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from seqkernels import cell_modules, drop_in, modules, quantized
from seqkernels.backends.cells import CELLS
from seqkernels.cell_options import DROPOUTS
from seqkernels.convert import Report, Swap
from seqkernels.hardware import THIS_MACHINE
from seqkernels.swappable import reason_against_forward, reason_against_options, torchs_class


def quantize_(model: nn.Module, *, filter_fn: Callable[[nn.Module, str], bool] | None = None) -> Report:
    """Make every layer and cell of ours in `model`, itself included, a quantized one, for inference on CPUs; returns a
    report. torch.nn's are left: `swap_in` comes first.

    Objects stay the same, only their class changes, and their parameters become buffers of a quarter of the size:
    weights of int8 with a scale for each output channel. Rows of x and h are quantized where they are multiplied, each
    with a scale of its own; gates, activations and states are float32. docs/quantization.md says more.

    Args:
        model: any module; the quantized ones are in evaluation mode.
        filter_fn: filter_fn(module, name) says whether to quantize a module, as in torchao's quantize_; name as
            `model.named_modules()` has it. None: all.

    Left as they are, with the reason in the report: layers that are not float32 on the CPU, with weights that are not
    finite, of more columns than int32 has room for, or parametrized; with learn_initial_state, or options of cells
    but dropouts; with parameters and buffers of somebody else's; subclasses; and modules whose
    `forward` somebody has replaced.

    Raises:
        TypeError: `model` is no module.
        RuntimeError: this install has no compiled kernels.
    """
    drop_in.check_module(model, "quantize_ takes a model, which is one torch.nn.Module")
    if THIS_MACHINE.native_missing:
        raise RuntimeError(f"quantized layers need the CPU's kernels: {THIS_MACHINE.native_missing}")
    report = Report()
    for report.seen, (name, module) in enumerate(model.named_modules(), 1):
        if torchs := torchs_class(module):
            report.append(Swap(name, f"torch.{torchs.__name__}", None, "it is torch.nn's: swap_in makes it ours"))
        elif isinstance(type(module), drop_in.DropIn):
            asked = filter_fn is None or filter_fn(module, name)
            reason = _reason_against(module) if asked else "filter_fn does not want it"
            report.append(Swap(name, f"seqkernels.{type(module).__name__}", None, reason or ""))
        elif isinstance(module, quantized.Quantized):
            report.append(Swap(name, f"seqkernels.{module._get_name()}", None, "it is quantized already"))
    for place, swap in enumerate(report):  # after all questions, whose answers may be exceptions
        if not swap.reason:
            module = model.get_submodule(swap.name)
            weights = dict(zip(itertools.chain(*_names(module)), _weights(module), strict=True))
            quantized.quantize(module, cell_modules.cell_of(module), _names(module), weights)  # type: ignore[arg-type]
            report[place] = swap._replace(after=f"seqkernels.{module._get_name()}")
    return report


_LAYERS = {getattr(modules, cell.display_name) for cell in CELLS.values()}
_CELLS = (modules.RNNCell, modules.GRUCell, modules.LSTMCell)
_MAX_COLUMNS = 1 << 16  # kMaxDepth of csrc/cpu/packed_int8.h


def _reason_against(module: nn.Module) -> str | None:
    if hasattr(module, "parametrizations"):
        return "its weights are parametrized: torch.nn.utils.parametrize.remove_parametrizations makes them plain"
    if type(module) not in (*_LAYERS, *_CELLS):
        return "it is a subclass"
    harmless = *DROPOUTS, "return_all_states"  # inference drops nothing
    if reason := reason_against_options(module, "a quantized layer", harmless):
        return reason
    own = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    if more := own - {*itertools.chain(*_names(module))}:
        return f"it has more than its weights: {', '.join(sorted(more))}"
    for weight in _weights(module):
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            return f"its weights are {weight.dtype} on {weight.device}, not torch.float32 on cpu"
        if not weight.isfinite().all():
            return "it has a weight that is not finite"
        if weight.dim() == 2 and weight.shape[1] >= _MAX_COLUMNS:
            return f"it has a weight of {weight.shape[1]} columns, more than int32 has room for"
    return reason_against_forward(module)


def _weights(module: nn.Module) -> list[Tensor]:
    if isinstance(module, drop_in.Layer):
        return module._weights()
    return drop_in.parameters(module, _names(module)[0])


def _names(module: nn.Module) -> list[list[str]]:
    if isinstance(module, drop_in.Layer):
        return [list(names) for names in module._all_weights]
    return [["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if module.bias else [])]]
