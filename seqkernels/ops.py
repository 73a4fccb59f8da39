"""The operator pair: recurrence_forward and recurrence_backward, layers with all their directions.

``torch.ops.seqkernels.recurrence_forward.<backend>`` and its backward are overloads, one per backend, with one schema.
Schema, fake kernel, autograd formula and autocast rule stand here once; a backend only computes.

Letters, here and everywhere: T steps, B sequences, N rows, I input size, H hidden size, P projected size (H where
nothing is projected), G gates, D directions, L layers, K blocks of saved state.

forward
    x ``[N, I]``
    weights: for each layer, for each direction w_ih ``[G*H, I]`` (from the second layer on ``[G*H, D*P]``), w_hh
    ``[G*H, P]``, with bias b_ih, b_hh ``[G*H]``, with projection (LSTM) w_hr ``[P, H]``; torch.nn's order
    h_0 ``[L*D, B, P]``, c_0 ``[L*D, B, H]`` (LSTM)
    batch_sizes ``[T]`` int64: running sequences per step, never rising, at most B, in sum at most N; None: always B.
    Rows behind the last step come out as zeros, and have no part in anything. Sequences that never run keep their
    state. batch_sizes on a GPU that are not so are taken as the nearest that are (`seqkernels.late_checks`).
    pieces ``[N]`` int64 with batch_sizes, or ``[T, B]`` without: a sequence can consist of several pieces, one after
    another, each with a first and a last state of its own. h_0, c_0, h_n and c_n are ``[L*D, C, *]`` then, and pieces
    says of each row which of these C its piece has. Both directions run within the pieces. The kernels of cpu, cuda
    and triton go from one piece to the next; where they cannot, and for torch_eager, all rows are copied
    (`seqkernels.backends.side_by_side`). pieces on a GPU that are numbers of no state are taken as the nearest.
    -> y ``[N, D*P]``, h_n ``[L*D, B, P]``, c_n ``[L*D, B, H]`` (else ``[L*D, B, 0]``), saved

`saved` is part of the contract, so any backend's forward pairs with any backend's backward. Of one layer it is
``[N, D, K*H]``, the blocks named at `seqkernels.backends.cells.CELLS`; of several, it is flat and holds those of each
layer and, but for the last, its y (`seqkernels.backends.stack.SavedLayout`). With ``save=False`` it is ``[N, D, 0]``.

backward
    -> gradients of x, weights, h_0, c_0; with ``wants_x=False``, ``wants_weights=False`` empty ones instead.

A forward pass with ``save=False`` has gradients all the same: those of ``recurrence_recompute``, which runs it again
with ``save=True`` and then the backward pass. It is one operator, so that no compiler can move its forward pass out of
the backward pass, and save what it leaves.

launch, of all: what the plan of the call (`seqkernels.select`) tells its backend of the launch of each layer; empty
or [0] where nothing was planned, as in compiled code: then the backend goes by the sizes that arrive.
layers, of all: L.

``recurrence_forward.cpu_ensemble`` and the others of that name run all members of an ensemble in one call, as
torch.vmap has them (`seqkernels.batching`). Every tensor but batch_sizes and pieces, and every result, has the M
members in front: x is ``[M, N, I]``. Members may lie anywhere: what they share has a stride of 0 (`expand`), and costs
no memory.

The backend cudnn is no such pair, as nobody but cuDNN can read what it saves: it has an autograd function of its own.

The input projection and the weight gradients belong to the operator, not to torch code around it, because where they
run decides the speed: on a CPU the projection of a few steps at a time stays in the cache that the sweep reads.
"""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqkernels import batching, direct, double_backward, flops, inplace, ranges
from seqkernels._ops import add_op_namespace_prefix, ops
from seqkernels.backends import autocast, cuda, cudnn, side_by_side, stack, torch_eager, triton
from seqkernels.backends.call import Call
from seqkernels.backends.cells import CELLS
from seqkernels.hardware import THIS_MACHINE
from seqkernels.select import Plan
from seqkernels.storage import expect_storage

