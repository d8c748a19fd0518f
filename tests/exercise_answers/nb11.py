"""Answers to the exercises of notebook 11."""

import math

import numpy as np
import torch

from exercise_answers import right, wrong
from sdlearn.guidance import guidance_scale_at

# --- conv_cost ----------------------------------------------------------------------------------------


@right("conv_cost")
def by_shapes(rows, columns, inputs, outputs, kernel=3, *, stride=1, batch=1, bytes_each=2):
    with torch.device("meta"):
        layer = torch.nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
        x = torch.empty(batch, inputs, rows, columns)
        y = layer(x)
    moved = x.numel() + y.numel() + layer.weight.numel() + layer.bias.numel()
    return 2 * y.numel() * layer.weight[0].numel(), moved * bytes_each


@right("conv_cost")
def step_by_step(rows, columns, inputs, outputs, kernel=3, *, stride=1, batch=1, bytes_each=2):
    h, w = math.ceil(rows / stride), math.ceil(columns / stride)
    one_number = 2 * kernel ** 2 * inputs
    flops = one_number * outputs * h * w * batch
    weights = kernel * kernel * inputs * outputs
    read = batch * rows * columns * inputs * bytes_each + weights * bytes_each + outputs * bytes_each
    return [flops, read + batch * h * w * outputs * bytes_each]


def conv(factor=2, places=lambda k: k ** 2, n=1, reads=1, writes=1, weights=1, bias=1, size=None, half=math.ceil,
         each=False):
    def answer(rows, columns, inputs, outputs, kernel=3, *, stride=1, batch=1, bytes_each=2):
        h, w = half(rows / stride), half(columns / stride)
        flops = factor * places(kernel) * inputs * outputs * h * w * (batch if n else 1)
        fixed = weights * inputs * outputs * kernel ** 2 + bias * outputs
        moved = batch * (reads * rows * columns * inputs + writes * h * w * outputs) + (batch if each else 1) * fixed
        return flops, moved * (size or bytes_each)
    return answer


for words, answer in [
    ("its addition are two", conv(factor=1)),
    ("kernel x kernel places", conv(places=lambda k: k)),
    ("the kernel's places are missing", conv(places=lambda k: 1)),
    ("the weight has to be read", conv(weights=0)),
    ("the bias is moved", conv(bias=0)),
    ("the output has to be written", conv(writes=0)),
    ("the input has to be read", conv(reads=0)),
    ("not bytes", conv(size=1)),
    ("grow with the batch", conv(n=0)),
    ("once for the whole batch", conv(each=True)),
    ("is rounded up", conv(half=math.floor)),
    ("must return a pair", lambda rows, columns, inputs, outputs, kernel=3, **_: (
        2 * kernel ** 2 * inputs * outputs * rows * columns)),
]:
    wrong("conv_cost", words)(answer)


@wrong("conv_cost", "half of the rows")
def stride_ignored(rows, columns, inputs, outputs, kernel=3, *, stride=1, batch=1, bytes_each=2):
    return conv()(rows, columns, inputs, outputs, kernel, batch=batch, bytes_each=bytes_each)


# --- roofline_seconds ---------------------------------------------------------------------------------

@right("roofline_seconds")
def in_a_loop(works, flops_a_second, bytes_a_second):
    total = 0.0
    for flops, moved in works:
        a, b = flops / flops_a_second, moved / bytes_a_second
        total += a if a > b else b
    return total


@right("roofline_seconds")
def with_numpy(works, flops_a_second, bytes_a_second):
    table = np.array(works, float).reshape(-1, 2) / (flops_a_second, bytes_a_second)
    return float(table.max(axis=1).sum()) if len(table) else 0


for words, answer in [
    ("not their sum", lambda works, p, w: sum(f / p + b / w for f, b in works)),
    ("this takes the quicker", lambda works, p, w: sum(min(f / p, b / w) for f, b in works)),
    ("moving is left out", lambda works, p, w: sum(f / p for f, b in works)),
    ("multiplying is left out", lambda works, p, w: sum(b / w for f, b in works)),
    ("first the longer of both", lambda works, p, w: max(sum(f for f, b in works) / p, sum(b for f, b in works) / w)),
    ("the times add up", lambda works, p, w: max([max(f / p, b / w) for f, b in works] or [0])),
    ("this is a rate", lambda works, p, w: sum(max(p / f, w / b) for f, b in works)),
    ("must return a number", lambda works, p, w: [max(f / p, b / w) for f, b in works]),
]:
    wrong("roofline_seconds", words)(answer)


# --- ConditioningCache --------------------------------------------------------------------------------

