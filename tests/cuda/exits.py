"""How processes that used a GPU end: with seqkernels and, for comparison, with torch alone.

Three of 48 processes were once seen to end by SIGABRT ("terminate called without an active exception": a thread that is
joinable when it is destroyed), after all their work was done. The libraries of seqkernels have no std::thread, as
test_build.py reads from their symbols, so that the thread is not theirs; this says whether processes without them end
so as well.
"""

import argparse
import collections
import concurrent.futures
import subprocess
import sys

PROGRAM = """
import torch
from {library} import GRU
rnn = GRU(16, 64, device="{device}")
y, _ = rnn(torch.randn(5, 3, 16, device="{device}"))
y.sum().backward()
assert rnn.weight_hh_l0.grad.isfinite().all()
"""


def exit_code(library: str, device: str) -> int:
    program = PROGRAM.format(library=library, device=device)
    return subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=16, metavar="N", help="of each kind (%(default)s)")
    parser.add_argument("--at-once", type=int, default=8, metavar="N", help="(%(default)s)")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    failed = False
    with concurrent.futures.ThreadPoolExecutor(options.at_once) as pool:
        for library in ("torch.nn", "seqkernels"):
            codes = collections.Counter(pool.map(exit_code, [library] * options.processes, [options.device] * 1000))
            print(f"{library}: exit codes {dict(codes)}", flush=True)
            failed |= set(codes) != {0}
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
