"""The command line: `python -m benchmarks train TASK`, `kernels` and `demo`."""

import argparse
import sys
from pathlib import Path

import torch

from benchmarks import InputError, kernels, record, report, require
from benchmarks.data import VARIABLE, data_folder, names_files
from benchmarks.tasks import TASKS
from benchmarks.train import Run, Task, add_shared_options, evaluate, rnn_classes, start_runs, train

STOPPED = 130  # what a shell reports for a program that Ctrl-C ended


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    try:
        return run_command(sys.argv[1:] if arguments is None else arguments)
    except InputError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        return STOPPED


def run_command(arguments: list[str]) -> int:
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "demo":
        return demo(options.data, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "kernels":
        make_folder(options.out)
        return kernels.run(options)
    return train_task(options)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    tasks = commands.add_parser("train", help="train with torch.nn and with seqkernels, and compare")
    tasks = tasks.add_subparsers(dest="task", required=True)
    for name, task in TASKS.items():
        page = sys.modules[task.__module__].__doc__ or ""
        options = tasks.add_parser(
            name,
            help=page.partition("\n")[0],
            description=page,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        add_shared_options(options)
        options.add_argument(
            "--out",
            type=Path,
            default=Path("build/benchmarks"),
            metavar="DIR",
            help="for the plot and the result row (%(default)s)",
        )
        task.add_options(options)

    page = (kernels.__doc__ or "").partition(": ")[2].strip()
    kernels.add_options(commands.add_parser("kernels", help=page, description=page, allow_abbrev=False))

    demo = commands.add_parser(
        "demo",
        help="`train names` where its data is at hand, else `train charlm`",
        epilog="Every other option is passed on to the task.",
        allow_abbrev=False,
    )
    demo.add_argument("--data", type=Path, metavar="DIR", help=f"folder with the names data (default: {VARIABLE})")
    return parser


def demo(data: Path | None, rest: list[str]) -> int:
    """Train the names task on a folder that the user gave, else a task whose data every Python carries."""
    folder = data_folder(data)
    if folder is None:
        print(f"Demo: train charlm, on text that comes with Python; {VARIABLE}=DIR would name a folder of real names.")
        return run_command(["train", "charlm", *rest])
    try:
        names_files(folder)
    except InputError as error:
        if data is not None:
            raise
        print(f"Demo: train charlm, on text that comes with Python, since {error}")
        return run_command(["train", "charlm", *rest])
    print(f"Demo: train names, since {folder} holds its data.")
    return run_command(["train", "names", "--data", str(folder), *rest])


def train_task(options: argparse.Namespace) -> int:
    """Load, train, show. Nothing is written before the training has ended."""
    if options.threads:
        torch.set_num_threads(options.threads)
    for package in ("tqdm", "rich", "matplotlib"):  # before the training, not after it
        require(package)
    classes = rnn_classes(options.module, TASKS[options.task].cell)
    task = TASKS[options.task](options)
    make_folder(options.out)
    print(f"{task.name}: {task.description}; threads: {torch.get_num_threads()}")
    runs = start_runs(task, classes)
    finished = train(task, runs)
    runs = [run for run in runs if run.losses]
    if not finished:
        print(f"Stopped by Ctrl-C{'; the figures cover what was done.' if runs else '.'}", file=sys.stderr)
    if runs:
        show(task, runs)
    return 0 if finished else STOPPED


def show(task: Task, runs: list[Run]) -> None:
    """Print the table, write the plot and append the result row."""
    for run in runs:
        evaluate(task, run)
    report.print_table(task, runs)
    plot, rows = (task.options.out / name for name in (f"train-{task.name}.png", "train.jsonl"))
    try:
        report.plot(task, runs, plot)
        record.append(rows, report.row(task, runs))
    except OSError as error:
        raise InputError(f"{task.options.out} cannot be written to: {error}.") from error
    print(f"Plot: {plot}\nRow:  {rows}")


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path} cannot be made a folder: {error.strerror}.") from error


if __name__ == "__main__":
    sys.exit(main())
