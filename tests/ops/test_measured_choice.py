"""The choice beside what was measured: every row of benchmarks/results that a GPU of tests/support/gpus.py gave."""

import collections
import json
from pathlib import Path

import pytest
import torch
from gpus import GPUS

from seqkernels.backends.call import Call, class_of_steps
from seqkernels.backends.cuda.launch import cheapest, path_names
from seqkernels.hardware import Machine
from seqkernels.select import plan

RESULTS = Path(__file__).parents[2] / "benchmarks/results"
PASSES = ("forward", "backward")
MACHINE = Machine(cuda_missing="", triton=True, cudnn=91900)


def rows_of(file: str) -> list[dict]:
    rows = map(json.loads, (RESULTS / file).open(encoding="utf-8"))
    return [row for row in rows if row["gpu"] in GPUS and row.get("right", True)]


def call_of(row: dict, **more) -> Call:
    return Call(
        cell={"RNN": "rnn_tanh"}.get(row["cell"], row["cell"].lower()),
        device_type="cuda",
        dtype=getattr(torch, row["dtype"].replace("tf32", "float32")),
        hidden_size=row["H"],
        tf32=row["dtype"] == "tf32",
        sequences=row["B"],
        **more,
    )


def grouped(rows: list[dict], names: tuple[str, ...]) -> dict[tuple, list[dict]]:
    groups = collections.defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups


MODULES = grouped(rows_of("kernels.jsonl"), ("gpu", "problem", "cell", "dtype", "layout", "mode"))
STEPS = grouped(rows_of("steps.jsonl"), ("gpu", "cell", "dtype", "H", "B", "directions", "pass"))

# cuDNN is chosen, and ours were faster. So short that the host decides, which took 0.4 ms for one call and 0.14 for the
# next: the same layers in TF32, whose steps differ as little as these, were slower than cuDNN's.
HOST_DECIDED = {
    "NVIDIA H200 names LSTM float32 padded train",
    "NVIDIA H200 news LSTM float32 padded train",
    "NVIDIA H200 big LSTM float16 padded train",
    "NVIDIA H200 big LSTM float16 padded infer",
}

# cuDNN takes three quarters of what our best one does, and runs.
FOR_CUDNN = "gru", "tf32", 128, 64, 1, "backward"


@pytest.mark.parametrize("case", MODULES, ids=" ".join)
def test_no_module_is_slower_than_what_was_measured_best(case):
    row, gpu = MODULES[case][0], GPUS[case[0]]
    sizes = {"layers": row["layers"], "input_size": row["I"], "steps": class_of_steps(row["T"])}
    call = call_of(row, **sizes, layout=row["layout"], training=row["mode"] == "train")
    times = {backend_of(row): row["median_ms"] for row in MODULES[case] if "median_ms" in row}
    chosen = plan(call, MACHINE._replace(gpu=gpu)).backend
    assert chosen in times, f"{chosen} was not measured"
    if " ".join(case) in HOST_DECIDED:
        assert chosen == "cudnn" and times["cuda"] < 0.98 * times["cudnn"], "this is no exception any more"
    else:
        assert 0.98 * times[chosen] <= min(times.values()), times


def backend_of(row: dict) -> str:
    """Who ran: torch.nn is cuDNN."""
    return "cudnn" if row["contender"] == "torch.nn" else row["plan"].partition(":")[0]


@pytest.mark.parametrize("case", STEPS, ids=lambda case: " ".join(map(str, case)))
def test_no_path_is_chosen_that_takes_a_tenth_longer_than_the_best(case):
    times = {(row["path"], row["units"]): row["us"] for row in STEPS[case] if row["contender"] == "cuda"}
    launch, _ = cheapest(call_of(STEPS[case][0]), GPUS[case[0]], case[-1] == "backward")
    slower = times[path_names()[launch.path], launch.units] / min(times.values())
    assert slower <= (1.14 if case[1:] == FOR_CUDNN else 1.1)


@pytest.mark.parametrize("case", sorted({case[:-1] for case in STEPS}), ids=lambda case: " ".join(map(str, case)))
def test_long_sequences_go_to_the_backend_whose_steps_are_quickest(case):
    """In training, where the steps alone decide."""
    gpu = GPUS[case[0]]
    rows = [*STEPS[(*case, "forward")], *STEPS[(*case, "backward")]]
    fastest = {
        name: sum(min(row["us"] for row in rows if (row["contender"], row["pass"]) == (name, way)) for way in PASSES)
        for name in ("cuda", "cudnn")
    }
    call = call_of(rows[0], steps=class_of_steps(65535), training=True)
    chosen = plan(call, MACHINE._replace(gpu=gpu)).backend
    assert 0.98 * fastest[chosen] <= min(fastest.values()), fastest


def test_what_is_no_row():
    """Nothing above says anything of these: who measures them takes them off the list."""
    modules, steps = (dict(enumerate(zip(*found, strict=True))) for found in (MODULES, STEPS))
    assert set(modules[2]) == {"GRU", "LSTM"} and set(steps[1]) == {"gru", "lstm"}  # no RNN, no LiGRU
    assert "float64" not in {*modules[3], *steps[2]}
    assert "float16" not in steps[2]  # whole modules alone, of H = 256, 512 and 768
    assert set(steps[3]) == {128, 256} and set(steps[5]) == {1}  # no wider layer, one direction
    contenders = {row["contender"] for group in STEPS.values() for row in group}
    assert contenders == {"cuda", "cudnn"}  # no Triton
    assert {case[0] for case in (*MODULES, *STEPS)} == {"NVIDIA H200"}
