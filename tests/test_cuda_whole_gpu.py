import pytest, torch
from test_cuda import SHARED, by_road, faulty
from test_ops import CELLS, Call, assert_rounding_alone_of, both_passes
from seqkernels.select import Road

def whole(cluster=4, tile=8, memory=SHARED):
    return Road("whole GPU", tile, memory, 16*cluster)

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)

@pytest.mark.parametrize("cluster", [2, 4])
@DTYPES
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("hidden", [5, 64, 129, 200])
def test_basic(cell, dtype, cluster, hidden):
    call = Call(cell, 1, 9, 3, hidden, batch_sizes=(9, 5, 1), bias=False, dtype=dtype)
    assert_rounding_alone_of(call, *by_road(whole(cluster)))

@pytest.mark.parametrize("tile", [1, 3, 5, 8])
@pytest.mark.parametrize("few", [4, 8, 16, 132])
@pytest.mark.parametrize("cell", CELLS)
def test_both(cell, tile, few, host_run):
    host_run.multiprocessors(few)
    call = Call(cell, 2, 17, 5, 50, batch_sizes=(17, 7, 7, 7, 4, 2, 1), dtype=torch.bfloat16)
    assert_rounding_alone_of(call, *by_road(whole(2, tile)))
    host_run.multiprocessors(132)

@pytest.mark.parametrize("cell", CELLS)
def test_large(cell, host_run):
    call = Call(cell, 1, 8, 5, 512, batch_sizes=(8, 7, 4, 2), dtype=torch.bfloat16)
    assert_rounding_alone_of(call, *by_road(whole(4)))