FORWARD_SCHEMA = (
    "(str cell, Tensor x, Tensor[] weights, Tensor h_0, Tensor? c_0, Tensor? batch_sizes, bool save, int[] launch=[], "
    "int layers=1, Tensor? pieces=None) "
    "-> (Tensor y, Tensor h_n, Tensor c_n, Tensor saved)"
)
BACKWARD_SCHEMA = (
    "(str cell, Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor[] weights, Tensor h_0, "
    "Tensor? c_0, Tensor? batch_sizes, Tensor y, Tensor saved, bool wants_x, bool wants_weights, "
    "int[] launch=[], int layers=1, Tensor? pieces=None) "
    "-> (Tensor grad_x, Tensor[] grad_weights, Tensor grad_h_0, Tensor grad_c_0)"
)
RECOMPUTE_SCHEMA = BACKWARD_SCHEMA.replace("Tensor y, Tensor saved, ", "")

_library = torch.library.Library(ops.name, "FRAGMENT")
_plain_forward = side_by_side.forward_of(torch_eager.forward)
_plain_backward = side_by_side.backward_of(torch_eager.backward)


def _expect_one_device(x: Tensor, tensors: Sequence[Tensor | None], batch_sizes: Tensor | None) -> None:
    """One tensor on the meta device, and torch calls a fake kernel, whose results nobody has computed."""
    for tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"all tensors are on one device, found {x.device} (x) and {tensor.device}")
    if batch_sizes is not None and batch_sizes.device.type not in ("cpu", x.device.type):
        raise RuntimeError(f"batch_sizes is on the CPU or where x is, found {x.device} (x) and {batch_sizes.device}")


def fake_forward(cell, x, weights, h_0, c_0, batch_sizes, save, launch=(), layers=1, pieces=None):
    _expect_one_device(x, (*weights, h_0, c_0), batch_sizes)
    layout = stack.SavedLayout.of(cell, x, weights, h_0, layers)
    return (
        x.new_empty(layout.rows, layout.directions * layout.projected),
        torch.empty_like(h_0, memory_format=torch.contiguous_format),
        h_0.new_empty(*h_0.shape[:2], 0 if c_0 is None else c_0.shape[2]),
        x.new_empty(layout.shape() if save else (layout.rows, layout.directions, 0)),
    )


def fake_backward(
    cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, wants_weights, launch=(),
    layers=1, pieces=None,
):  # fmt: skip
    _expect_one_device(x, (*weights, h_0, c_0, y, saved, grad_y, grad_h_n, grad_c_n), batch_sizes)

    def like(tensor, wanted=True):
        return tensor.new_empty(tensor.shape if wanted else 0)

    return (
        like(x, wants_x),
        [like(weight, wants_weights) for weight in weights],
        like(h_0),
        h_0.new_empty(*h_0.shape[:2], 0 if c_0 is None else c_0.shape[2]),
    )


def _fake_recompute(cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, *options):
    of_stack = x, weights, h_0, c_0, batch_sizes
    return fake_backward(cell, grad_y, grad_h_n, grad_c_n, *of_stack, None, None, *options)


def _of_each_member(function):
    """A fake kernel or a pass of torch_eager, of all members of an ensemble."""

    def of_ensemble(*args):
        leaves = pytree.tree_leaves(list(args))
        dims = [0 if batching.may_be_members(leaf) else None for leaf in leaves]
        size = next(leaf.shape[0] for leaf in leaves if batching.may_be_members(leaf))
        results, structure = batching.each_member(function, args, dims, size)
        return pytree.tree_unflatten(results, structure)

    return of_ensemble


def _save_for_backward(ctx, inputs, output):
    cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers, pieces = inputs
    y, _, c_n, saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((c_n, saved) if c_0 is None else (saved,)))
    ctx.cell, ctx.save, ctx.launch, ctx.layers = cell, save, launch, layers
    ctx.has_pieces = pieces is not None
    ctx.changes = ctx.batch_first = None
    if save:
        ctx.changes, y = inplace.kept(y)
    else:
        y = saved = None
    ctx.save_for_backward(x, h_0, c_0, batch_sizes, pieces, y, saved, *weights)


