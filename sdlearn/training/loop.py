"""Training of a stage: the loop of `finetune.loop` with resuming, EMA, mixed precision, a budget of time and reports.

A stage is a `Recipe`: the parameters, the batches, the loss. `fit` is a generator over steps, so that progress bars and
early stops belong to whoever iterates.
"""

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
from ..files import write_atomically
from ..finetune.loop import Diverged, optimise


class Recipe(Protocol):
    """What `fit` needs of a stage."""

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
    """A run's counters, over all its sessions. `seconds` are of training alone, without pauses and reports."""

    step: int = 0
    samples: int = 0
    seconds: float = 0.0
    loss: float = float("nan")              # running mean
    precisions: list[str] = field(default_factory=list)     # that it has been trained in: "fp32", "bf16" ...
    worlds: list[str] = field(default_factory=list)         # whose scenes it has been trained on: "core", "hard" ...
    history: list[dict[str, float]] = field(default_factory=list)

    def count(self, loss: float, samples: int):
        """Count one step."""
        unknown = self.loss != self.loss                        # NaN: no step yet, or packaged weights to start from
        self.loss = loss if unknown else self.loss + (loss - self.loss) * 0.01
        self.step += 1
        self.samples += samples


class EMA:
    """Exponential moving average of a model's parameters; short at first, then longer (up to `decay`)."""

    def __init__(self, model: nn.Module, decay: float = 0.9995):
        self.model, self.decay = deepcopy(model).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int):
        keep = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - keep)


def save_state(file: Path, state: dict):
    """Write a run's state atomically."""
    with write_atomically(file) as path:
        torch.save(state, path)


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

    def record(self, clock: float, seconds: float):
        """Record that a step ended at `clock` and took so many seconds; choose the threads of the next."""
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


class Run:
    """A stage's model, EMA, optimiser and progress, as its state file holds them."""

    def __init__(self, recipe: Recipe, folder: Path, device: torch.device):
        self.recipe, self.folder, self.file = recipe, folder, folder / f"{recipe.name}-state.pt"
        self.model = recipe.model.to(device)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.learning_rate, weight_decay=getattr(recipe, "weight_decay", 0.01),
            betas=(0.9, 0.99), fused=True)                      # one pass over the weights: a fifth of the time
        self.average, self.progress = EMA(self.model), Progress()

    def restore(self) -> bool:
        """Load the newest state, if there is one; whether the optimiser's was in it. Packaged weights lack that."""
        if (state := load_state(self.file)) is None:
            return False
        load_weights(self.model, state["model"])
        load_weights(self.average.model, state["average"])
        self.progress = Progress(**state["progress"])
        if "optimiser" not in state:
            return False
        self.optimiser.load_state_dict(state["optimiser"])
        for group in self.optimiser.param_groups:
            group["fused"] = True                               # older state files lack it
        return True

    def note_conditions(self, precision: str):
        """Add precision and worlds to the progress, where they are new."""
        recipe, progress = self.recipe, self.progress
        if precision not in progress.precisions:
            progress.precisions.append(precision)
        worlds = getattr(recipe, "worlds", None) or [world for world in [getattr(recipe, "world", None)] if world]
        progress.worlds += [name for name in map(world_name, worlds) if name not in progress.worlds]

    def save(self, accelerator: Accelerator):
        if accelerator.is_main_process:
            save_state(self.file, {"model": self.model.state_dict(), "average": self.average.model.state_dict(),
                                   "optimiser": self.optimiser.state_dict(), "progress": vars(self.progress)})

    def report(self):
        """Append the recipe's figures to the history."""
        progress = self.progress
        progress.history.append({"step": progress.step, "samples": progress.samples, "hours": progress.seconds / 3600,
                                 "loss": progress.loss,
                                 **self.recipe.report(self.average.model, self.folder, progress.step)})


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
    device = accelerator.device
    run = Run(recipe, folder, device)
    warmed = run.restore()
    progress, raw = run.progress, run.model
    run.note_conditions("fp32" if precision == "no" else precision)
    first = 0 if warmed else progress.step                      # an optimiser without a state is warmed up
    averaged, decay_share = (progress.step, 1.0) if anneal else (0, recipe.decay_share)
    if anneal:
        run.average = EMA(raw)
    generator = torch.Generator().manual_seed(hash((seed, progress.step, accelerator.process_index)) % 2**63)
    if compiled if compiled is not None else device.type == "cuda":
        raw.compile()
    model, run.optimiser = accelerator.prepare(LossModule(recipe, raw), run.optimiser)
    threads = Threads() if device.type == "cpu" else None
    networks = [part for part in vars(recipe).values() if isinstance(part, nn.Module)]
    attention = partial(eager_attention, *networks) if device.type == "cpu" else nullcontext
    start = saved = reported = clock = time.perf_counter()
    batch, parts = (), {}

    def rates() -> Iterator[float]:
        """The learning rate of each step: warm-up, and decay over the end of the budget. Ends with the budget."""
        while True:
            left = ((span[1] - progress.seconds) / (span[1] - span[0]) if span
                    else 1.0 - (clock - start) / (60 * minutes))
            if (share := broadcast_from_main(left, accelerator)) <= 0:
                return
            rate = min(1.0, (progress.step - first + 1) / recipe.warmup)
            if decay_share:
                rate *= min(1.0, share / decay_share)
            yield recipe.learning_rate * rate

    def loss() -> torch.Tensor:
        nonlocal batch, parts
        batch = [part.to(device) if torch.is_tensor(part) else part for part in recipe.batch(generator)]
        with attention(), accelerator.autocast():
            value, parts = model(*batch)
        return value

    try:
        for done in optimise(run.optimiser, list(model.parameters()), loss, rates(), accelerator=accelerator):
            progress.count(done.loss, len(batch[0]) * accelerator.num_processes)
            run.average.update(raw, progress.step - averaged)
            now = time.perf_counter()
            progress.seconds += now - clock
            if threads:
                threads.record(now - start, now - clock)
            clock = now
            yield progress, parts
            if clock - saved > save_seconds:
                run.save(accelerator)
                saved = clock
            if clock - reported > 60 * report_minutes and accelerator.is_main_process:
                run.report()
                clock = reported = time.perf_counter()          # a report does not count as training
    except Diverged as error:
        raise Diverged(f"the loss of '{recipe.name}' became NaN at step {progress.step}; the state of up to a minute "
                       "before is saved: resume with a lower learning rate") from error
    if accelerator.is_main_process:
        run.report()
    run.save(accelerator)
