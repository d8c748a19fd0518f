"""Resuming a training run restores everything that decides about the next step: a run in two calls is a run in one.

The model has two numbers and the clock is the test's own, so that all of it is exact and takes no time.
"""

import time
from types import SimpleNamespace

import pytest
import torch

from sdlearn.training.loop import fit, load_state

STATE = "toy-state.pt"


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """Seconds that pass when a recipe says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now.seconds)
    return now


class Toy:
    """A recipe whose step takes a second, and whose report takes as long as it is given.

    The loss depends on the weights, so that momentum, second moments and the order of steps all matter.
    """

    name, batch_size, learning_rate, warmup, decay_share, weight_decay = "toy", 2, 0.1, 1, 0.0, 0.0

    def __init__(self, clock, *, report_seconds=0.0, noisy=False, **options):
        self.clock, self.report_seconds, self.noisy = clock, report_seconds, noisy
        self.model = torch.nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.model.weight.copy_(torch.tensor([[0.3, -0.2]]))
        self.batches, self.weights, self.reported = [], [], []
        vars(self).update(options)

    def batch(self, generator):
        self.clock.seconds += 1.0
        self.batches.append(torch.rand(2, generator=generator))
        return self.batches[-1] if self.noisy else torch.tensor([1.0, 0.5]),

    def loss(self, model, x):
        self.weights.append(self.model.weight.detach().clone())
        return (model(x) - 3).square().sum() + 0.1 * model.weight[0, 1], {}

    def report(self, averaged, folder, step):
        self.clock.seconds += self.report_seconds
        self.reported.append((step, averaged.weight.detach().clone()))
        return {"figure": float(step)}


class Slope(Toy):
    """A loss with a constant gradient, with which AdamW moves the weights by just the learning rate."""

    def loss(self, model, x):
        self.weights.append(self.model.weight.detach().clone())
        return -model(torch.ones(2)).sum(), {}

    def rates(self):
        """The learning rate of each step, (steps,)."""
        weights = torch.stack([*self.weights, self.model.weight.detach()])[:, 0, 0]
        return weights.diff()


def train(recipe, folder, steps, **options):
    """`steps` steps, to the end of the budget; what they yield."""
    budget = {} if "span" in options else {"minutes": (steps - 0.5) / 60}
    found = [progress.step for progress, _ in fit(recipe, folder, precision="no", compiled=False, **budget, **options)]
    assert len(found) == steps
    return found


def moving_average(weights, start):
    """The average after the steps that lead through `weights`, those before the first step first."""
    average = weights[0] if start is None else start
    for step, weight in enumerate(weights[1:], 1):
        keep = min(0.9995, (1 + step) / (10 + step))
        average = keep * average + (1 - keep) * weight
    return average


# --- what a resumed run restores ---------------------------------------------------------------------

@pytest.mark.parametrize("warmup", [1, 6], ids=["plain", "within warm-up"])
def test_a_run_in_two_calls_equals_a_run_in_one_bit_for_bit(clock, tmp_path, warmup):
    """Weights, moments of the optimiser, moving average, warm-up and progress: all that a step depends on."""
    train(Toy(clock, warmup=warmup), tmp_path / "one", 8)
    for _ in range(2):
        train(Toy(clock, warmup=warmup), tmp_path / "two", 4)
    one, two = (load_state(tmp_path / name / STATE) for name in ("one", "two"))
    for part in ("model", "average"):
        assert torch.equal(one[part]["weight"], two[part]["weight"]), part
    first, second = (state["optimiser"]["state"][0] for state in (one, two))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(one["model"]["weight"], one["average"]["weight"])
    history = [state["progress"].pop("history") for state in (one, two)]
    assert one["progress"] == two["progress"] and history[0] == history[1][1:] and len(history[1]) == 2


def test_a_run_that_was_stopped_between_two_saves_resumes_from_the_last_one(clock, tmp_path):
    """Stopped after five steps, with a state written every third: steps four and five are done again."""
    train(Toy(clock), tmp_path / "one", 8)
    loop = fit(Toy(clock), tmp_path / "two", minutes=1, precision="no", compiled=False, save_seconds=2.5)
    for progress, _ in loop:
        if progress.step == 5:
            break
    loop.close()
    assert train(Toy(clock), tmp_path / "two", 5) == [4, 5, 6, 7, 8]
    one, two = (load_state(tmp_path / name / STATE) for name in ("one", "two"))
    for part in ("model", "average"):
        assert torch.equal(one[part]["weight"], two[part]["weight"]), part


def test_a_resumed_run_draws_new_batches(clock, tmp_path):
    """The random generator depends on the seed and on the step at which a call begins."""
    calls = []
    for folder, seed, count in (("run", 0, 4), ("run", 0, 4), ("again", 0, 4), ("other", 1, 4)):
        recipe = Toy(clock, noisy=True)
        train(recipe, tmp_path / folder, count, seed=seed)
        calls.append(torch.stack(recipe.batches))
    first, resumed, again, other = calls
    assert torch.equal(first, again), "the same seed from the same step"
    for one in (resumed, other):
        assert not any(torch.equal(a, b) for a in first for b in one)


def test_a_resumed_call_at_another_rate_trains_at_that_rate(clock, tmp_path):
    """The rate is the recipe's, not the one that the stored optimiser had."""
    train(Slope(clock), tmp_path, 2)
    recipe = Slope(clock, learning_rate=0.02)
    train(recipe, tmp_path, 2)
    torch.testing.assert_close(recipe.rates(), torch.tensor([0.02, 0.02]), rtol=1e-3, atol=0)


