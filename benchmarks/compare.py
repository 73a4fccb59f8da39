"""`python -m benchmarks compare REV`: seqkernels as it stands in the working tree beside a git revision of it."""

import argparse
import contextlib
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import InputError, kernels, problems, record
from benchmarks.cases import Case, add_case_options, cases_of
from benchmarks.contenders import Unavailable
from benchmarks.options import round_count
from benchmarks.timing import Worker, paired, speedup, stopping

NOW = "the working tree"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("revision", metavar="REV", help="what git knows: HEAD, main, v1.0, a1b2c3d, ...")
    add_case_options(parser)
    parser.add_argument("--rounds", type=round_count, default=51, metavar="N", help="of both sides (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Build the revision in a worktree of its own, time both in turn, and say what moved beyond the noise; 1 if a
    result was wrong."""
    commit = record.git("rev-parse", "--verify", "--quiet", f"{options.revision}^{{commit}}")
    if commit is None:
        raise InputError(f"git knows no revision {options.revision} here.")
    moved = {"faster": 0, "slower": 0, "wrong": 0}
    with worktree(commit) as root:
        print(f"Building {options.revision} ({commit[:7]}) ...", flush=True)
        build(root, options.revision)
        print(f"Building {NOW} ...", flush=True)
        build(record.ROOT, NOW)
        cases = cases_of(options, problems.QUICK)
        for threads, group in itertools.groupby(cases, key=lambda case: case.threads):
            workers = [
                Worker("seqkernels", threads, folder, label)
                for label, folder in ((NOW, record.ROOT), (options.revision, root))
            ]
            with stopping(workers):
                for case in group:
                    for verdict in compare(case, workers, options.rounds):
                        moved[verdict] += 1
    print(f"{moved['faster']} faster, {moved['slower']} slower than {options.revision}, beyond the noise.")
    return int(moved["wrong"] > 0)


@contextlib.contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """A checkout of a commit that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="seqkernels-") as folder:
        root = Path(folder) / "revision"
        if record.git("worktree", "add", "--detach", str(root), commit) is None:
            raise InputError(f"git cannot check out {commit} into {root}.")
        try:
            yield root
        finally:
            record.git("worktree", "remove", "--force", str(root))


def build(root: Path, name: str) -> None:
    """Compile the native part in place, as `pip install -e` does."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise InputError(f"{name} does not build: {''.join(last)}")


def compare(case: Case, workers: list[Worker], rounds: int) -> list[str]:
    """Check and time one case, and print it; "faster" or "slower" if it moved, "wrong" if a result is."""
    rows = {}
    try:
        for worker in workers:
            worker.request(case)
            rows[f"seqkernels {worker.name}"] = {"contender": worker.name, "errors": worker.request("errors")}
    except Unavailable as reason:
        print(f"{kernels.title(case)} left out: {reason}", flush=True)
        return []
    if not kernels.gate(rows, case):
        print(f"{kernels.title(case)} WRONG: relative errors {kernels.said_errors(list(rows.values()))}", flush=True)
        return ["wrong"]
    now, before = paired(workers, rounds).values()
    row = speedup(before, now)
    said = kernels.verdict(row)
    change = [] if said.startswith("=") else ["faster" if row["speedup"] > 1 else "slower"]
    spread = f"{row['speedup_low']:.2f}..{row['speedup_high']:.2f}"
    print(f"{kernels.title(case)} {said:8}{spread:12}", *change, flush=True)
    return change
