"""An exercise of the tests' own: the one of the guide for authors, with a module that makes it."""

from torch import nn

from sdlearn.exercises.exercise import Lesson
from sdlearn.exercises.testing import randn, require_shape
from sdlearn.layers import zero_conv

lesson = Lesson(98, "A sample")

zero = lesson.exercise(
    1, zero_conv, name="zero_sample", grade="guided", minutes=3,
    asks="Write `zero_conv(channels)`: a 1x1 convolution that outputs exactly zero at the start.",
    hints=["A convolution is W x + b. What must W be?", "`nn.init.zeros_` fills a tensor with zeros."],
    beyond="The package's has nothing more.")


@zero.test("shape")
def keeps_the_shape(zero_conv):
    require_shape(zero_conv(4)(randn(1, 4, 8, 8)), (1, 4, 8, 8))


@zero.test("value")
def outputs_zero(zero_conv):
    zero_conv.agrees(lambda answer: answer(4)(randn(1, 4, 8, 8)), what="The output")


@zero.test("edge case")
def one_channel(zero_conv):
    zero_conv.agrees(lambda answer: answer(1)(randn(2, 1, 3, 5)), what="With one channel, the output")


@zero.mistake("the weight is zero, what else does a convolution add?")
def bias_forgotten(channels):
    conv = nn.Conv2d(channels, channels, 1)
    nn.init.zeros_(conv.weight)
    return conv
