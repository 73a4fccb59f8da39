"""The training loop that every task shares: each module trains its own copy of one model, in turn, epoch by epoch."""

import contextlib
import copy
import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks import InputError, checkpoint, distributed, profiling, record, require
from benchmarks.task import MODULES, Batch, Position, Run, Task, epoch_seed, trainable

PROFILED_BATCHES = 16
CLOSE_STEPS = 200  # rounding errors grow with every step; over the first ones, two right modules still agree closely


def rnn_classes(choice: str, cell: str) -> dict[str, type[nn.Module]]:
    """The classes to compare, by the label they have in tables: nn.GRU, seqkernels.GRU."""
    classes = {}
    for name, module in MODULES.items():
        if choice in (name, "both"):
            try:
                classes[f"{module.removeprefix('torch.')}.{cell}"] = getattr(importlib.import_module(module), cell)
            except ImportError as error:
                raise InputError(
                    f"{module} cannot be imported ({error}): `pip install --no-build-isolation -e .` installs it, "
                    "--module torch does without."
                ) from error
    return classes


def start_runs(task: Task, classes: dict[str, type[nn.Module]], variant: str = "") -> list[Run]:
    """A run for each class, all from the weights of one model of torch's own module."""
    torch.manual_seed(task.options.seed)
    weights = task.model(getattr(nn, task.cell)).state_dict()
    runs = []
    for label, rnn_class in classes.items():
        model = task.model(rnn_class)
        model.load_state_dict(weights)
        model.to(task.device, task.dtype)
        for module in model.modules():
            if hasattr(module, "backend"):  # one of ours
                module.backend = task.options.backend
        runs.append(Run(task.named(label), model, task.optimizer(model), variant, as_called(task, model)))
    return runs


def is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("seqkernels.")


def as_called(task: Task, model: nn.Module) -> nn.Module:
    """The model as its steps call it."""
    called = cast(nn.Module, torch.compile(model)) if task.options.compile else model
    if task.world.size > 1:
        called = distributed.several_processes(called)
    return distributed.several_devices(called, task.device) if getattr(task.options, "data_parallel", False) else called


def train(task: Task, runs: list[Run]) -> bool:
    """Train all runs; False where Ctrl-C ended it early.

    The modules alternate, an epoch each, so that whatever else the machine does meanwhile falls on all of them.
    """
    path = task.options.checkpoint
    with checkpoint.locked(path) if path and task.world.first else contextlib.nullcontext():
        return _train(task, runs)


def _train(task: Task, runs: list[Run]) -> bool:
    position, Lines.last = Position(), time.monotonic()
    try:
        for run in runs:
            warm_up(task, run)
        if task.options.checkpoint and task.options.checkpoint.exists():
            position = restore(task, runs)
        while position.epoch < task.options.epochs:
            train_epoch(task, runs[position.turn], position, partial(save, task, runs, position))
            task.after_epoch(runs[position.turn], position.epoch)
            position.next(len(runs))
            save(task, runs, position)
    except KeyboardInterrupt:
        return False
    return True


def warm_up(task: Task, run: Run) -> None:
    """Forward and backward once, untimed: no epoch pays for what a first call does, and the plan is known."""
    inputs_seen = []
    hook = run.rnn.register_forward_pre_hook(lambda _, inputs: inputs_seen.append(inputs))
    batch = next(iter(task.batches(0)))
    try:
        try_step(task, run, batch, run.model)
        hook.remove()
        if run.called is not run.model:
            try_step(task, run, batch, run.called)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"{run.label} cannot do what the options ask: {str(error).splitlines()[0]}.") from error
    if inputs_seen and is_ours(run.rnn):
        run.plan = str(importlib.import_module("seqkernels").explain(run.rnn, *inputs_seen[0]))


def try_step(task: Task, run: Run, batch: Batch, model: nn.Module) -> None:
    """Forward and backward of one batch, without a step of the optimizer."""
    compute_loss(task, model, batch, None)[0].backward()
    run.model.zero_grad()


def compute_loss(task: Task, model: nn.Module, batch: Batch, state: Any) -> tuple[Tensor, Any]:
    with torch.autocast(task.device.type, torch.bfloat16, enabled=task.options.amp):
        return task.loss(model, batch.input, batch.target, state)


def take_step(task: Task, run: Run, batch: Batch, state: Any) -> tuple[Tensor, Any]:
    """One step of the optimizer; returns the weighted loss before it, and the state for the next batch."""
    loss, state = compute_loss(task, run.called, batch, state)
    loss = loss * batch.weight
    run.optimizer.zero_grad()
    loss.backward()
    if task.options.clip:
        nn.utils.clip_grad_norm_(trainable(run.model), task.options.clip)
    run.optimizer.step()
    return loss.detach(), state