@right("ConditioningCache")
class ListsAndIdentity:
    def __init__(self, timesteps):
        self.timesteps, self.entries, self.networks = [float(t) for t in timesteps], [], {}

    def keys_values(self, layer, context):
        for of_layer, of_context, pair in self.entries:
            if of_layer is layer and of_context is context:
                return pair
        self.entries.append((layer, context, (layer.to_k(context), layer.to_v(context))))
        return self.entries[-1][2]

    def embed_time(self, network, t, x):
        if float(t) not in self.timesteps:
            return network.embed_time(t, x)
        if network not in self.networks:
            rows = network.embed_time(torch.tensor(self.timesteps), x)
            self.networks[network] = dict(zip(self.timesteps, rows.split(1), strict=True))
        return self.networks[network][float(t)]


@right("ConditioningCache")
class ById:
    def __init__(self, timesteps):
        self.timesteps, self.memory, self.rows = timesteps, {}, {}

    def keys_values(self, layer, context):
        key = id(layer), id(context)
        if key not in self.memory:
            self.memory[key] = context, (layer.to_k(context), layer.to_v(context))      # the context stays alive
        return self.memory[key][1]

    def embed_time(self, network, t, x):
        if id(network) not in self.rows:
            self.rows[id(network)] = network.embed_time(torch.tensor(self.timesteps), x)
        found = [i for i, one in enumerate(self.timesteps) if one == t]
        return self.rows[id(network)][found[0]][None] if found else network.embed_time(t, x)


class Changed(ListsAndIdentity):
    """A right answer, of which the wrong ones below replace a method."""


def changed(**methods):
    return type("Wrong", (Changed,), methods)


def compute_keys(self, layer, context):
    return layer.to_k(context), layer.to_v(context)


def keys_by_layer(self, layer, context):
    return self.networks.setdefault(("keys", layer), compute_keys(self, layer, context))


def embed(self, network, t, x):
    return network.embed_time(t, x)


def embed_known(self, network, t, x):
    rows = self.networks.setdefault(network, None)
    if rows is None:
        rows = self.networks[network] = network.embed_time(torch.tensor(self.timesteps), x)
    at = {one: i for i, one in enumerate(self.timesteps)}[t]
    return rows[at:at + 1]


def embed_first(self, network, t, x):
    if t not in self.timesteps:
        return network.embed_time(t, x)
    if network not in self.networks:
        self.networks[network] = network.embed_time(torch.tensor(self.timesteps), x)
    return self.networks[network][:1]


def embed_all_again(self, network, t, x):
    if t not in self.timesteps:
        return network.embed_time(t, x)
    at = self.timesteps.index(t)
    return network.embed_time(torch.tensor(self.timesteps), x)[at:at + 1]


for words, answer in [
    ("nothing is cached", changed(keys_values=compute_keys, embed_time=embed)),
    ("keys are computed at every step", changed(keys_values=compute_keys)),
    ("share one entry", changed(keys_values=keys_by_layer)),
    ("embeddings are not cached", changed(embed_time=embed)),
    ("not among `timesteps`", changed(embed_time=embed_known)),
    ("the first one's embedding", changed(embed_time=embed_first)),
    ("computed again at every step", changed(embed_time=embed_all_again)),
    ("must have the methods", lambda timesteps: {t: None for t in timesteps}),
]:
    wrong("ConditioningCache", words)(answer)


# --- ddim_coefficients --------------------------------------------------------------------------------

@right("ddim_coefficients")
def read_off_the_step(schedule, grid):
    """x0 = 0 gives the factor of x, x = 0 that of x0."""
    def step(x, x0, t, t_prev):
        alpha, sigma = schedule.at(t)
        alpha_prev, sigma_prev = schedule.at(t_prev or 0)
        return alpha_prev * x0 + sigma_prev * (x - alpha * x0) / sigma
    return [[step(1.0, 0.0, *pair), step(0.0, 1.0, *pair)] for pair in grid]


@right("ddim_coefficients")
def by_ratio(schedule, grid):
    pairs = []
    for t, after in grid:
        (alpha, sigma), (alpha_, sigma_) = schedule.at(t), schedule.at(after if after is not None else 0)
        r = sigma_ / sigma
        pairs.append((r, alpha_ - r * alpha))
    return tuple(pairs)


def step(pair, end=0):
    def answer(schedule, grid):
        found = []
        for t, t_prev in grid:
            found.append(pair(*schedule.at(t), *schedule.at(t_prev if t_prev is not None else end)))
        return found
    return answer


