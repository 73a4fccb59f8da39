"""The command line: `python -m benchmarks` kernels, calls, models, resets, cells, report, compare, train, ..."""

import argparse
import io
import os
import sys
from pathlib import Path

import torch

from benchmarks import (
    InputError,
    calls,
    cells,
    compare,
    distributed,
    ensembles,
    fit,
    instructions,
    kernels,
    models,
    quantized,
    record,
    report,
    require,
    resets,
    scaling,
    single_steps,
    steps,
    training_report,
)
from benchmarks.data import VARIABLE, data_folder, names_files
from benchmarks.options import natural, positive
from benchmarks.task import MODULES, Task, add_shared_options
from benchmarks.tasks import TASKS, charlm
from benchmarks.train import measure, rnn_classes, start_runs, train
from benchmarks.training_report import Training

MEASUREMENTS = {
    "kernels": kernels,
    "calls": calls,
    "models": models,
    "resets": resets,
    "ensembles": ensembles,
    "quantized": quantized,
    "cells": cells,
    "single-steps": single_steps,
    "report": report,
    "compare": compare,
    "scaling": scaling,
    "steps": steps,
    "fit": fit,
    "instructions": instructions,
}
DEMO_TEXT = ["--limit", "200000", "--epochs", "3"]  # minutes, not the best model
STOPPED = 130  # what a shell reports for a program that Ctrl-C ended


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    take_any_text()
    try:
        return run_command(sys.argv[1:] if arguments is None else arguments)
    except InputError as error:
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # of a path that was given: unreadable, too long a name, a full disk
        print(f"python -m benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        return STOPPED


def take_any_text() -> None:
    """Letters that a terminal cannot show are shown by their numbers, and bytes that are no text are read as letters of
    no alphabet: no name ends the program after its training. A file has each line when it is printed."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors, line_buffering=True)


def run_command(arguments: list[str]) -> int:
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    if options.command == "demo":
        return demo(options.data, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command in MEASUREMENTS:
        if "out" in options:
            make_folder(options.out, "--out")
        return MEASUREMENTS[options.command].run(options)
    if options.command == "generate":
        return generate(options)
    return train_task(options)


def make_parser() -> argparse.ArgumentParser:
    about = "Speed and accuracy beside torch.nn."
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=about, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)

    training = commands.add_parser("train", help="train with torch.nn and with seqkernels, and compare")
    tasks = training.add_subparsers(dest="task", required=True)
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
            default=record.RESULTS,
            metavar="DIR",
            help="for the plot and the result row (benchmarks/results)",
        )
        task.add_options(options)

    for name, module in MEASUREMENTS.items():
        page = (module.__doc__ or "").partition(": ")[2].strip()
        title = page.partition("\n\n")[0]
        module.add_options(commands.add_parser(name, help=title, description=page, allow_abbrev=False))

    writer = commands.add_parser("generate", help="text from a checkpoint of `train charlm`", allow_abbrev=False)
    writer.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="what --checkpoint wrote")
    writer.add_argument("--module", choices=list(MODULES), default="seqkernels", help="which to run (%(default)s)")
    writer.add_argument("--length", type=positive, default=500, metavar="N", help="characters to write (%(default)s)")
    writer.add_argument("--seed", type=natural, default=0, help="of the draws (%(default)s)")
    charlm.add_generation_options(writer)

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
        return run_command(["train", "charlm", *DEMO_TEXT, *rest])
    try:
        names_files(folder)
    except InputError as error:
        if data is not None:
            raise
        print(f"Demo: train charlm, on text that comes with Python, since {error}")
        return run_command(["train", "charlm", *DEMO_TEXT, *rest])
    print(f"Demo: train names, since {folder} holds its data.")
    return run_command(["train", "names", "--data", str(folder), *rest])


def train_task(options: argparse.Namespace) -> int:
    """Load, train, show. Nothing but the checkpoint is written before the training has ended."""
    if options.threads:
        torch.set_num_threads(options.threads)
    for package in ("tqdm", "rich", "matplotlib"):  # before the training, not after it
        require(package)
    if options.backend and options.module == "torch":
        raise InputError("--backend is of seqkernels; --module torch has none.")
    kind = TASKS[options.task]
    variants = kind.variants(options)
    if options.checkpoint and len(variants) > 1:
        raise InputError(
            f"--checkpoint keeps one training; these options ask for {len(variants)}: {', '.join(variants)}."
        )
    world = distributed.join(distributed.device_of(options.device))
    try:
        return train_variants(kind, variants, world)
    finally:
        distributed.end()


def train_variants(kind: type[Task], variants: dict[str, argparse.Namespace], world: distributed.World) -> int:
    if world.size > 1 and not kind.shards_batches:
        raise InputError(f"torchrun cannot divide the batches of {kind.name}.")
    tasks = {label: kind(variant, world) for label, variant in variants.items()}
    classes = {label: rnn_classes(task.options.module, task.cell) for label, task in tasks.items()}
    options = next(iter(variants.values()))
    make_folder(options.out, "--out")
    if options.checkpoint:
        make_folder(options.checkpoint.parent, "--checkpoint")
    trainings, finished = [], True
    for label, task in tasks.items():
        if world.first:
            print(task_line(task, label))
        runs = start_runs(task, classes[label], label)
        finished = train(task, runs)
        trainings.append(Training(task, [run for run in runs if run.losses]))
        if not finished:
            break
    trainings = [training for training in trainings if training.runs]
    if not finished:
        print(f"Stopped by Ctrl-C{'; the figures cover what was done.' if trainings else '.'}", file=sys.stderr)
    if trainings and world.first:
        show(trainings)
    return 0 if finished else STOPPED


def task_line(task: Task, variant: str) -> str:
    where = f"threads: {torch.get_num_threads()}" if task.device.type == "cpu" else str(task.device)
    processes = f"; processes: {task.world.size}" if task.world.size > 1 else ""
    return f"{task.name}{f' ({variant})' if variant else ''}: {task.description}; {where}{processes}"


def show(trainings: list[Training]) -> None:
    """Print the table, write the plots, append the result rows, and let the task show what its models can do."""
    for training in trainings:
        for run in training.runs:
            measure(training.task, run)
    training_report.print_table(trainings)
    task = trainings[0].task
    out = task.options.out
    plot, rows = (out / name for name in (f"train-{task.name}.png", "train.jsonl"))
    try:
        record.append(rows, *map(training_report.row, trainings))
        training_report.plot(trainings, plot)
        plots = [plot, *trainings[-1].task.finish(trainings[-1].runs, out)]
    except OSError as error:
        raise InputError(f"{out} cannot be written to: {error}.") from error
    for path in plots:
        print(f"Plot: {path}")
    print(f"Row:  {rows}")


def generate(options: argparse.Namespace) -> int:
    """Print text that a trained character model writes."""
    cell = charlm.cell_of(options.checkpoint)
    (rnn_class,) = rnn_classes(options.module, cell).values()
    model, characters = charlm.load_model(options.checkpoint, rnn_class)
    generator = torch.Generator().manual_seed(options.seed)
    print(charlm.generate(model, characters, options.prime, options.length, options.temperature, generator))
    return 0


def make_folder(path: Path, option: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: {path} cannot be made a folder: {error.strerror}.") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"{option}: {path} is a folder that cannot be written to.")


if __name__ == "__main__":
    sys.exit(main())
