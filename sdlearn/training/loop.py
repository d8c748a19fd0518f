"""One training loop for every stage: resumable, averaged, mixed precision where it pays.

A stage is a `Recipe`: which parameters learn, how a batch is made, what the loss is. `fit` is a
generator over steps, so that progress bars, sheets and budgets belong to whoever iterates.
"""

import os
import pickle
import re
import time
from collections.abc import Iterator
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Protocol

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import broadcast, broadcast_object_list
from torch import nn

from ..attention import eager_attention
from ..data.world import world_name


class Recipe(Protocol):
    """What a stage of training has to say for itself."""

    name: str                   # of the stage, and of its files
    model: nn.Module            # what learns
    batch_size: int
    learning_rate: float
    warmup: int                 # steps
    decay_share: float          # share of the budget, at its end, in which the learning rate falls to zero
    # May have as well: weight_decay, 0.01 otherwise; world or worlds, whose scenes it learns from.

    def batch(self, generator: torch.Generator) -> tuple: ...
    def loss(self, model: nn.Module, *batch) -> tuple[torch.Tensor, dict[str, float]]: ...
    def report(self, averaged: nn.Module, folder: Path, step: int) -> dict[str, float]: ...


@dataclass
class Progress:
    """Where a run stands. `seconds` are of training, pauses and earlier sessions told apart."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    loss: float = float("nan")              # running mean
    precisions: list[str] = field(default_factory=list)     # that it has been trained in: "fp32", "bf16" ...
    worlds: list[str] = field(default_factory=list)         # whose scenes it has been trained on: "core", "hard" ...
    history: list[dict[str, float]] = field(default_factory=list)


class EMA:
    """Exponential moving average of a model's parameters; short at first, then longer (up to `decay`)."""

    def __init__(self, model: nn.Module, decay: float = 0.9995):
        self.model, self.decay = deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int):
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - keep)


def save_state(file: Path, state: dict):
    """Write beside and rename: a kill at any moment leaves the old file or the new one, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    torch.save(state, beside)
    os.replace(beside, file)


def load_state(file: Path) -> dict | None:
    """The newest state of a run, or None when there is none; plain tensors and numbers only."""
    if not file.exists():
        return None
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise OSError(f"the state '{file}' is damaged and cannot be gone on with: delete it to train that stage "
                      "anew, or start from shipped weights with --start") from error


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor]):
    """Load weights strictly, but for the auxiliary head's, which either side may lack: it serves training alone.

    `scaffold` is what the head was called in older state files.
    """
    own = module.state_dict()
    weights = {re.sub(r"^scaffold\.", "auxiliary_head.", name): value for name, value in weights.items()}
    head = {name for name in {*own, *weights} if name.startswith("auxiliary_head.")}
    module.load_state_dict({name: own[name] for name in head & own.keys()} |
                           {name: value for name, value in weights.items() if name not in head or name in own})


class Threads:
    """How many CPU threads to compute with, tried out again and again: all of them, or one.

    Alone on a machine, all are fastest. Beside other work the threads of one operation wait for whichever of
    them has lost its core, and one thread alone can be many times faster. So every `seconds` a few steps are
    taken with the other number, and whichever is faster stays.
    """

    def __init__(self, seconds: float = 60.0, tries: int = 4):
        self.most = self.now = torch.get_num_threads()
        self.seconds, self.tries = seconds, tries
        self.taken = {self.most: [], 1: []}                     # seconds of the latest steps, by number of threads
        self.next_trial, self.on_trial = seconds, False

    def after(self, clock: float, seconds: float):
        """Tell of a step that has just taken so many seconds at `clock`, and set the number for the next one."""
        mine, other = self.taken[self.now], self.taken[1 if self.now > 1 else self.most]
        mine.append(seconds)
        del mine[:-self.tries]
        if self.most == 1:
            return
        if self.on_trial:
            lost = other and seconds > 2 * median(other)        # so slow that no further step is needed
            if lost or len(mine) == self.tries:
                self.on_trial, self.next_trial = False, clock + self.seconds
                if median(mine) > median(other):
                    self._switch()
        elif clock >= self.next_trial and len(mine) == self.tries:
            other.clear()
            self.on_trial = True
            self._switch()

    def _switch(self):
        self.now = 1 if self.now > 1 else self.most
        torch.set_num_threads(self.now)


def choose_precision(recipe: Recipe, device: torch.device) -> str:
    """"bf16" on a GPU that has it; on a CPU with bf16 instructions whichever of the two is faster in a
    short trial; "no" (fp32) everywhere else, where bf16 would be emulated and a hundred times slower."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    if not torch.cpu._is_avx512_bf16_supported():
        return "no"
    generator = torch.Generator().manual_seed(0)
    batch = recipe.batch(generator)
    seconds = {}
    for precision in ("no", "bf16"):
        for _ in range(3):                                      # the last one counts
            start = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss, _ = recipe.loss(recipe.model, *batch)
            loss.backward()
            recipe.model.zero_grad()
            seconds[precision] = time.perf_counter() - start
    return min(seconds, key=seconds.get)


