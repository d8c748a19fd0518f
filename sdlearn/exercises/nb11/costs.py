"""Exercises of notebook 11: the cost of a convolution, the roofline model, the size of a service."""

import math
from collections.abc import Callable

from ...diagnostics import costs
from ..testing import require
from . import lesson

# --- 11.1 ---------------------------------------------------------------------------------------------

conv_cost = lesson.exercise(
    1, costs.conv_cost, grade="guided", minutes=6,
    asks="Write `conv_cost(rows, columns, inputs, outputs, kernel=3, *, stride=1, batch=1, bytes_each=2)`: (FLOPs, "
         "bytes moved) of a convolution with a bias over maps of rows x columns, padded by kernel // 2. Each tensor is "
         "moved once; adding the bias counts as no FLOP.",
    hints=["One number of the output is a sum over kernel x kernel x inputs products. A product and its addition are "
           "two FLOPs. How many numbers has the output?",
           "Padded by kernel // 2, a stride of 1 keeps rows and columns; a stride of 2 halves both, rounding up: "
           "`-(-rows // stride)`.",
           "Bytes: the numbers of input and output, `batch` times, and of weight (outputs, inputs, kernel, kernel) and "
           "bias (outputs), once for the whole batch; times `bytes_each`."])


@conv_cost.test("shape")
def two_numbers(conv_cost):
    found = conv_cost(4, 6, 2, 5)
    require(isinstance(found, (tuple, list)) and len(found) == 2, "It must return a pair: FLOPs, and bytes moved")


@conv_cost.test("value")
def flops_of_one_layer(conv_cost):
    conv_cost.agrees(lambda answer: [answer(4, 6, 2, 5)[0], answer(4, 6, 2, 5, 1)[0]],
                     what="For 4 x 6 cells, 2 channels to 5, kernels of 3 and of 1, the number of FLOPs")


@conv_cost.test("value")
def bytes_of_one_layer(conv_cost):
    conv_cost.agrees(lambda answer: answer(4, 6, 2, 5)[1], what="For 4 x 6 cells, 2 channels to 5, the number of bytes")


@conv_cost.test("value")
def a_batch_in_single_precision(conv_cost):
    conv_cost.agrees(lambda answer: list(answer(4, 6, 2, 5, batch=4, bytes_each=4)),
                     what="For a batch of 4 in float32, the pair")


@conv_cost.test("edge case")
def a_stride_over_odd_sizes(conv_cost):
    conv_cost.agrees(lambda answer: list(answer(5, 7, 2, 5, stride=2)), what="For 5 x 7 cells, stride 2, the pair")


