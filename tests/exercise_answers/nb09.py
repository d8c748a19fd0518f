"""Answers to the exercises of notebook 09."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from exercise_answers import right, wrong
from sdlearn.finetune import diffusion_losses, lora_delta

# --- replace_token_embedding ----------------------------------------------------------------------------------------


@right("replace_token_embedding")
def in_a_loop(vectors, tokens, ids, rows):
    for one, row in zip(ids, rows, strict=True):
        vectors = torch.where((tokens == one).unsqueeze(-1), row, vectors)
    return vectors


@right("replace_token_embedding")
def by_index(vectors, tokens, ids, rows):
    made = vectors.clone()
    for k in range(len(ids)):
        made[tokens == ids[k]] = rows[k]
    return made


@right("replace_token_embedding")
def by_product(vectors, tokens, ids, rows):
    same = (tokens[..., None] == ids).float()                                       # B M n
    return vectors * (1 - same.sum(dim=-1, keepdim=True)) + same @ rows


def looped(mask=lambda tokens, one: tokens == one, new=lambda row, vectors: row, rows_of=lambda rows: rows):
    def replace_token_embedding(vectors, tokens, ids, rows):
        for one, row in zip(ids, rows_of(rows), strict=True):
            vectors = torch.where(mask(tokens, one).unsqueeze(-1), new(row, vectors), vectors)
        return vectors
    return replace_token_embedding


def in_place(vectors, tokens, ids, rows):
    for one, row in zip(ids, rows, strict=True):
        vectors[tokens == one] = row.detach()
    return vectors


def by_id(vectors, tokens, ids, rows):
    made = vectors.clone()
    made[:, ids % 6] = rows
    return made


for words, answer in [
    ("must take its place", looped(new=lambda row, vectors: vectors + row)),
    ("all new tokens get the first row", looped(rows_of=lambda rows: rows[:1].expand_as(rows))),
    ("the rows come in the wrong order", looped(rows_of=lambda rows: rows.flip(0))),
    ("a word may come twice", looped(mask=lambda tokens, one: ((tokens == one).cumsum(1) == 1) & (tokens == one))),
    ("the other way round", looped(mask=lambda tokens, one: tokens != one)),
    ("nothing is changed", lambda vectors, tokens, ids, rows: vectors.clone()),
    ("changes its argument `vectors` in place", in_place),
    ("No gradient reaches `rows`", looped(rows_of=lambda rows: rows.detach())),
    ("an id is not a place in the prompt", by_id),
    ("has shape (2, 6, 1)", lambda vectors, tokens, ids, rows: torch.isin(tokens, ids)[..., None].float()),
]:
    wrong("replace_token_embedding", words)(answer)


# --- prior_preservation_loss ----------------------------------------------------------------------------------

@right("prior_preservation_loss")
def by_slices(losses, weight):
    n = len(losses) // 2
    return losses[:n].mean() + weight * losses[n:].mean()


@right("prior_preservation_loss")
def by_view(losses, weight):
    thing, kind = losses.view(2, -1).mean(dim=1)
    return thing + kind * weight


@right("prior_preservation_loss")
def by_weights(losses, weight):
    n = len(losses) // 2
    return (losses * torch.tensor([1.0] * n + [weight] * n)).sum() / n


def halves(join, reduce=torch.mean, split=lambda losses: losses.chunk(2)):
    def prior_preservation_loss(losses, weight):
        return join(*(reduce(half) for half in split(losses)), weight)
    return prior_preservation_loss


for words, answer in [
    ("belongs to the class's half", halves(lambda a, b, w: w * a + b)),
    ("the weight is not used", halves(lambda a, b, w: a + b)),
    ("the mean over all images", lambda losses, weight: losses.mean()),
    ("both halves are multiplied", halves(lambda a, b, w: w * (a + b))),
    ("sums in place of means", halves(lambda a, b, w: a + w * b, reduce=torch.sum)),
    ("do not take turns", halves(lambda a, b, w: a + w * b, split=lambda losses: (losses[::2], losses[1::2]))),
    ("the thing's part is not weighed", halves(lambda a, b, w: (1 - w) * a + w * b)),
    ("the class is missing", halves(lambda a, b, w: a)),
    ("halved as well", halves(lambda a, b, w: (a + w * b) / 2)),
    ("The loss has shape (3,)", halves(lambda a, b, w: a + w * b, reduce=lambda half: half)),
    ("is a float where it must be a tensor", halves(lambda a, b, w: (a + w * b).item())),
]:
    wrong("prior_preservation_loss", words)(answer)


# --- dreambooth_loss ----------------------------------------------------------------------------------

@right("dreambooth_loss")
def by_slices_of_losses(network, schedule, latents, contexts, generator, prior_weight=1.0):
    n = len(latents[0])
    context = torch.cat([one.expand(n, -1, -1) for one in contexts])
    losses = diffusion_losses(network, schedule, torch.cat(tuple(latents)), context, generator)
    loss = losses[:n].mean()
    if len(latents) > 1:
        loss = loss + prior_weight * losses[n:].mean()
    return loss


@right("dreambooth_loss")
def by_index_of_prompts(network, schedule, latents, contexts, generator, prior_weight=1.0):
    which = torch.tensor([i for i, part in enumerate(latents) for _ in part])
    losses = diffusion_losses(network, schedule, torch.cat([*latents]), contexts[which], generator)
    weights = torch.tensor([1.0, prior_weight])[which]
    return (weights * losses).sum() / len(latents[0])


def loss_with(context=lambda contexts, n: contexts.repeat_interleave(n, 0),
              join=lambda a, b, w: a.mean() + w * b.mean(), alone=lambda losses: losses.mean()):
    def dreambooth_loss(network, schedule, latents, contexts, generator, prior_weight=1.0):
        n = len(latents[0])
        losses = diffusion_losses(network, schedule, torch.cat(list(latents)), context(contexts, n), generator)
        return join(losses[:n], losses[n:], prior_weight) if len(latents) == 2 else alone(losses)
    return dreambooth_loss


def two_runs(network, schedule, latents, contexts, generator, prior_weight=1.0):
    parts = [diffusion_losses(network, schedule, part, context.expand(len(part), -1, -1), generator).mean()
             for part, context in zip(latents, contexts, strict=True)]
    return parts[0] + sum(prior_weight * part for part in parts[1:])


for words, answer in [
    ("prompts take turns", loss_with(context=lambda contexts, n: torch.cat([contexts] * n))),
    ("under the thing's prompt", loss_with(context=lambda contexts, n: contexts[:1].expand(n * len(contexts), -1, -1))),
    ("have changed places", loss_with(context=lambda contexts, n: contexts.flip(0).repeat_interleave(n, 0))),
    ("`prior_weight` is not used", loss_with(join=lambda a, b, w: a.mean() + b.mean())),
    ("the mean over all images", loss_with(join=lambda a, b, w: torch.cat([a, b]).mean())),
    ("on the thing's half", loss_with(join=lambda a, b, w: w * a.mean() + b.mean())),
    ("the class's part is missing", loss_with(join=lambda a, b, w: a.mean())),
    ("The loss has shape (3,)", loss_with(join=lambda a, b, w: a + w * b)),
    ("it needs as many of each", loss_with(context=lambda contexts, n: contexts)),
    ("The network is run 2 times", two_runs),
    ("not enough values to unpack", lambda network, schedule, latents, contexts, generator, prior_weight=1.0:
        one_batch_always(network, schedule, latents, contexts, generator, prior_weight)),
]:
    wrong("dreambooth_loss", words)(answer)


def one_batch_always(network, schedule, latents, contexts, generator, prior_weight):
    thing, kind = latents
    context = contexts.repeat_interleave(len(thing), 0)
    a, b = diffusion_losses(network, schedule, torch.cat([thing, kind]), context, generator).chunk(2)
    return a.mean() + prior_weight * b.mean()


# --- lora_delta ---------------------------------------------------------------------------------------

@right("lora_delta")
def by_einsum(down, up, alpha=None):
    r = down.shape[0]
    return torch.einsum("or,ri->oi", up, down) * ((r if alpha is None else alpha) / r)


@right("lora_delta")
def by_scaled_up(down, up, alpha=None):
    if alpha is not None:
        up = up * alpha / up.shape[1]
    return up @ down


def product(scale, default=1.0, order=lambda down, up: up @ down):
    def lora_delta(down, up, alpha=None):
        return order(down, up) * (default if alpha is None else scale(down, up, alpha))
    return lora_delta


for words, answer in [
    ("alpha is not used", product(lambda down, up, alpha: 1.0)),
    ("not divided by the rank", product(lambda down, up, alpha: alpha)),
    ("upside down", product(lambda down, up, alpha: down.shape[0] / alpha if alpha else 0.0)),
    ("by the number of outputs", product(lambda down, up, alpha: alpha / up.shape[0])),
    ("by the number of inputs", product(lambda down, up, alpha: alpha / down.shape[-1])),
    ("root of the rank", product(lambda down, up, alpha: alpha / up.shape[1] ** 0.5)),
    ("not 1 / r", product(lambda down, up, alpha: alpha / len(down), default=1 / 4)),
    ("`if alpha` takes it for none", lambda down, up, alpha=None: up @ down * (alpha / len(down) if alpha else 1.0)),
    ("has shape (6, 5)", product(lambda down, up, alpha: alpha / len(down), order=lambda down, up: (up @ down).T)),
    ("It raises RuntimeError", product(lambda down, up, alpha: alpha / len(down), order=lambda down, up: down @ up)),
]:
    wrong("lora_delta", words)(answer)


# --- LoRALinear ---------------------------------------------------------------------------------------

class Straight(nn.Module):
    """As it is asked for; what is wrong in others is changed in a subclass."""

    freeze, start, zero = True, torch.randn, torch.zeros

    def __init__(self, base, rank, alpha=None):
        super().__init__()
        self.base = base
        if self.freeze:
            for parameter in base.parameters():
                parameter.requires_grad = False
        o, i = base.weight.shape
        self.down = nn.Parameter(type(self).start(rank, i) / i**0.5)
        self.up = nn.Parameter(type(self).zero(o, rank))
        self.scale = self.scale_of(rank, alpha)

    def scale_of(self, rank, alpha):
        return 1.0 if alpha is None else alpha / rank

    def forward(self, x):
        return self.base(x) + self.scale * self.beside(x)

    def beside(self, x):
        return F.linear(F.linear(x, self.down), self.up)

    def merged(self):
        layer = nn.Linear(self.base.in_features, self.base.out_features)
        layer.weight.data = self.base.weight.data + self.scale * self.up.data @ self.down.data
        layer.bias.data = self.base.bias.data.clone()
        return layer


right("LoRALinear")(Straight)


@right("LoRALinear")
class ByWeight(nn.Module):
    """The weight is put together at each call: slower, and the same up to rounding."""

    def __init__(self, base, rank, alpha=None):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.alpha = rank if alpha is None else alpha
        self.down = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank))

    def weight(self):
        return self.base.weight + lora_delta(self.down, self.up, self.alpha)

    def forward(self, x):
        return F.linear(x, self.weight(), self.base.bias)

    def merged(self):
        made = copy.deepcopy(self.base)
        made.weight = nn.Parameter(self.weight().detach())
        return made


def merged_in_place(self):
    with torch.no_grad():
        self.base.weight += self.scale * self.up @ self.down
    return self.base


def merged_without_scale(self):
    made = copy.deepcopy(self.base)
    made.weight.data += self.up.data @ self.down.data
    return made


def merged_without_base(self):
    made = copy.deepcopy(self.base)
    made.weight.data = self.scale * self.up.data @ self.down.data
    return made


for words, parts in [
    ("which of down and up must start at zero?", {"zero": torch.randn}),
    ("no gradient reaches either, for ever", {"start": torch.zeros}),
    ("The base is not frozen", {"freeze": False}),
    ("the LoRA's part is not added", {"forward": lambda self, x: self.base(x) + 0 * self.beside(x)}),
    ("does not give what the base gives, to the bit", {"forward": lambda self, x: self.scale * self.beside(x)}),
    ("alpha is not used", {"scale_of": lambda self, rank, alpha: 1.0}),
    ("not divided by the rank", {"scale_of": lambda self, rank, alpha: 1.0 if alpha is None else alpha}),
    ("an activation between down and up",
     {"beside": lambda self, x: F.linear(F.linear(x, self.down).relu(), self.up)}),
    ("changes the base itself", {"merged": merged_in_place}),
    ("the scale is forgotten when merging", {"merged": merged_without_scale}),
    ("the weight that was there is missing", {"merged": merged_without_base}),
    ("must return an nn.Linear", {"merged": lambda self: self.scale * self.up @ self.down + self.base.weight}),
    ("It raises TypeError", {"forward": lambda self, x: self.base(x) + self.scale * self.beside}),
]:
    wrong("LoRALinear", words)(type("LoRALinear", (Straight,), parts))


@wrong("LoRALinear", "What learns is down: it must be down and up")
class UpIsFrozen(Straight):
    def __init__(self, base, rank, alpha=None):
        super().__init__(base, rank, alpha)
        self.up.requires_grad = False


@wrong("LoRALinear", "here it is the other way round")
class ZeroBelow(Straight):
    def __init__(self, base, rank, alpha=None):
        super().__init__(base, rank, alpha)
        nn.init.zeros_(self.down)
        nn.init.normal_(self.up)


# --- merge_weight ------------------------------------------------------------------------------------

@right("merge_weight")
def one_by_one(weight, changes):
    total = weight.float()
    for change, strength in changes:
        total = total + strength * change.delta().reshape(weight.shape)
    return total


@right("merge_weight")
def in_one_sum(weight, changes):
    deltas = [strength * lora_delta(change.down, change.up, change.alpha) for change, strength in changes]
    return weight.to(torch.float32) + sum(one.view_as(weight) for one in deltas)


@right("merge_weight")
def side_by_side(weight, changes):
    """The LoRAs of ranks r1 and r2 as one of rank r1 + r2."""
    total = weight.to(torch.float32)
    if changes:
        up = torch.cat([change.up * change.scale * strength for change, strength in changes], dim=1)
        total = total + (up @ torch.cat([change.down for change, _ in changes])).view(weight.shape)
    return total


def sum_of(step=lambda total, d, s: total + s * d, delta=lambda one: one.delta(), which=lambda changes: changes,
           start=lambda weight: weight.float(), end=lambda total, weight, n: total):
    def merge_weight(weight, changes):
        total = start(weight)
        for change, strength in which(changes):
            total = step(total, delta(change).reshape(weight.shape), strength)
        return end(total, weight, len(changes))
    return merge_weight


def into_it(weight, changes):
    for change, strength in changes:
        weight += strength * change.delta().reshape(weight.shape)
    return weight.float()


def in_its_own_precision(weight, changes):
    return sum_of(start=lambda weight: weight.clone(), step=lambda total, d, s: total + (s * d).to(total))(
        weight, changes)


for words, answer in [
    ("the strengths are not used", sum_of(step=lambda total, d, s: total + d)),
    ("counts twice", sum_of(step=lambda total, d, s: total + s**2 * d)),
    ("only the last LoRA is there", sum_of(which=lambda changes: changes[-1:])),
    ("only the first LoRA is there", sum_of(which=lambda changes: changes[:1])),
    ("alpha is not used", sum_of(delta=lambda one: one.up @ one.down)),
    ("they add up", sum_of(end=lambda total, weight, n: weight + (total - weight) / max(1, n))),
    ("blended away", sum_of(step=lambda total, d, s: total * (1 - s) + d * s)),
    ("its sign is lost", sum_of(step=lambda total, d, s: total + abs(s) * d)),
    ("this is the change alone", sum_of(start=lambda weight: torch.zeros(weight.shape))),
    ("changes its argument `weight` in place", into_it),
    ("make the sum in float32", in_its_own_precision),
    ("has shape", lambda weight, changes: weight.float() + sum(s * one.delta() for one, s in changes)),
]:
    wrong("merge_weight", words)(answer)