class LossModule(nn.Module):
    """A recipe's loss as the forward of a module: what several processes can share, whichever part the loss calls."""

    def __init__(self, recipe: Recipe, model: nn.Module):
        super().__init__()
        self.model, self.recipe = model, recipe

    def forward(self, *batch):
        return self.recipe.loss(self.model, *batch)


def broadcast_from_main(value: float, accelerator: Accelerator) -> float:
    """The main process's number in all processes: clocks differ, and what they decide must not."""
    if accelerator.num_processes == 1:
        return value
    return float(broadcast(torch.tensor(value, dtype=torch.float64, device=accelerator.device)))


def fit(recipe: Recipe, folder: Path, *, minutes: float | None = None, precision: str | None = None,
        compiled: bool | None = None, save_seconds: float = 45.0, report_minutes: float = 10.0, seed: int = 0,
        anneal: bool = False, span: tuple[float, float] | None = None) -> Iterator[tuple[Progress, dict]]:
    """Train for `minutes` of this process's time, from the newest state in `folder`; yields `Progress`.

    `precision` is "no", "fp16" or "bf16" (chosen by `choose_precision` when None); `compiled` is
    True on a GPU unless said otherwise (on a CPU it took minutes and made a step no faster). The state is written every
    `save_seconds`, so a kill loses less than a minute; a report (figures and a sheet) is made every
    `report_minutes` and at the end. Where several processes train together (torchrun), each makes its own
    batches, and the main one writes states and reports. `anneal`: the learning rate falls to zero over the whole
    call, and the average is of this call alone: before shipping a stage whose rate otherwise stays.

    `span`, in place of `minutes`: seconds of training, of all calls together, between which a budget lies. The call
    goes on to its end, reports not counted, and the learning rate falls as over the whole of it, wherever in it the
    call begins: a budget that was cut is gone on with as if it had not been.
    """
    if (minutes is None) == (span is None):
        raise TypeError("give fit either minutes or a span")
    threads = torch.get_num_threads()
    try:
        yield from _fit(recipe, folder, minutes, precision, compiled, save_seconds, report_minutes, seed, anneal, span)
    finally:
        torch.set_num_threads(threads)                          # `Threads` may have left another number