for words, answer in [
    ("have changed places", step(lambda a, s, b, r: (b - r / s * a, r / s))),
    ("of eps and x0", step(lambda a, s, b, r: (r, b))),
    ("of x and eps", step(lambda a, s, b, r: (b / a, r - b / a * s))),
    ("eps holds x0", step(lambda a, s, b, r: (r / s, b))),
    ("its alpha is missing", step(lambda a, s, b, r: (r / s, b - r / s))),
    ("is turned", step(lambda a, s, b, r: (r / s, b + a * r / s))),
    ("these are variances", step(lambda a, s, b, r: ((r / s) ** 2, b ** 2 - (r / s * a) ** 2))),
    ("without any", step(lambda a, s, b, r: (r / s, b - r / s * a), end=None)),
    ("which is 0 here", step(lambda a, s, b, r: (r / s, a * (b / a - r / s)))),
    ("are tensors", step(lambda a, s, b, r: (torch.tensor(r / s), torch.tensor(b - r / s * a)))),
    ("a pair for each step", lambda schedule, grid: [schedule.at(t)[0] for t, _ in grid]),
]:
    wrong("ddim_coefficients", words)(answer)


# --- count_nfe ------------------------------------------------------------------------------------

@right("count_nfe")
def by_hand(times, scale, interval=None):
    low, high = interval or (0, 1000)
    inside = [t for t in times if low <= t <= high]
    twice = len(inside) if scale not in (0, 1) else 0
    return len(times) + twice


@right("count_nfe")
def in_a_row(times, scale, interval=None):
    n = 0
    for t in times:
        w = guidance_scale_at(t, scale, interval)
        n += 1 + int(w != 0 and w != 1)
    return n


def passes(inside=lambda t, interval: interval is None or interval[0] <= t <= interval[1], once=(0, 1), out=1):
    def answer(times, scale, interval=None):
        return sum((1 if scale in once else 2) if inside(t, interval) else out for t in times)
    return answer


for words, answer in [
    ("is not looked at", passes(inside=lambda t, interval: True)),
    ("both ends belong", passes(inside=lambda t, interval: interval is None or interval[0] < t < interval[1])),
    ("still runs", passes(out=0)),
    ("the unconditional half is enough", passes(once=(1,))),
    ("the conditional half is enough", passes(once=(0,))),
    ("two passes of work", lambda times, scale, interval=None: len(times)),
    ("are exchanged", passes(inside=lambda t, interval: interval is None or not interval[0] <= t <= interval[1])),
    ("needs both", lambda times, scale, interval=None: sum(2 if guidance_scale_at(t, scale, interval) > 1 else 1
                                                           for t in times)),
    ("a whole number", lambda times, scale, interval=None: float(passes()(times, scale, interval))),
]:
    wrong("count_nfe", words)(answer)


# --- fleet --------------------------------------------------------------------------------------------

@right("fleet")
def in_two_steps(rate, seconds, within, *, busy=0.7):
    best = None
    for batch in sorted(seconds):
        if (batch - 1) / rate + seconds[batch] > within:
            continue
        throughput = batch / seconds[batch] * busy
        chips = math.ceil(rate / throughput)
        if best is None or chips < best[1]:
            best = batch, chips
    if best is None:
        raise ValueError("too slow")
    return best


@right("fleet")
def with_min(rate, seconds, within, *, busy=0.7):
    options = [(-(-rate * s // (b * busy)), b) for b, s in seconds.items() if s <= within - (b - 1) / rate]
    chips, batch = min(options)                                         # of none it raises ValueError itself
    return [batch, int(chips)]


def served(wait=lambda b, rate: (b - 1) / rate, each=lambda b, s: s / b, busy_of=lambda busy: busy, whole=math.ceil,
           key=lambda batch, chips: (chips, batch), refuse=True):
    def answer(rate, seconds, within, *, busy=0.7):
        ready = {b: s for b, s in seconds.items() if wait(b, rate) + s <= within}
        if not ready:
            if refuse:
                raise ValueError
            ready = seconds
        found = {b: whole(rate * each(b, s) / busy_of(busy)) for b, s in ready.items()}
        batch = min(found, key=lambda b: key(b, found[b]))
        return batch, int(found[batch])
    return answer


for words, answer in [
    ("seconds over batch", served(each=lambda b, s: s)),
    ("not busy all of the time", served(busy_of=lambda busy: 1)),
    ("more are needed: divide", served(busy_of=lambda busy: 1 / busy)),
    ("cut off", served(whole=math.floor)),
    ("rounded to the nearest", served(whole=round)),
    ("the first image waits", served(wait=lambda b, rate: 0)),
    ("does not wait for itself", served(wait=lambda b, rate: b / rate)),
    ("the largest batch", served(key=lambda batch, chips: -batch)),
    ("the smallest batch that is in time", served(key=lambda batch, chips: batch)),
    ("take the smallest", served(key=lambda batch, chips: (chips, -batch))),
    ("it must be refused", served(refuse=False)),
    ("batch first", lambda rate, seconds, within, *, busy=0.7: served()(rate, seconds, within, busy=busy)[::-1]),
]:
    wrong("fleet", words)(answer)
