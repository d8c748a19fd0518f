"""Exercises that check themselves.

In a notebook:

    from sdlearn.exercises import check, hint, progress, solution

    def zero_conv(channels: int) -> nn.Conv2d:
        \"\"\"1x1 convolution that outputs exactly zero at the start.\"\"\"
        raise NotImplementedError

    zero_conv = check("zero_conv", zero_conv)

`check` shows what is wrong. It returns the learner's function when that is right and the package's otherwise, so
the notebook runs to its end either way. `hint("zero_conv")` shows the next hint, `solution("zero_conv")` the
package's code, `progress()` a bar for each notebook. `check.run("zero_conv", f)` returns a `Result` and shows
nothing; in `with check.grading():` an answer that is not right raises `NotRight`.

**For authors.** The exercises of notebook 07 live in the package `nb07`, a file for each theme. The package is
the solution, so an exercise starts from a function, generator or class of it:

    from ...layers import zero_conv
    from ..testing import randn, require, require_shape
    from . import lesson              # lesson = Lesson(7, "ControlNet")

    zero = lesson.exercise(
        1, zero_conv, grade="guided", minutes=3,
        asks="Write `zero_conv(channels)`: a 1x1 convolution that outputs exactly zero at the start.",
        hints=["A convolution is W x + b. What must W be?", "`nn.init.zeros_` fills a tensor with zeros."])

    @zero.test("shape")
    def keeps_the_shape(zero_conv):
        require_shape(zero_conv(4)(randn(1, 4, 8, 8)), (1, 4, 8, 8))

    @zero.test("value")
    def outputs_zero(zero_conv):
        zero_conv.agrees(lambda answer: answer(4)(randn(1, 4, 8, 8)), what="The output")

    @zero.mistake("the weight is zero, what else does a convolution add?")
    def bias_forgotten(channels):
        conv = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(conv.weight)
        return conv

- **Tests** go from "shape" over "value" to "edge case", and stop at the first that fails: begin with the one
  that explains most. A test gets an `Answer` for each name, to be called like the function itself; it passes
  copies, and finds arguments changed in place, a missing return, gradients left switched off.
- **`same(*args)`** compares its result with the solution's. **`agrees(run)`** compares `run(answer)` with
  `run(solution)`: a module's output with given weights, a generator's items, two calls in a row. `run` must be
  deterministic, as `randn(2, 3, seed=1)` is. Results are tensors, numbers, or lists and dictionaries of such.
- **Mistakes** are wrong answers that people write. Where the learner's result equals that of a mistake, its
  diagnosis ends the sentence: "The output is -0.21 where it must be 0: the weight is zero, what else does a
  convolution add?" Begin it in lower case, make it a clause or a question, give no solution away. Any
  other difference is shown by value and index, and recognised where it is a negative, a multiple or transposed.
- **Properties** need no solution: `require(condition, sentence)`, `require_sums`, `require_permutation`,
  `require_shape`. `with_weights(module, weights)` loads weights by the checkpoint's names, and reports others.
- **Larger solutions.** Where the package's function does more than is asked, say so in `beyond`; it is shown
  with the solution. Methods are fine: `NoiseSchedule.add_noise` is a function of (schedule, x0, noise, t).
- **Stubs** are a docstring and `raise NotImplementedError`, for a class in one of its methods.
- **Proof.** `tests/exercise_answers/nb07.py` holds at least five wrong answers for each exercise with the
  words that the message must hold, and two right ones written differently; `tests/test_exercises.py` runs them.

Answers run in a process of their own, each test by itself: see `sandbox.py` for why, and for its limits.
"""

from .checking import NotRight, Result, check, hint, progress, solution

__all__ = ["NotRight", "Result", "check", "hint", "progress", "solution"]
