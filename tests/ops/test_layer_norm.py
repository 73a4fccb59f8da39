"""The operator pair of layers with layer norm, and the masks beside it: kernels as torch's operations in float64, in
every division of the work. tests/modules/test_cell_options.py has the layers, and their specification."""

import pytest
import torch
from norms import by_torch
from operators import CELLS, MISSING, nan_in_fresh_memory

from seqkernels._ops import ops
from seqkernels.backends.cells import CELLS as FACTS
from seqkernels.double_backward import derivatives

pytestmark = pytest.mark.skipif(bool(MISSING["cpu"]), reason=str(MISSING["cpu"]))


def layer(cell, rows, sequences, hidden, directions=2, of_sum=False, masked=True, bias=True, blocks=1):
    """The arguments of the operator: those with gradients, and those behind them."""
    torch.manual_seed(0)
    gates, has_c = FACTS[cell].gates * hidden, FACTS[cell].states == 2

    def random(*size, wanted=True):
        return torch.randn(size, dtype=torch.float64).requires_grad_() if wanted else None

    def mask(*size, wanted=masked):
        return (torch.rand(size, dtype=torch.float64) < 0.6).double() / 0.6 if wanted else None

    normalizes_c, state = has_c and not of_sum, (directions, sequences, hidden)
    of_layer = [
        random(rows, directions, gates),
        random(directions, gates, hidden // blocks),
        random(directions, gates),
        random(directions, gates, wanted=bias),
        random(directions, hidden, wanted=normalizes_c),
        random(directions, hidden, wanted=normalizes_c and bias),
        random(*state),
        random(*state, wanted=has_c),
    ]
    candidate = mask(*state, wanted=masked and not cell.startswith("rnn"))
    zoneouts = (mask(rows, directions, hidden, wanted=wanted) for wanted in (masked, masked and has_c))
    return of_layer, [mask(*state), candidate, *(zoneout if zoneout is None else zoneout * 0.5 for zoneout in zoneouts)]


def by_kernels(cell, of_layer, batch_sizes, masks, of_sum):
    return ops.layer_norm_forward.cpu(cell, *of_layer, batch_sizes, *masks, of_sum, True, [0])[:3]


def both_passes(run, cell, of_layer, batch_sizes, masks, of_sum):
    results = run(cell, of_layer, batch_sizes, masks, of_sum)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(result.shape, generator=generator, dtype=torch.float64) for result in results]
    wanted = [t for t in of_layer if t is not None]
    return [*results, *derivatives(results, grads, wanted, [True] * len(wanted), False)]


def assert_same(cell, of_layer, masks, batch_sizes=None, of_sum=False):
    args = cell, of_layer, batch_sizes, masks, of_sum
    with nan_in_fresh_memory():
        ours = both_passes(by_kernels, *args)
    torch.testing.assert_close(ours, both_passes(by_torch, *args), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("of_sum", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_both_passes_give_what_torch_gives(cell, of_sum, instruction_set):
    sizes = torch.tensor([5, 4, 4, 1])
    for hidden, masked, bias in ((5, True, False), (21, True, True), (32, False, True)):
        options = {"of_sum": of_sum, "masked": masked, "bias": bias}
        assert_same(cell, *layer(cell, 15, 5, hidden, **options), of_sum=of_sum)
        assert_same(cell, *layer(cell, 16, 6, hidden, **options), sizes, of_sum)  # a row and a sequence too many
    assert_same(cell, *layer(cell, 4, 2, 9, 1, of_sum), of_sum=of_sum)  # by weights where they lie


@pytest.mark.parametrize("of_sum", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_blocks_give_what_torch_gives(cell, of_sum, instruction_set):
    for rows, sequences, hidden, blocks in ((15, 5, 21, 3), (16, 4, 80, 4), (6, 6, 12, 12), (4, 2, 10, 2)):
        assert_same(cell, *layer(cell, rows, sequences, hidden, of_sum=of_sum, blocks=blocks), of_sum=of_sum)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_every_division_of_the_work_gives_the_same(cell):
    """Threads share the units of one sequence, the sequences of a batch, or both."""
    for sequences, directions, of_sum, blocks in (
        (1, 1, False, 1), (1, 2, True, 1), (70, 1, False, 1), (3, 2, False, 1), (1, 1, False, 5), (3, 1, True, 2),
    ):  # fmt: skip
        of_layer, masks = layer(cell, 12 * sequences, sequences, 230, directions, of_sum, blocks=blocks)
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(both_passes(by_kernels, cell, of_layer, None, masks, of_sum))
        for other in found[1:]:
            torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("of_sum", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_sizes_of_zero(cell, of_sum):
    for rows, sequences, hidden in ((0, 3, 4), (0, 0, 4), (6, 3, 0), (0, 0, 0)):
        assert_same(cell, *layer(cell, rows, sequences, hidden, of_sum=of_sum), of_sum=of_sum)
    assert_same(cell, *layer(cell, 2, 3, 4), torch.tensor([0, 0]))


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_operators_keep_what_torch_asks_of_them(cell):
    """Of the backward pass but what compiles its derivatives, a loop over steps."""
    of_sum = cell == "gru"
    of_layer, masks = layer(cell, 6, 3, 4, of_sum=of_sum)
    args = *of_layer, None, *masks, of_sum
    torch.library.opcheck(ops.layer_norm_forward.cpu, (cell, *args, True, [0]))
    y, h_n, c_n, *saved = (t.detach() for t in ops.layer_norm_forward.cpu(cell, *args, True, [0]))
    grads = y, h_n, None if of_layer[-1] is None else c_n
    checks = "test_schema", "test_autograd_registration", "test_faketensor"
    for wants_w_hh in (True, False):
        given = cell, *grads, *args, y, *saved, wants_w_hh, [0]
        torch.library.opcheck(ops.layer_norm_backward.cpu, given, test_utils=checks)


def test_what_kernels_cannot_have_is_refused():
    of_layer, masks = layer("gru", 6, 3, 4)
    for dtype, message in ((torch.bfloat16, "float32 or float64"), (torch.float16, "float32 or float64")):
        low = [t if t is None else t.to(dtype) for t in of_layer]
        with pytest.raises(RuntimeError, match=message):
            by_kernels("gru", low, None, [None] * 4, False)
    with pytest.raises(RuntimeError, match="candidate goes with gated cells"):
        by_kernels("rnn_tanh", layer("rnn_tanh", 6, 3, 4)[0], None, [None, masks[1], None, None], False)
    with pytest.raises(RuntimeError, match=r"w_hh is \[2, 12, 4\], got \[2, 12, 3\]"):
        by_kernels("gru", [of_layer[0], of_layer[1][:, :, :3], *of_layer[2:]], None, masks, False)
    of_none, of_no_units = layer("gru", 6, 3, 0)
    with pytest.raises(RuntimeError, match=r"w_hh is \[2, 0, 0\], got \[2, 0, 4\]"):  # the columns of no whole blocks
        by_kernels("gru", [of_none[0], of_none[1].new_empty(2, 0, 4), *of_none[2:]], None, of_no_units, False)
    of_layer, masks = layer("lstm", 6, 3, 4)
    of_layer[4] = None
    with pytest.raises(RuntimeError, match="shift_c goes with scale_c"):
        by_kernels("lstm", of_layer, None, masks, False)