def _backward(ctx, backend, grad_y, grad_h_n, grad_c_n, wants_x, wants_weights):
    """The autograd formula of recurrence_forward: the backward operator of the same backend."""
    x, h_0, c_0, batch_sizes, pieces, y, saved, *weights = ctx.saved_tensors
    batch_first = ctx.batch_first

    def rows() -> Tensor:
        return x if batch_first is None else rows_of(x, False)

    of_cell = h_0.dim() == 2
    if ctx.changes and ctx.changes.any() and reads_y(ctx.cell, rows(), h_0, batch_sizes, pieces):
        y = _y_again(ctx, backend, rows(), weights, h_0, c_0, batch_sizes, pieces, saved)
        y = y if batch_first is None else padded(y, x.shape, batch_first)
    of_stack = x, weights, h_0, c_0, batch_sizes, *((y, saved) if ctx.save else ())
    args = ctx.cell, grad_y, grad_h_n, grad_c_n, *of_stack, wants_x, wants_weights, ctx.launch, ctx.layers, pieces
    operator = (_BACKWARD if ctx.save else _RECOMPUTE)[backend]
    differentiated = torch.is_grad_enabled() or torch.compiler.is_compiling()
    grads = ctx.save and not differentiated and direct.backward(backend, args, batch_first)
    if not grads:
        run = operator if differentiated else functools.partial(_below_autograd, operator)
        run = functools.partial(_backward_of_cell, run) if of_cell else run
        grads = run(*args) if batch_first is None else _backward_of_padded(run, args, batch_first)
    grad_x, grad_weights, grad_h_0, grad_c_0 = grads
    unread = grad_y is None and grad_h_n is None and c_0 is not None and not of_cell
    if unread and not _several_steps(rows(), h_0, batch_sizes, pieces):
        # Nobody has read h of the last layer, so that its projection w_hr has had no part in anything: no gradient, as
        # in torch.nn.
        each, first = len(weights) // h_0.shape[-3], len(weights) - len(weights) // ctx.layers
        grad_weights = [
            None if each % 2 and k % each == each - 1 and k >= first else grad for k, grad in enumerate(grad_weights)
        ]
    return (
        grad_x if wants_x else None,
        grad_weights if wants_weights else [None] * len(weights),
        grad_h_0,
        None if c_0 is None else grad_c_0,
    )


def _y_again(ctx, backend: str, x, weights, h_0, c_0, batch_sizes, pieces, saved) -> Tensor:
    """y as it was before it was changed in place."""
    of_stack = x, weights, h_0, c_0, batch_sizes, False, ctx.launch, ctx.layers, pieces
    if backend not in ENSEMBLES.values():  # the last layer alone
        _, below = stack.SavedLayout.of(ctx.cell, x, weights, h_0, ctx.layers).parts(saved)
        *_, (of_layer, *states) = stack.each(ctx.layers, weights, h_0, c_0)
        of_stack = [x, *below][-1], of_layer, *states, batch_sizes, False, ctx.launch, 1, pieces
    with torch.no_grad():
        return _FORWARD[backend](ctx.cell, *of_stack)[0]


def reads_y(cell: str, x: Tensor, h_0: Tensor, batch_sizes: Tensor | None, pieces: Tensor | None = None) -> bool:
    """Whether a backward pass reads y: for the state before each step but the first, and for all of an RNN."""
    return _several_steps(x, h_0, batch_sizes, pieces) or not CELLS[cell].saved_blocks


def _several_steps(x: Tensor, h_0: Tensor, batch_sizes: Tensor | None, pieces: Tensor | None) -> bool:
    # Not by len: in a trace it makes a number of what may be any.
    if batch_sizes is not None:
        return batch_sizes.shape[0] > 1
    return x.shape[-2] > h_0.shape[-2] if pieces is None else pieces.shape[-2] > 1


def _registered_backward_of(backend: str):
    def formula(ctx, grad_y, grad_h_n, grad_c_n, _):
        wants_x, wants_weights = ctx.needs_input_grad[1], any(ctx.needs_input_grad[2])
        grad_x, grad_weights, grad_h_0, grad_c_0 = _backward(
            ctx, backend, grad_y, grad_h_n, grad_c_n, wants_x, wants_weights
        )
        return None, grad_x, grad_weights, grad_h_0, grad_c_0, None, None, *double_backward.grads_of_options(ctx)

    return formula