def train_epoch(task: Task, run: Run, position: Position, save: Callable[[], None]) -> None:
    """One pass over the data, or what is left of it at `position`: append the loss of each step, and the seconds."""
    if position.step == 0:
        torch.manual_seed(epoch_seed(task.options, position.epoch))  # the same dropout for every module
        run.epoch_steps = 0
    run.model.train()
    batches = iter(task.batches(position.epoch))
    with progress_bar(task, f"{run.label} epoch {position.epoch + 1}/{task.options.epochs}") as bar:
        for batch in itertools.islice(batches, position.step):  # that were trained on before the checkpoint
            bar.update(batch.target.numel() * task.world.size)
        start = time.perf_counter()
        for batch in batches:
            loss, position.state = take_step(task, run, batch, position.state)
            run.losses.append(task.world.mean(loss))
            run.epoch_steps += 1
            position.step += 1
            bar.update(batch.target.numel() * task.world.size)
            if not bar.disable and position.step % 20 == 0:
                bar.set_postfix_str(f"loss {run.losses[-1].item():.3f}", refresh=False)
            if task.options.checkpoint and position.step % task.options.save_every == 0:
                synchronize(task.device)
                position.seconds += time.perf_counter() - start
                save()
                start = time.perf_counter()
        synchronize(task.device)
        run.epoch_seconds.append(position.seconds + time.perf_counter() - start)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Lines:
    """stderr as tqdm's file where it is no terminal: of all bars of a training, a line now and then."""

    seconds = 10.0  # between two lines, and before the first
    last = 0.0  # when there was one

    def write(self, text: str) -> None:
        if text.strip() and time.monotonic() >= Lines.last + self.seconds:
            Lines.last = time.monotonic()
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def progress_bar(task: Task, label: str) -> Any:
    """Loss and samples a second of one epoch, by the first process; where stderr is no terminal, as `Lines`."""
    shared = {"desc": label, "unit": f" {task.unit}", "unit_scale": True, "leave": False}
    if not sys.stderr.isatty():
        as_line = "{desc}: {percentage:.0f}% of {total_fmt}{unit}, {rate_fmt}{postfix}"
        shared |= {"file": Lines(), "mininterval": Lines.seconds, "bar_format": as_line}
    return require("tqdm").tqdm(total=task.samples, disable=not task.world.first, **shared)


def save(task: Task, runs: list[Run], position: Position) -> None:
    """Write the checkpoint, if one is asked for."""
    if task.options.checkpoint and task.world.first:
        content = {
            "task": task.name,
            "options": record.options_of(task.options),
            "facts": task.facts(),
            "runs": [run.saved() for run in runs],
            "position": asdict(position),
            "random": checkpoint.random_state(task.device),
        }
        checkpoint.save(task.options.checkpoint, content)


def restore(task: Task, runs: list[Run]) -> Position:
    """Continue where the checkpoint was written."""
    path = task.options.checkpoint
    content = checkpoint.load(path)
    checkpoint.check(path, content, task.name, record.options_of(task.options))
    if content["facts"] != task.facts() or [saved["label"] for saved in content["runs"]] != [run.label for run in runs]:
        raise InputError(f"{path} was begun with other data or modules: name another file.")
    for run, saved in zip(runs, content["runs"], strict=True):
        run.restore(saved)
    position = Position(**content["position"])
    position.state = to_device(position.state, task.device)
    checkpoint.set_random_state(content["random"], task.device)
    if task.world.first:
        print(
            f"Continuing {path} at epoch {position.epoch + 1}, step {position.step + 1} of {runs[position.turn].label}."
        )
    return position


def to_device(state: Any, device: torch.device) -> Any:
    """A carried state: None, a tensor or a tuple of tensors."""
    if isinstance(state, tuple):
        return tuple(part.to(device) for part in state)
    return state if state is None else state.to(device)


def measure(task: Task, run: Run) -> None:
    """After the training: the metric, and what a step spends in the recurrent layer and takes of memory."""
    run.model.eval()
    with torch.no_grad():
        run.metric = task.evaluate(run.model)
        if task.options.quantized and is_ours(run.rnn):
            run.quantized_metric = task.evaluate(quantized(run.model))
    run.model.train()
    if not task.options.compile:  # hooks and counters see only what runs as it is written
        profile(task, run)
    run.model.eval()


def quantized(model: nn.Module) -> nn.Module:
    """A copy with its recurrent layers quantized to int8.

    Raises:
        InputError: some are left.
    """
    model = copy.deepcopy(model)
    report = importlib.import_module("seqkernels").quantize_(model)
    if report.left:
        raise InputError(f"--quantized: {report.left[0]}.")
    return model


def profile(task: Task, run: Run) -> None:
    """On a copy, which may be trained on."""
    model = copy.deepcopy(run.model)
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    trial = Run(run.label, model, task.optimizer(model))

    def steps() -> Iterator[Callable[[], Any]]:
        for batch in itertools.islice(task.batches(0), PROFILED_BATCHES):
            yield partial(take_step, task, trial, batch, None)

    run.peak_memory = max(profiling.peak_memory(step, task.device) for step in steps())
    run.layer_share = profiling.layer_share(steps(), trial.rnn, task.device)


def largest_gap(runs: list[Run], steps: int | None = None, window: int = 1) -> float:
    """The largest relative difference between two runs' losses of the same step, over the first `steps` or all.

    With a window, between the means of so many steps: a single batch that is known by heart has hardly any loss left
    to compare.
    """
    steps = min([len(run.losses) for run in runs] + ([steps] if steps else []))
    first, second = (run.curve[:steps].unfold(0, min(window, steps), 1).mean(dim=1) for run in runs)
    return ((second - first).abs() / first.abs()).max().item()