def _fit(recipe, folder, minutes, precision, compiled, save_seconds, report_minutes, seed, anneal, span):
    if precision is None:                                       # the main process chooses, for all of them
        [precision] = broadcast_object_list([choose_precision(recipe, PartialState().device)])
    AcceleratorState._reset_state()                             # the stage before may have run in another precision
    accelerator = Accelerator(mixed_precision=precision)
    device, main = accelerator.device, accelerator.is_main_process
    raw = recipe.model.to(device)
    decay = getattr(recipe, "weight_decay", 0.01)
    optimiser = torch.optim.AdamW(raw.parameters(), lr=recipe.learning_rate, weight_decay=decay, betas=(0.9, 0.99),
                                  fused=True)                  # one pass over the weights: a fifth of the time
    average, progress = EMA(raw), Progress()
    file = folder / f"{recipe.name}-state.pt"
    if (state := load_state(file)) is not None:
        load_weights(raw, state["model"])
        load_weights(average.model, state["average"])
        if "optimiser" in state:                                # none when a run starts from shipped weights
            optimiser.load_state_dict(state["optimiser"])
            for group in optimiser.param_groups:
                group["fused"] = True                           # states of before do not say so
        progress = Progress(**state["progress"])
    if (name := "fp32" if precision == "no" else precision) not in progress.precisions:
        progress.precisions.append(name)
    worlds = getattr(recipe, "worlds", None) or [world for world in [getattr(recipe, "world", None)] if world]
    progress.worlds += [name for name in map(world_name, worlds) if name not in progress.worlds]
    warmed = state is not None and "optimiser" in state
    first = 0 if warmed else progress.step                      # an optimiser that knows nothing yet is warmed up
    averaged, decay_share = (progress.step, 1.0) if anneal else (0, recipe.decay_share)
    if anneal:
        average = EMA(raw)
    generator = torch.Generator().manual_seed(hash((seed, progress.step, accelerator.process_index)) % 2**63)
    if compiled if compiled is not None else device.type == "cuda":
        raw.compile()
    model, optimiser = accelerator.prepare(LossModule(recipe, raw), optimiser)

    def save():
        if main:
            save_state(file, {"model": raw.state_dict(), "average": average.model.state_dict(),
                              "optimiser": optimiser.state_dict(), "progress": vars(progress)})

    threads = Threads() if device.type == "cpu" else None
    networks = [part for part in vars(recipe).values() if isinstance(part, nn.Module)]
    attention = partial(eager_attention, *networks) if device.type == "cpu" else nullcontext
    start = saved = reported = clock = time.perf_counter()

    def left() -> float:
        if span:
            return (span[1] - progress.seconds) / (span[1] - span[0])
        return 1.0 - (clock - start) / (60 * minutes)

    while (share := broadcast_from_main(left(), accelerator)) > 0:           # of the budget
        rate = min(1.0, (progress.step - first + 1) / recipe.warmup)
        if decay_share:
            rate *= min(1.0, share / decay_share)
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * rate
        batch = [part.to(device) if torch.is_tensor(part) else part for part in recipe.batch(generator)]
        with attention(), accelerator.autocast():
            loss, parts = model(*batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        value = float(loss.detach())
        if value != value:
            raise FloatingPointError(f"the loss of '{recipe.name}' became NaN at step {progress.step}; the state of "
                                     "up to a minute before is kept: go on with a lower learning rate")
        progress.step += 1
        progress.samples += len(batch[0]) * accelerator.num_processes
        unknown = progress.loss != progress.loss                # NaN: nothing yet, or shipped weights to start from
        progress.loss = value if unknown else progress.loss + (value - progress.loss) * 0.01
        average.update(raw, progress.step - averaged)
        now = time.perf_counter()
        progress.seconds += now - clock
        if threads:
            threads.after(now - start, now - clock)
        clock = now
        yield progress, parts
        if clock - saved > save_seconds:
            save()
            saved = clock
        if clock - reported > 60 * report_minutes and main:
            progress.history.append({"step": progress.step, "samples": progress.samples, "hours":
                                     progress.seconds / 3600, "loss": progress.loss,
                                     **recipe.report(average.model, folder, progress.step)})
            clock = reported = time.perf_counter()              # a report does not count as training
    if main:
        progress.history.append({"step": progress.step, "samples": progress.samples, "hours": progress.seconds / 3600,
                                 "loss": progress.loss, **recipe.report(average.model, folder, progress.step)})
    save()