def _register(backend: str) -> None:
    """Everything about a backend's operators that is the same for all backends."""
    each = _of_each_member if backend in ENSEMBLES.values() else lambda function: function
    formula = _registered_backward_of(backend)
    twice = functools.partial(double_backward.formula, each(_plain_forward), each(_plain_backward))
    for name, fake, derivative, setup in (
        ("recurrence_forward", fake_forward, formula, _save_for_backward),
        ("recurrence_backward", fake_backward, twice, double_backward.save_for_formula),
        ("recurrence_recompute", _fake_recompute, twice, double_backward.save_for_formula),
    ):
        operator = getattr(getattr(ops, name), backend)
        for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
            _library.impl(f"{name}.{backend}", autocast.cast_arguments(operator, device_type), key)
        ensemble = getattr(getattr(ops, name), ENSEMBLES[backend]) if backend in ENSEMBLES else None
        register(operator, each(fake), (derivative, setup), _library, ensemble)


def register(
    operator: torch._ops.OpOverload,
    fake: Callable,
    derivative: tuple[Callable, Callable] | None,  # the formula, and what saves for it
    library: torch.library.Library,
    ensemble: Callable | None = None,
) -> None:
    """What every operator has: a fake kernel, a derivative if it has any, and rules for torch.vmap."""
    name = f"{operator.overloadpacket.__name__}.{operator._overloadname}"
    full_name = add_op_namespace_prefix(name)
    torch.library.register_fake(full_name, fake, lib=library)
    if derivative:
        torch.library.register_autograd(full_name, derivative[0], setup_context=derivative[1], lib=library)
    batching.register(name, batching.Members(operator, ensemble), library)


def _recompute_of(backend: str):
    def recompute(
        cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, wants_x, wants_weights, launch=(),
        layers=1, pieces=None,
    ):  # fmt: skip
        of_stack, options = (x, weights, h_0, c_0, batch_sizes), (launch, layers, pieces)
        y, _, _, saved = _FORWARD[backend](cell, *of_stack, True, *options)
        grads = grad_y, grad_h_n, grad_c_n
        return _BACKWARD[backend](cell, *grads, *of_stack, y, saved, wants_x, wants_weights, *options)

    return recompute


# Backends whose operators run all members of an ensemble in one call, and the overloads that do.
ENSEMBLES = {} if THIS_MACHINE.native_missing else {"cpu": "cpu_ensemble"}
_backends = ["torch_eager", "triton", "cuda", *ENSEMBLES, *ENSEMBLES.values()]
for _backend in _backends:
    if not _backend.startswith("cpu"):  # csrc/cpu/ops.cpp defines and implements its own
        _library.define(f"recurrence_forward.{_backend}{FORWARD_SCHEMA}")
        _library.define(f"recurrence_backward.{_backend}{BACKWARD_SCHEMA}")
    _library.define(f"recurrence_recompute.{_backend}{RECOMPUTE_SCHEMA}")
    _library.impl(f"recurrence_recompute.{_backend}", _recompute_of(_backend), "CompositeExplicitAutograd")
for _name, _forward, _backward_of, _knows_pieces in (
    ("torch_eager", torch_eager.checked_forward, torch_eager.checked_backward, False),
    ("triton", triton.forward, triton.backward, True),
    ("cuda", cuda.forward, cuda.backward, True),
):
    for _pass, _given_pieces in (
        ("forward", side_by_side.forward_of(_forward, _knows_pieces)),
        ("backward", side_by_side.backward_of(_backward_of, _knows_pieces)),
    ):
        _library.impl(f"recurrence_{_pass}.{_name}", _given_pieces, "CompositeExplicitAutograd")

_FORWARD = {backend: getattr(ops.recurrence_forward, backend) for backend in _backends}
_BACKWARD = {backend: getattr(ops.recurrence_backward, backend) for backend in _backends}
_RECOMPUTE = {backend: getattr(ops.recurrence_recompute, backend) for backend in _backends}


