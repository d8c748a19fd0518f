"""Exercises of notebook 09: textual inversion's token embedding, prior preservation, DreamBooth's loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from ...config import NoiseConfig
from ...finetune import diffusion_losses, dreambooth_loss, prior_preservation_loss, replace_token_embedding
from ...schedule import NoiseSchedule
from ..testing import randn, require, require_shape
from . import lesson

# --- 9.1 ----------------------------------------------------------------------------------------------

rows_of = lesson.exercise(
    1, replace_token_embedding, grade="supported", minutes=10,
    asks="Write `replace_token_embedding(vectors, tokens, ids, rows)`: the token vectors (B, M, D) of `tokens` "
         "(B, M), but where a "
         "token is ids[k] its vector is rows[k], for every k: a word may be several tokens. Gradients must reach "
         "`rows` (n, D); nothing is changed in place.",
    hints=["Which places hold token ids[k]? `tokens == ids[k]` is a mask (B, M), to be spread over the D channels with "
           "`[..., None]`.",
           "`torch.where(mask[..., None], rows[k], vectors)` makes a new tensor, and autograd knows the way back to "
           "both.",
           "A loop over k: `for one, row in zip(ids, rows): vectors = torch.where((tokens == one)[..., None], row, "
           "vectors)`; then return them."])

VECTORS = randn(2, 6, 3, seed=1)                                                    # (B, M, D)
TOKENS = torch.tensor([[9, 4, 7, 8, 2, 2], [9, 7, 5, 7, 8, 2]])                     # (B, M)
IDS, ROWS = torch.tensor([7, 8]), randn(2, 3, seed=2)                               # (n,), (n, D)


@rows_of.test("shape")
def vectors_again(exchanged):
    require_shape(exchanged(VECTORS, TOKENS, IDS, ROWS), (2, 6, 3))


@rows_of.test("value")
def of_one_token(exchanged):
    exchanged.agrees(lambda answer: answer(VECTORS, TOKENS, IDS[:1], ROWS[:1]), what="With one new token, the result")


@rows_of.test("value")
def of_a_word_of_two_tokens(exchanged):
    exchanged.agrees(lambda answer: answer(VECTORS, TOKENS, IDS, ROWS), what="With two new tokens, the result")


@rows_of.test("edge case")
def where_the_word_is_not_there(exchanged):
    exchanged.agrees(lambda answer: answer(VECTORS, TOKENS, torch.tensor([3]), ROWS[:1]),
                     what="For prompts without the word, the result")


@rows_of.test("edge case")
def gradients_reach_the_vector(exchanged):
    with torch.enable_grad():
        found = exchanged(VECTORS, TOKENS, IDS, ROWS.clone().requires_grad_())
    require(found.requires_grad, "No gradient reaches `rows`: take them as they are, without `.detach()`, `.data`, "
                                 "`.tolist()` or `no_grad`, or nothing will be learnt")


def by_masks(place: Callable = lambda tokens, one: tokens == one, put: Callable = lambda row, vectors: row,
             row_of: Callable = lambda rows, k: rows[k]) -> Callable:
    def answer(vectors, tokens, ids, rows):
        for k, one in enumerate(ids):
            vectors = torch.where(place(tokens, one)[..., None], put(row_of(rows, k), vectors), vectors)
        return vectors
    return answer


def at_places(vectors: Tensor, tokens: Tensor, ids: Tensor, rows: Tensor) -> Tensor:
    vectors = vectors.clone()
    for k, one in enumerate(ids.tolist()):
        vectors[:, one % vectors.shape[1]] = rows[k]
    return vectors


def first_places(tokens: Tensor, one: Tensor) -> Tensor:
    same = tokens == one
    return same & (same.cumsum(dim=1) == 1)


for diagnosis, answer in [
    ("the row is added to the old vector: it must take its place", by_masks(put=lambda row, vectors: vectors + row)),
    ("only ids[0] is looked for: a word may be several tokens, so go through all of `ids`",
     lambda vectors, tokens, ids, rows: by_masks()(vectors, tokens, ids[:1], rows)),
    ("only the last of `ids` is exchanged: each step has to go on from the result of the one before",
     lambda vectors, tokens, ids, rows: by_masks()(vectors, tokens, ids[-1:], rows[-1:])),
    ("all new tokens get the first row: token ids[k] gets rows[k]", by_masks(row_of=lambda rows, k: rows[0])),
    ("the rows come in the wrong order: token ids[k] gets rows[k]", by_masks(row_of=lambda rows, k: rows[-1 - k])),
    ("only the first place of the token in a prompt is changed: a word may come twice", by_masks(place=first_places)),
    ("it is the other way round: the new token has its old vector and all others are replaced",
     by_masks(place=lambda tokens, one: tokens != one)),
    ("only the first prompt is changed", by_masks(
        place=lambda tokens, one: (tokens == one) & (torch.arange(len(tokens)) == 0)[:, None])),
    ("an id is not a place in the prompt: look where `tokens` equals it", at_places),
    ("nothing is changed", by_masks(put=lambda row, vectors: vectors)),
]:
    rows_of.mistake(diagnosis)(answer)


# --- 9.2 ----------------------------------------------------------------------------------------------

prior = lesson.exercise(
    2, prior_preservation_loss, grade="guided", minutes=4,
    asks="Write `prior_preservation_loss(losses, weight)`: DreamBooth's loss from those of the images, (2B,): "
         "first B of the "
         "thing, then B of its class. The mean of the first half plus `weight` times the mean of the second.",
    hints=["The thing's losses come first, then as many of the class's: `losses.chunk(2)` gives both halves.",
           "The result is one number, to call `backward()` on: a tensor with no dimensions.",
           "`thing.mean() + weight * kind.mean()`"])

LOSSES = torch.tensor([0.9, 0.5, 0.1, 0.3, 0.2, 0.8])


@prior.test("shape")
def a_scalar(prior_preserved):
    require_shape(prior_preserved(LOSSES, 1.0), (), "The loss")


@prior.test("value")
def both_parts(prior_preserved):
    prior_preserved.agrees(lambda answer: answer(LOSSES, 0.7), tol=1e-5, what="With a weight of 0.7 the loss")


@prior.test("edge case")
def no_prior(prior_preserved):
    prior_preserved.agrees(lambda answer: [answer(LOSSES, 0.0), answer(LOSSES, 3.0)], tol=1e-5,
                           what="With weights of 0 and 3, the pair of losses")


for diagnosis, answer in [
    ("the weight belongs to the class's half, not to the thing's", lambda x, w: w * x[:3].mean() + x[3:].mean()),
    ("the weight is not used", lambda x, w: x[:len(x) // 2].mean() + x[len(x) // 2:].mean()),
    ("this is the mean over all images: the two halves are weighed differently", lambda x, w: x.mean()),
    ("both halves are multiplied by the weight", lambda x, w: w * (x[:3].mean() + x[3:].mean())),
    ("sums in place of means: the loss would grow with the batch", lambda x, w: x[:3].sum() + w * x[3:].sum()),
    ("the two halves follow each other, they do not take turns", lambda x, w: x[::2].mean() + w * x[1::2].mean()),
    ("the parts need not add up to one: the thing's part is not weighed",
     lambda x, w: (1 - w) * x[:3].mean() + w * x[3:].mean()),
    ("the class is missing", lambda x, w: x[:3].mean()),
    ("the weighed sum is halved as well", lambda x, w: (x[:3].mean() + w * x[3:].mean()) / 2),
]:
    prior.mistake(diagnosis)(answer)


# --- 9.3 ----------------------------------------------------------------------------------------------

whole = lesson.exercise(
    3, dreambooth_loss, grade="on your own", minutes=15,
    asks="Write `dreambooth_loss(network, schedule, latents, contexts, generator, prior_weight=1.0)`: the diffusion "
         "loss of one run of the network on images of the thing, and of its class where `latents` holds both.",
    hints=["One batch for one run: `torch.cat(list(latents))` is (B or 2B, C, h, w). It needs as many contexts.",
           "Each prompt belongs to B images in a row: `repeat_interleave` repeats a row at once, `repeat` the whole "
           "list.",
           "`diffusion_losses(network, schedule, batch, each, generator)` gives the losses (B or 2B,); with two kinds "
           "`prior_preservation_loss` makes one number of them, with one their mean."])

SCHEDULE = NoiseSchedule(NoiseConfig())
THING, KIND = randn(3, 4, 2, 2, seed=3), randn(3, 4, 2, 2, seed=4)                  # (B, C, h, w)
CONTEXTS = randn(2, 5, 4, seed=5)                                                   # (2, M, T)


def toy_network(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
    """Something that depends on all it is given. Raises ValueError for a batch that does not fit."""
    if not len(x) == len(context) == len(t):
        raise ValueError(f"the network is given {len(x)} latents, {len(context)} contexts and {len(t)} timesteps: it "
                         "needs as many of each")
    text = context.mean(dim=1)[:, :, None, None] * torch.linspace(1, 3, 4)[:, None, None]
    return 0.3 * x + text + t[:, None, None, None] / 1000


def of_both(answer: Callable, weight: float | None = None) -> Tensor:
    given = () if weight is None else (weight,)
    return answer(toy_network, SCHEDULE, [THING, KIND], CONTEXTS, torch.Generator().manual_seed(0), *given)


@whole.test("shape")
def one_number(dreambooth_loss):
    require_shape(of_both(dreambooth_loss), (), "The loss")


@whole.test("shape")
def one_network_call(dreambooth_loss):
    seen = []

    def counted(x, t, context):
        seen.append(len(x))
        return toy_network(x, t, context)
    dreambooth_loss(counted, SCHEDULE, [THING, KIND], CONTEXTS, torch.Generator().manual_seed(0))
    require(seen == [6], f"The network is run {len(seen)} times, on {', '.join(map(str, seen)) or 'no'} latents: once, "
                         "on all 6, is asked for")


@whole.test("value")
def the_thing_alone(dreambooth_loss):
    dreambooth_loss.agrees(lambda answer: answer(toy_network, SCHEDULE, [THING], CONTEXTS[:1],
                                                 torch.Generator().manual_seed(0)), what="Without a class, the loss")


@whole.test("value")
def with_its_class(dreambooth_loss):
    dreambooth_loss.agrees(lambda answer: of_both(answer, 0.5), what="With a class of weight 0.5, the loss")


@whole.test("edge case")
def weights_of_one_and_none(dreambooth_loss):
    dreambooth_loss.agrees(lambda answer: [of_both(answer), of_both(answer, 0.0)],
                           what="With the weight left out, and with 0, the pair of losses")


def composed(spread: Callable = lambda contexts, n: contexts.repeat_interleave(n, dim=0),
             order: Callable = list, both: Callable = prior_preservation_loss,
             alone: Callable = Tensor.mean) -> Callable:
    def answer(network, schedule, latents, contexts, generator, prior_weight=1.0):
        batch = order(latents)
        losses = diffusion_losses(network, schedule, torch.cat(batch), spread(contexts, len(latents[0])), generator)
        return both(losses, prior_weight) if len(latents) == 2 else alone(losses)
    return answer


for diagnosis, parts in [
    ("thing's and class's prompts take turns: the first B images all have the first prompt",
     {"spread": lambda contexts, n: contexts.repeat(n, 1, 1)}),
    ("all images are shown under the thing's prompt", {
        "spread": lambda contexts, n: contexts[:1].repeat(n * len(contexts), 1, 1)}),
    ("the prompts have changed places", {"spread": lambda contexts, n: contexts.flip(0).repeat_interleave(n, dim=0)}),
    ("`prior_weight` is not used", {"both": lambda losses, weight: prior_preservation_loss(losses, 1.0)}),
    ("the mean over all images is taken: the class's half has a weight of its own",
     {"both": lambda losses, weight: losses.mean()}),
    ("the weight is on the thing's half",
     {"both": lambda losses, weight: prior_preservation_loss(losses.flip(0), weight)}),
    ("the class's part is missing", {"both": lambda losses, weight: losses.chunk(2)[0].mean()}),
    ("there is one kind of image only: its loss is the mean of all of them", {
        "alone": lambda losses: losses[:2].mean() + losses[2:].mean()}),
]:
    whole.mistake(diagnosis)(composed(**parts))
