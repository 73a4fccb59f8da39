"""Compile what the Triton backend would launch on GPUs that are not here; print what each kernel takes, as JSON lines.

    python tests/triton_compile.py "NVIDIA H200"

A process of its own: under Triton's interpreter, where the tests run, nothing can be compiled.
"""

import concurrent.futures
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from gpus import GPUS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from seqkernels import hardware
from seqkernels.backends.call import Call
from seqkernels.backends.cells import CELLS
from seqkernels.backends.triton import host, layer, norm_host
from seqkernels.backends.triton.tiles import MIN_UNITS, launch_of

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"}
PRECISIONS = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, True), (torch.float32, False))


def launches(gpu: hardware.GPU) -> list[dict]:
    """Every kernel in every tile of `tiles`, at sizes that fill the tile and at odd ones, as the host would launch it.

    The host runs as it does, on a CPU, except that kernels are noted down instead of run."""
    noted = {}

    def note(name: str, grid: tuple[int, ...], arguments: dict, warps: int) -> None:
        types = {key: TYPES[value.dtype] for key, value in arguments.items() if isinstance(value, torch.Tensor)}
        values = {key: value for key, value in arguments.items() if key not in types}
        launch = {"name": name, "types": types, "values": values, "warps": warps}
        # Sizes that are no constants of the kernel make no other kernel.
        constants = {key: value for key, value in values.items() if key not in ("T", "B", "N", "k")}
        noted.setdefault(repr((name, types, constants, warps)), launch)

    layer._run = note
    hardware.gpu_of = lambda device: gpu
    for cell, (dtype, tf32) in itertools.product(CELLS, PRECISIONS):
        if tf32 and gpu.amd:  # never asked for there
            continue
        hardware.tf32 = lambda device, allowed=tf32: allowed
        units = MIN_UNITS
        call = Call(cell, "cuda", dtype, tf32=tf32)
        while launch_of(call._replace(hidden_size=units), gpu).resident:
            if launch_of(call._replace(hidden_size=units - 3), gpu).resident:
                run(cell, dtype, units - 3, 0)
            if dtype != torch.float16:  # two 16-bit dtypes differ in no more than their conversions
                run(cell, dtype, units, 0)
            units *= 2
        for hidden, projected in ((units, 0), (units + 1, 0), *([(units, 24)] if cell == "lstm" else [])):
            run(cell, dtype, hidden, projected)
    # With masks the cell that has most to keep: of the widest tile, and of single steps.
    call = Call("lstm", "cuda", torch.bfloat16, options=("zoneout",))
    widest = max(units for units in (32, 64, 128) if launch_of(call._replace(hidden_size=units), gpu).resident)
    for hidden in (widest, 256):
        run("lstm", torch.bfloat16, hidden, 0, masked=True)
    for hidden, masked in ((64, False), (256, True)):
        run_norms(hidden, masked)
    return list(noted.values())


def run(cell: str, dtype: torch.dtype, hidden: int, projected: int, masked: bool = False) -> None:
    """Both passes: ragged both ways and saving, as the most that a kernel can be asked to do; and padded inference."""
    gates, out = CELLS[cell].gates * hidden, projected or hidden

    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    for directions, batch_sizes in ((2, torch.tensor([2, 1])), *([] if masked else [(1, None)])):
        rows = 3 if batch_sizes is not None else 2
        weight = [zeros(gates, 4), zeros(gates, out), zeros(gates), zeros(gates)]
        weight += [zeros(out, hidden)] if projected else []
        c_0 = zeros(directions, 2, hidden) if cell == "lstm" else None
        arguments = zeros(rows, 4), weight * directions, zeros(directions, 2, out), c_0, batch_sizes
        save = batch_sizes is not None
        if masked:
            of_sequences, of_rows = torch.zeros(directions, 2, hidden), torch.zeros(rows, directions, hidden)
            arguments += of_sequences, of_sequences, of_rows, of_rows
        forward, backward = (host.masked_forward, host.masked_backward) if masked else (host.forward, host.backward)
        y, h_n, c_n, saved = forward(cell, *arguments, save, [])
        if save:
            backward(cell, y, h_n, c_n if cell == "lstm" else None, *arguments, y, saved, True, True, [])


def run_norms(H: int, masked: bool) -> None:
    """Both passes of an LSTM with layer norm: of 64 units resident on Hopper, of 256 single steps with all masks."""
    hardware.tf32 = lambda device: True
    D, B, N, of_gates, of_c = 2, 2, 3, torch.zeros(2, 4 * H), torch.zeros(2, H)
    states, rows = torch.zeros(D, B, H), torch.zeros(N, D, H)
    masks = (states, states, rows, rows) if masked else (None,) * 4
    layer = torch.zeros(N, D, 4 * H), torch.zeros(D, 4 * H, H), of_gates, of_gates, of_c, of_c, states, states
    layer += torch.tensor([2, 1]), *masks, False
    y, h_n, c_n, *saved = norm_host.layer_norm_forward("lstm", *layer, True, [])
    norm_host.layer_norm_backward("lstm", y, h_n, c_n, *layer, y, *saved, True, [])


def compiled(launch: dict, gpu: hardware.GPU) -> dict:
    """What the kernel takes of the GPU: registers a thread, bytes spilled, shared memory; and its tensor core
    instructions."""
    function = layer.kernel_of(launch["name"])
    names = function.arg_names
    signature, constants, aligned = {}, {}, {}
    for place, (name, parameter) in enumerate(zip(names, function.params, strict=True)):
        if name in launch["types"]:
            signature[name] = launch["types"][name]
            aligned[(place,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or launch["values"].get(name, 0) is None:
            signature[name], constants[(place,)] = "constexpr", launch["values"][name]
        else:
            signature[name] = "i32"
    number = gpu.target if gpu.amd else int(gpu.target.removeprefix("sm_"))
    target = GPUTarget("hip" if gpu.amd else "cuda", number, 64 if gpu.amd else 32)
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    kernel = triton.compile(source, target=target, options={"num_warps": launch["warps"], "num_stages": 1})
    taken = {**launch, "shared": kernel.metadata.shared}
    return taken | (of_amdgcn(kernel.asm["amdgcn"]) if gpu.amd else of_cubin(kernel.asm["cubin"]))


def of_amdgcn(text: str) -> dict:
    def number(what: str) -> int:
        return int(re.search(rf"\.{what}:\s+(\d+)", text)[1])

    return {
        "registers": number("vgpr_count"),
        "spilled": number("vgpr_spill_count") + number("sgpr_spill_count") + number("private_segment_fixed_size"),
        "tensor_cores": len(re.findall(r"\bv_s?mfma", text)),
    }


def of_cubin(cubin: bytes) -> dict:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout

        registers, stack, local = re.search(
            r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", dump("--dump-resource-usage")
        ).groups()
        code = dump("--dump-sass")
    return {
        "registers": int(registers),
        "spilled": int(stack) + int(local),
        "tensor_cores": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCMMA)", code)),
    }


def main() -> None:
    gpu = GPUS[sys.argv[1]]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        for taken in pool.map(compiled, found := launches(gpu), [gpu] * len(found), chunksize=8):
            print(json.dumps({**taken, "values": {key: str(value) for key, value in taken["values"].items()}}))


if __name__ == "__main__":
    main()