class _Recurrence(torch.autograd.Function):
    """The registered autograd formula without torch.library's way to it, which costs 40 us a call."""

    @staticmethod
    def forward(ctx, backend, save, launch, layers, pieces, batch_first, cell, x, h_0, c_0, batch_sizes, *weights):
        options = save, launch, layers, pieces
        args = cell, x, list(weights), h_0, c_0, batch_sizes, *options
        output = _forward_alone(backend, args, batch_first)
        _save_for_backward(ctx, (cell, x, weights, h_0, c_0, batch_sizes, *options), output)
        ctx.backend, ctx.batch_first = backend, batch_first
        return output if batch_first is None else output[:3]  # nobody reads `saved`, and each costs autograd time

    @staticmethod
    def backward(ctx, grad_y, grad_h_n, grad_c_n, *_):
        needs = ctx.needs_input_grad
        grad_x, grad_weights, grad_h_0, grad_c_0 = _backward(
            ctx, ctx.backend, grad_y, grad_h_n, grad_c_n, needs[7], any(needs[11:])
        )
        return None, None, None, None, None, None, None, grad_x, grad_h_0, grad_c_0, None, *grad_weights


class _Step(torch.autograd.Function):
    """The same of one step of a cell, with states ``[B, H]`` -> h, or (h, c)."""

    @staticmethod
    def forward(ctx, launch, cell, x, h_0, c_0, *weights):
        args = cell, x, list(weights), h_0, c_0, None, True, launch, 1, None
        h, c, saved = direct.forward("cpu", args, None) or _forward_of_cell(*args)
        ctx.set_materialize_grads(False)
        ctx.cell, ctx.launch, ctx.save, ctx.layers, ctx.changes, ctx.batch_first = cell, launch, True, 1, None, None
        y = h.data if CELLS[cell].saved_blocks else h.clone()  # what is read of it is not to be changed
        ctx.save_for_backward(x, h_0, c_0, None, None, y, saved, *weights)
        return h if c_0 is None else (h, c)

    @staticmethod
    def backward(ctx, grad_h, grad_c=None):
        needs, grads = ctx.needs_input_grad, (grad_h, None, grad_c)
        grad_x, grad_weights, grad_h_0, grad_c_0 = _backward(ctx, "cpu", *grads, needs[2], any(needs[5:]))
        return None, None, grad_x, grad_h_0, grad_c_0, *grad_weights


# Past what Function.apply does for torch.func, which is not at work where this is called.
_apply = super(torch.autograd.Function, _Recurrence).apply
step_of_cell = super(torch.autograd.Function, _Step).apply


def rows_of(x: Tensor, batch_first: bool) -> Tensor:
    """Of a padded batch ``[T, B, I]`` (with batch_first ``[B, T, I]``), the rows ``[N, I]``."""
    steps_first = x.transpose(0, 1) if batch_first else x
    steps, sequences, features = steps_first.shape
    return steps_first.reshape(steps * sequences, features)  # torch's older vmap has no rule for flatten


def padded(rows: Tensor, like: Sequence[int], batch_first: bool) -> Tensor:
    """The other way round, of any features; `like`: ``[T, B, ...]``."""
    steps_first = rows.view(*like[:2], rows.shape[1])
    return steps_first.transpose(0, 1) if batch_first else steps_first