def convolution(two: int = 2, area: Callable = lambda k: k * k, half: Callable = lambda n, s: -(-n // s),
                counted: Callable = lambda batch: batch, weight: Callable = lambda i, o, k, batch: o * i * k * k + o,
                moved: Callable = lambda given, made: given + made, size: Callable = lambda each: each,
                added: int = 0) -> Callable:
    def answer(rows, columns, inputs, outputs, kernel=3, *, stride=1, batch=1, bytes_each=2):
        cells = half(rows, stride) * half(columns, stride)
        numbers = batch * moved(rows * columns * inputs, cells * outputs) + weight(inputs, outputs, kernel, batch)
        flops = counted(batch) * cells * outputs * (two * inputs * area(kernel) + added)
        return flops, size(bytes_each) * numbers
    return answer


for diagnosis, parts in [
    ("a multiplication and its addition are two", {"two": 1}),
    ("adding the bias is counted, too: here it counts as none", {"added": 1}),
    ("a kernel has kernel x kernel places", {"area": lambda k: k}),
    ("the kernel's places are missing", {"area": lambda k: 1}),
    ("the weight has to be read, too", {"weight": lambda i, o, k, batch: o}),
    ("the bias is moved as well, a number for each output channel", {"weight": lambda i, o, k, batch: o * i * k * k}),
    ("the output has to be written, too", {"moved": lambda given, made: given}),
    ("the input has to be read, too", {"moved": lambda given, made: made}),
    ("these are numbers, not bytes", {"size": lambda each: 1}),
    ("FLOPs grow with the batch", {"counted": lambda batch: 1}),
    ("the weight is read once for the whole batch", {"weight": lambda i, o, k, batch: batch * (o * i * k * k + o)}),
    ("a stride of 2 leaves half of the rows and half of the columns", {"half": lambda n, s: n}),
    ("half of an odd number is rounded up: the padding makes room for one more", {"half": lambda n, s: n // s}),
]:
    conv_cost.mistake(diagnosis)(convolution(**parts))


# --- 11.2 ---------------------------------------------------------------------------------------------

MULTIPLIES, MOVES = (800, 10), (20, 60)             # at 10 FLOP/s and 1 byte a second: 80 s, and 60 s

roofline_seconds = lesson.exercise(
    2, costs.roofline_seconds, grade="guided", minutes=4,
    asks="Write `roofline_seconds(works, flops_a_second, bytes_a_second)`: the least time of operations, (FLOPs, "
         "bytes) each, that run one after the other. Within one, multiplying and moving happen at the same time.",
    hints=["FLOPs over FLOPs a second are seconds; bytes over bytes a second, too. Which of the two does one operation "
           "wait for?",
           "Take the longer of the two for each operation, then add up. The longer of two sums is something else."])


@roofline_seconds.test("shape")
def one_number(roofline_seconds):
    require(isinstance(roofline_seconds([MULTIPLIES], 10, 1), (int, float)), "It must return a number of seconds")


@roofline_seconds.test("value")
def one_operation_of_each_kind(roofline_seconds):
    roofline_seconds.agrees(lambda answer: [float(answer([MULTIPLIES], 10, 1)), float(answer([MOVES], 10, 1))],
                            what="Of one that multiplies much, and of one that moves much, the time")


@roofline_seconds.test("value")
def several_in_a_row(roofline_seconds):
    roofline_seconds.agrees(lambda answer: float(answer([MULTIPLIES, MOVES, MOVES], 10, 1)),
                            what="Of three operations in a row, the time")


@roofline_seconds.test("edge case")
def none_at_all(roofline_seconds):
    roofline_seconds.agrees(lambda answer: float(answer([], 10, 1)), what="Of no operations, the time")


def timing(each: Callable = max, total: Callable = sum) -> Callable:
    def answer(works, flops_a_second, bytes_a_second):
        return total([each(f / flops_a_second, b / bytes_a_second) for f, b in works])
    return answer


for diagnosis, answer in [
    ("each operation waits for its own slower part: first the longer of both, then the sum",
     lambda works, flops, moved: max(sum(f for f, _ in works) / flops, sum(b for _, b in works) / moved)),
    ("it moves while it multiplies: that is the longer of the two times, not their sum", timing(lambda f, b: f + b)),
    ("an operation is not done before the slower of the two is: this takes the quicker", timing(min)),
    ("moving is left out", timing(lambda f, b: f)),
    ("multiplying is left out", timing(lambda f, b: b)),
    ("they run one after the other: the times add up", timing(total=lambda found: max(found, default=0))),
    ("this is a rate: seconds are work over speed", lambda works, flops, moved: sum(
        max(flops / f, moved / b) for f, b in works)),
]:
    roofline_seconds.mistake(diagnosis)(answer)


# --- 11.6 ---------------------------------------------------------------------------------------------

SECONDS = {1: 1.0, 2: 1.6, 4: 2.7, 8: 6.0}          # of one chip, by batch

fleet = lesson.exercise(
    6, costs.fleet, grade="on your own", minutes=20,
    asks="Write `fleet(rate, seconds, within, *, busy=0.7)`: (batch, chips) of the cheapest service for `rate` "
         "images a second. `seconds` maps a batch size to the time one chip takes for such a batch. The first "
         "image of a batch waits for the others to come, (batch - 1) / rate, and then for the batch: at most "
         "`within` seconds in all. Chips may be busy the share `busy` of the time. Fewest chips win; among equals the "
         "smaller batch. Where no batch is in time, raise ValueError.",
    hints=["Two questions, one after the other: which batches are ready in time, and how many chips does each need?",
           "A chip makes batch / seconds[batch] images a second, and does so `busy` of the time. Chips are whole: "
           "`math.ceil`.",
           "`min` of pairs (chips, batch) takes the fewest chips, then the smaller batch. Where no batch is in time, "
           "raise ValueError."])


def or_refused(answer: Callable, *args, **named):
    """What the answer gives, as a list, or "ValueError" where it raises that."""
    try:
        return list(answer(*args, **named))
    except ValueError:
        return "ValueError"


@fleet.test("shape")
def a_pair_of_whole_numbers(fleet):
    found = fleet(10, SECONDS, 5)
    require(isinstance(found, (tuple, list)) and len(found) == 2 and all(type(one) is int for one in found),
            f"It must return a pair of whole numbers, (batch, chips), not {found!r}")
    require(found[0] in SECONDS, f"A batch of {found[0]} is not among those of `seconds`: batch first, chips second")


@fleet.test("value")
def chips_for_one_batch(fleet):
    fleet.agrees(lambda answer: list(answer(10, {4: 2.7}, 60)), what="With batches of 4 in 2.7 s, the pair")


@fleet.test("value")
def in_time(fleet):
    fleet.agrees(lambda answer: [or_refused(answer, 10, SECONDS, within) for within in (60, 5, 2, 1)],
                 what="For 10 a second, within 60, 5, 2 and 1 s, the pair")


@fleet.test("value")
def a_slow_stream(fleet):
    fleet.agrees(lambda answer: list(answer(3, SECONDS, 1.9)), what="For 3 a second, within 1.9 s, the pair")


@fleet.test("value")
def time_to_spare(fleet):
    fleet.agrees(lambda answer: list(answer(10, SECONDS, 60, busy=0.35)),
                 what="With chips busy 0.35 of the time, the pair")


@fleet.test("edge case")
def among_equals(fleet):
    fleet.agrees(lambda answer: list(answer(0.1, SECONDS, 60)), what="Where one chip is enough for any batch, the pair")


@fleet.test("edge case")
def never_in_time(fleet):
    fleet.agrees(lambda answer: or_refused(answer, 10, SECONDS, 0.5),
                 what="Where no batch is ready in time, what it does")


def service(wait: Callable = lambda batch, rate: (batch - 1) / rate, made: Callable = lambda batch, each: batch / each,
            share: Callable = lambda busy: busy, whole: Callable = math.ceil, best: Callable = lambda found: min(
                (count, batch) for batch, count in found.items())[1], refuse: bool = True) -> Callable:
    def answer(rate, seconds, within, *, busy=0.7):
        ready = [batch for batch in seconds if wait(batch, rate) + seconds[batch] <= within]
        if not ready and refuse:
            raise ValueError("no batch is in time")
        chips = {batch: int(whole(rate / made(batch, seconds[batch]) / share(busy))) for batch in ready or seconds}
        batch = best(chips)
        return batch, chips[batch]
    return answer


for diagnosis, parts in [
    ("this is the smallest batch that is in time: a larger one may need fewer chips", {"best": min}),
    ("among batches that need as few chips take the smallest", {"best": lambda found: max(
        (-count, batch) for batch, count in found.items())[1]}),
    ("a batch holds several images: seconds over batch is the time of one", {"made": lambda batch, each: 1 / each}),
    ("a chip is not busy all of the time", {"share": lambda busy: 1}),
    ("busy a part of the time, a chip makes fewer, so more are needed: divide", {"share": lambda busy: 1 / busy}),
    ("with the fraction cut off there are too few: round up", {"whole": math.floor}),
    ("rounded to the nearest there may be too few: round up", {"whole": round}),
    ("the first image waits for those that fill its batch, too", {"wait": lambda batch, rate: 0}),
    ("the last of the batch does not wait for itself: (batch - 1) / rate", {"wait": lambda batch, rate: batch / rate}),
    ("this is the largest batch that is in time, which may need no fewer chips", {"best": max}),
    ("where no batch is in time it must be refused, not answered late", {"refuse": False}),
]:
    fleet.mistake(diagnosis)(service(**parts))
