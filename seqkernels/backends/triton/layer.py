"""One layer as the Triton kernels take it: its sizes, its steps, its tile, and the launch of a kernel."""

import contextlib
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqkernels import hardware, late_checks
from seqkernels.backends.arguments import NO_MASKS, StepMasks, Weights, by_direction
from seqkernels.backends.call import RESETS, Call
from seqkernels.backends.cells import CELLS
from seqkernels.backends.side_by_side import sequences_of
from seqkernels.backends.triton.tiles import Launch, launch_of


class Layer:
    """Sizes of a call, by the letters of ``seqkernels.ops``, where its steps begin, and how it is cut into tiles."""

    def __init__(
        self,
        cell: str,
        x: Tensor,
        weights: list[Tensor],
        h_0: Tensor,
        batch_sizes: Tensor | None,
        launch: Sequence[int],
        masks: StepMasks = NO_MASKS,
        pieces: Tensor | None = None,
    ):
        self.cell, self.device, self.masks, self.pieces = CELLS[cell], x.device, masks, pieces
        self.D, self.C, self.P = h_0.shape
        self.B = sequences_of(h_0, batch_sizes, pieces)
        self.weights: list[Weights] = by_direction(weights, self.D)
        self.N, self.G, self.K = x.shape[0], self.cell.gates, masks.saved_blocks(cell)
        self.F = self.G + self.cell.gates_apart  # blocks of grad_gates
        self.H = self.weights[0].w_hh.shape[0] // self.G
        self.projected = self.weights[0].w_hr is not None
        self.bias = self.weights[0].b_hh is not None
        self.tile = _launch(launch, x, self)
        self.precision = "tf32" if self.tile.tf32 else "ieee"
        self.ragged = batch_sizes is not None
        self.T = self.N // max(self.B, 1) if batch_sizes is None else len(batch_sizes)
        self.used = self.N  # rows that steps use, as far as that is known without asking the device
        self.starts = self.sizes = h_0.new_zeros(1, dtype=torch.int64)  # stand-ins that no kernel reads
        # How many sequences run in each step, as far as that is known without asking the device.
        self.known = [self.B] * self.T
        self.batch_sizes = batch_sizes
        if batch_sizes is not None:
            if not late_checks.out_of_sight(batch_sizes):
                self.known = batch_sizes.tolist()
                self.used = sum(self.known)
            self.starts, self.sizes = _starts_and_sizes(batch_sizes, x.device)
        self.has_work = 0 not in (self.N, self.T, self.B, self.H + self.P)

    def options(self) -> tuple[str, ...]:
        """As `Call.options`."""
        return (
            (RESETS,)
            if self.pieces is not None
            else tuple(k for k, mask in self.masks._asdict().items() if mask is not None)
        )

    def guard(self) -> contextlib.AbstractContextManager:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def steps(self, back: bool = False) -> list[tuple[int, int]]:
        """(k, how many sequences run in the k-th step of any direction) in the order of a pass."""
        other = self.known[::-1] if self.D == 2 else self.known
        steps = [(k, rows) for k, rows in enumerate(map(max, self.known, other)) if rows]
        return steps[::-1] if back else steps

    def of_pieces(self) -> dict[str, Any]:
        """What a kernel of single steps takes of them."""
        return {"pieces": self.pieces, "C": None if self.pieces is None else self.C}

    def outermost(self, last: bool) -> Tensor:
        """The states ``[D, B]`` of the pieces that sequences begin with in the order of a direction, or end with."""
        assert self.pieces is not None
        sequence = torch.arange(self.B, device=self.device)
        ends = self.T - torch.searchsorted(self.sizes.flip(0), sequence, right=True) - 1
        first, behind = self.pieces[sequence], self.pieces[self.starts[ends] + sequence]
        return torch.stack(([behind, first] if last else [first, behind])[: self.D])

    def stacked(self, name: str) -> Tensor:
        """One weight of all directions ``[D, *]``; a view where there is one direction."""
        first, *others = (getattr(w, name).contiguous() for w in self.weights)
        return torch.stack([first, *others]) if others else first.unsqueeze(0)

    def launch(self, name: str, grid: tuple[int, ...], **arguments: Any) -> None:
        """Run a kernel; what follows from the layer's sizes is added to the arguments."""
        every = {"starts": self.starts, "sizes": self.sizes, "T": self.T, "B": self.B, "D": self.D}
        every |= {"RAGGED": self.ragged, "ROWS": self.tile.rows, "UNITS": self.tile.units}
        if "P" not in arguments:
            every |= {"N": self.N, "CELL": self.cell.name, "HAS_C": self.cell.states == 2, "H": self.H}
            every |= {"GATES": self.G, "SAVED": self.K, **self.masks._asdict()}
        _run(name, grid, {**every, **arguments}, self.tile.warps)

    def grid(self, rows: int, units: int) -> tuple[int, int, int]:
        """Programs for a step."""
        return -(-rows // self.tile.rows), -(-units // self.tile.units), self.D


def _launch(planned: Sequence[int], x: Tensor, layer: Layer) -> Launch:
    """What was planned, or by the sizes that arrive."""
    if len(planned) > 1:
        tf32, resident, *tile = planned
        return Launch(bool(tf32), bool(resident), *tile)
    call = Call(
        cell=layer.cell.name,
        device_type=x.device.type,
        dtype=x.dtype,
        hidden_size=layer.H,
        projected=layer.projected,
        tf32=x.dtype == torch.float32 and hardware.tf32(x.device),
        options=layer.options(),
    )
    return launch_of(call, hardware.gpu_of(x.device))


def _run(name: str, grid: tuple[int, ...], arguments: dict[str, Any], warps: int) -> None:
    if arguments["starts"].device.type == "cpu" and not hardware.THIS_MACHINE.interpreter:
        raise RuntimeError("Triton's kernels take tensors on a GPU (TRITON_INTERPRET=1 lets them run on the CPU)")
    kernel_of(name)[grid](**arguments, num_warps=warps, num_stages=1)


@functools.cache
def kernel_of(name: str) -> Any:
    """A kernel, whose import needs Triton."""
    from seqkernels.backends.triton import kernels, norms, resident_norms, stepwise

    files = kernels, stepwise, resident_norms, norms
    return next(getattr(file, name) for file in files if hasattr(file, name))


def _starts_and_sizes(batch_sizes: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first row and the number of sequences of every step, ``[T]`` each, on the device."""
    if batch_sizes.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        batch_sizes = _written_there(batch_sizes, device)
    steps = torch.stack([batch_sizes.cumsum(0) - batch_sizes, batch_sizes]).to(device, non_blocking=True)
    return steps[0], steps[1]


def _written_there(batch_sizes: Tensor, device: torch.device) -> Tensor:
    """A copy that a CUDA graph may capture: a replay cannot read the host's memory, so values travel with launches."""
    there, at = torch.empty_like(batch_sizes, device=device), 0
    for size, run in itertools.groupby(batch_sizes.tolist()):
        end = at + len(list(run))
        there[at:end].fill_(size)
        at = end
    return there