def _forward_alone(
    backend: str, args: Sequence, batch_first: bool | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A forward pass that nobody differentiates; batch_first as in `direct.forward`."""
    if found := direct.forward(backend, args, batch_first):
        y, h_n, c_n, saved = found
        return y, h_n, c_n, saved
    if batch_first is None:
        return _below_autograd(_FORWARD[backend], *args)
    cell, x, *others = args
    y, *rest = _below_autograd(_FORWARD[backend], cell, rows_of(x, False), *others)
    return padded(y, x.shape, batch_first).data, *rest  # no view, as those of several results must not be changed


def _backward_of_padded(
    run: Callable, args: Sequence, batch_first: bool
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """A backward pass that takes rows, on a padded batch as `direct.backward` takes it."""
    cell, grad_y, grad_h_n, grad_c_n, x, weights, h_0, c_0, batch_sizes, y, saved, wants_x, *options = args
    grads = None if grad_y is None else rows_of(grad_y, batch_first), grad_h_n, grad_c_n
    of_stack = rows_of(x, False), weights, h_0, c_0, batch_sizes, rows_of(y, batch_first), saved
    grad_x, *others = run(cell, *grads, *of_stack, wants_x, *options)
    return padded(grad_x, x.shape, False) if wants_x else grad_x, *others


def _of_layer(state: Tensor | None) -> Tensor | None:
    """A cell's state ``[B, H]`` as that of a layer."""
    return None if state is None else state.unsqueeze(0)


def _forward_of_cell(cell, x, weights, h_0, c_0, *others) -> tuple[Tensor, Tensor, Tensor]:
    """A forward pass of a layer, on a cell's states ``[B, H]`` -> h, c, saved."""
    h, _, c, saved = _below_autograd(_FORWARD["cpu"], cell, x, weights, _of_layer(h_0), _of_layer(c_0), *others)
    return h, c.squeeze(0).data, saved  # no view, as those of several results must not be changed


def _backward_of_cell(run: Callable, cell, grad_h, _, grad_c, x, weights, h_0, c_0, *others):
    """A backward pass of a layer, on a cell's states and their gradients ``[B, H]``."""
    grad_c, h_0, c_0 = map(_of_layer, (grad_c, h_0, c_0))
    grad_x, grad_weights, grad_h_0, grad_c_0 = run(cell, grad_h, None, grad_c, x, weights, h_0, c_0, *others)
    return grad_x, grad_weights, grad_h_0.squeeze(0), grad_c_0.squeeze(0)


def _below_autograd(operator, *args):
    if torch.is_inference_mode_enabled():  # no autograd to pass by
        return operator(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def recurrence_forward(
    plan: Plan,
    call: Call,
    x: Tensor,
    weights: Sequence[Tensor],
    h_0: Tensor,
    c_0: Tensor | None,
    batch_sizes: Tensor | None,
    wanted: bool,
    recompute: bool = False,
    pieces: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the operator that `plan` says, by the shortest way there is -> y, h_n, c_n.

    wanted: gradients are; recompute: for them the forward pass is to run again, and nothing to be saved. pieces: the
    operator's pieces.

    Compiled code and autocast need the operator itself; transforms other than torch.vmap, which cannot pass an
    operator, its plain torch operations.
    """
    if plan.backend == "cudnn":
        return cudnn.run(call.cell, call.directions, wanted, recompute, x, h_0, c_0, batch_sizes, weights)
    compiling, save = torch.compiler.is_compiling(), wanted and not recompute
    launch = plan.launch or [0] if compiling else plan.launch  # a package of AOTInductor takes no empty list
    args = call.cell, x, list(weights), h_0, c_0, batch_sizes, save, launch, call.layers, pieces
    if call.transformed:
        return _plain_forward(*args)[:3]
    if compiling:
        return _FORWARD[plan.backend](*args)[:3]
    return _run(plan.backend, wanted, args)[:3]


def _run(backend: str, wanted: bool, args: Sequence) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if torch._C._is_any_autocast_enabled():
        return _FORWARD[backend](*args)
    if torch._C._are_functorch_transforms_active():
        return batching.forward_of_level(_members_of(backend, wanted), *args)
    if not wanted:
        return _forward_alone(backend, args)
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError("torch.jit.trace records no gradients of ours: trace under no_grad, or torch.export")
    cell, x, weights, h_0, c_0, batch_sizes, save, launch, layers, pieces = args
    return _apply(backend, save, launch, layers, pieces, None, cell, x, h_0, c_0, batch_sizes, *weights)


def of_padded(
    plan: Plan, call: Call, x: Tensor, weights: Sequence[Tensor], h_0: Tensor, c_0: Tensor | None, batch_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `recurrence_forward` with gradients, where nobody else takes part: of a padded batch, and y like it, which
    spares autograd the nodes of the views between batch and rows. As in torch.nn, x may be changed in place afterwards
    where it had to be copied."""
    options = True, plan.launch, call.layers, None
    steps_first = x.transpose(0, 1) if batch_first else x
    if not steps_first.is_contiguous():
        expect_storage(("x", x))
    x = steps_first.contiguous()
    return _apply(plan.backend, *options, batch_first, call.cell, x, h_0, c_0, None, *weights)[:3]


@functools.cache
def _members_of(backend: str, wanted: bool) -> batching.Members:
    """What runs members of torch.vmap, one or all."""

    def run(backend):
        return lambda *args: _run(backend, wanted, args)

    return batching.Members(run(backend), run(ENSEMBLES[backend]) if backend in ENSEMBLES else None)


for _backend in _backends:
    _register(_backend)
flops.register(flops.PLAIN)
if ranges.ON:
    _backward = ranges.of_backward(_backward)
    recurrence_forward = ranges.of_forward(recurrence_forward)