# --- the learning rate --------------------------------------------------------------------------------

def test_warm_up_goes_on_where_the_call_before_ended(clock, tmp_path):
    for wanted in ([0.02, 0.04, 0.06], [0.08, 0.1, 0.1, 0.1]):
        recipe = Slope(clock, warmup=5)
        train(recipe, tmp_path, len(wanted))
        torch.testing.assert_close(recipe.rates(), torch.tensor(wanted), rtol=1e-3, atol=0)


@pytest.mark.parametrize("options, anneal, wanted", [
    ({"decay_share": 0.0}, False, [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]),
    ({"decay_share": 0.5}, False, [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]),
    ({"decay_share": 0.0}, True, [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]),
    ({"decay_share": 0.5, "warmup": 4}, True, [0.25, 0.4375, 0.5625, 0.625, 0.5, 0.375, 0.25, 0.125]),
], ids=["constant", "decay over the last half", "annealing", "annealing and warm-up"])
def test_the_learning_rate_falls_linearly_over_its_share_of_the_budget(clock, tmp_path, options, anneal, wanted):
    recipe = Slope(clock, **options)
    train(recipe, tmp_path, 8, span=(0.0, 8.0), anneal=anneal)
    torch.testing.assert_close(recipe.rates(), 0.1 * torch.tensor(wanted), rtol=1e-3, atol=0)


def test_a_budget_in_two_calls_has_the_learning_rates_of_one(clock, tmp_path):
    whole = Slope(clock, decay_share=1.0)
    train(whole, tmp_path / "one", 8, span=(0.0, 8.0))
    parts = []
    for stop in (3, 8):
        recipe = Slope(clock, decay_share=1.0)
        loop = fit(recipe, tmp_path / "two", span=(0.0, 8.0), precision="no", compiled=False, save_seconds=0.0)
        for progress, _ in loop:
            if progress.step > stop:
                break
        parts.append(recipe.rates()[:3] if stop == 3 else recipe.rates())
    torch.testing.assert_close(torch.cat(parts), whole.rates(), rtol=1e-3, atol=1e-6)


# --- the moving average -------------------------------------------------------------------------------

def test_the_average_goes_on_over_calls_and_annealing_starts_its_own(clock, tmp_path):
    first, second, last = Toy(clock), Toy(clock), Toy(clock)
    train(first, tmp_path, 5)
    train(second, tmp_path, 3)
    path = [*first.weights, *second.weights, second.model.weight.detach()]
    before = load_state(tmp_path / STATE)["average"]["weight"]
    torch.testing.assert_close(before, moving_average(path, None))
    train(last, tmp_path, 2, anneal=True)
    found = load_state(tmp_path / STATE)["average"]["weight"]
    path = [*last.weights, last.model.weight.detach()]
    torch.testing.assert_close(path[0], second.model.weight.detach())
    torch.testing.assert_close(found, moving_average(path, None))
    assert (found - moving_average(path, before)).abs().max() > 1e-4, "the average of before has no part in it"


# --- reports ------------------------------------------------------------------------------------------

def test_the_time_of_reports_is_no_time_of_training(clock, tmp_path):
    recipe = Toy(clock, report_seconds=1000.0)
    train(recipe, tmp_path, 7, span=(0.0, 7.0), report_minutes=2.5 / 60)
    assert [step for step, _ in recipe.reported] == [3, 6, 7], "every third step, and at the end"
    progress = load_state(tmp_path / STATE)["progress"]
    assert progress["seconds"] == 7.0 and progress["step"] == 7 and progress["samples"] == 14


def test_reports_are_made_of_the_average_and_kept_with_their_step(clock, tmp_path):
    recipe = Toy(clock)
    train(recipe, tmp_path, 5, report_minutes=1.5 / 60)
    assert [step for step, _ in recipe.reported] == [2, 4, 5]
    path = [*recipe.weights, recipe.model.weight.detach()]
    for step, averaged in recipe.reported:
        torch.testing.assert_close(averaged, moving_average(path[:step + 1], None))
        assert not torch.equal(averaged, path[step])
    history = load_state(tmp_path / STATE)["progress"]["history"]
    assert [(one["step"], one["samples"], one["figure"]) for one in history] == [(2, 4, 2.0), (4, 8, 4.0), (5, 10, 5.0)]
    assert [one["hours"] for one in history] == pytest.approx([2 / 3600, 4 / 3600, 5 / 3600])


def test_the_loss_in_progress_is_a_running_mean(clock, tmp_path):
    losses = iter([4.0, 2.0, 1.0])
    recipe = Toy(clock)
    recipe.loss = lambda model, x: (0 * model.weight.sum() + next(losses), {})
    found = [progress.loss for progress, _ in fit(recipe, tmp_path, minutes=2.5 / 60, precision="no", compiled=False)]
    assert found == pytest.approx([4.0, 3.98, 3.98 - 0.01 * 2.98])
