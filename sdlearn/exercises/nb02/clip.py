"""Exercises of notebook 02: causal mask, QuickGELU, pooling, contrastive loss, zero-shot classification."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...clip import contrastive_loss, quick_gelu, similarity_logits
from ..testing import randn, require, require_shape
from . import lesson

# --- 2.4 ----------------------------------------------------------------------------------------------

def causal_mask(length: int) -> Tensor:
    """(L, L), True where a row's token may look: at itself and at those before it."""
    return torch.ones(length, length, dtype=torch.bool).tril()


mask = lesson.exercise(
    4, causal_mask, grade="guided", minutes=2,
    asks="Write `causal_mask(length)`: (L, L) of bool; row i is True at the positions that token i may attend to.",
    hints=["Write the mask for three tokens on paper: token 0 sees one place, token 2 sees three.",
           "`torch.ones(L, L, dtype=torch.bool)` is the mask of an encoder that sees all; `.tril()` and `.triu()` each "
           "keep a triangle of it."])


@mask.test("shape")
def a_square_of_bool(causal_mask):
    require_shape(causal_mask(4), (4, 4))
    causal_mask.agrees(lambda answer: answer(4), what="The mask")


@mask.test("value")
def as_many_as_stand_before(causal_mask):
    causal_mask.agrees(lambda answer: answer(7), what="With 7 tokens, the mask")


@mask.test("edge case")
def one_token_attends_to_itself(causal_mask):
    causal_mask.agrees(lambda answer: answer(1), what="With one token, the mask")


def ones(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool)


for diagnosis, answer in [
    ("a token attends to later ones: this is the other triangle", lambda length: ones(length).triu()),
    ("a token must see itself too: keep the diagonal", lambda length: ones(length).tril(-1)),
    ("True says what is forbidden here, and it must say what is allowed", lambda length: ones(length).triu(1)),
    ("a token attends to the next one: the diagonal is the last to allow", lambda length: ones(length).tril(1)),
    ("nothing is masked: every token sees all", ones),
    ("the mask is to say where to look, True or False, not how much",
     lambda length: ones(length).tril().float()),
    ("this is a mask to be added to the scores: give the one of True and False",
     lambda length: torch.zeros(length, length).masked_fill(~ones(length).tril(), -torch.inf)),
]:
    mask.mistake(diagnosis)(answer)


# --- 2.5 ----------------------------------------------------------------------------------------------

gelu = lesson.exercise(
    5, quick_gelu, grade="guided", minutes=2,
    asks="Write `quick_gelu(x)`: x times the sigmoid of 1.702 x.",
    hints=["`torch.sigmoid` works element by element.", "`x * torch.sigmoid(1.702 * x)`."])

POINTS = torch.linspace(-2.5, 2.5, 21)


@gelu.test("shape")
def element_by_element(quick_gelu):
    require_shape(quick_gelu(randn(2, 3, 4)), (2, 3, 4))


@gelu.test("value")
def along_a_line(quick_gelu):
    quick_gelu.agrees(lambda answer: answer(POINTS), what="The result at -2.5 ... 2.5")


@gelu.test("edge case")
def far_from_zero(quick_gelu):
    quick_gelu.agrees(lambda answer: answer(torch.tensor([-200.0, 0.0, 200.0])), what="At -200, 0 and 200, the result")


def by_exp(x: Tensor) -> Tensor:
    return x * (1.702 * x).exp() / (1 + (1.702 * x).exp())


for diagnosis, answer in [
    ("this is the sigmoid alone: x itself is multiplied by it", lambda x: torch.sigmoid(1.702 * x)),
    ("this is SiLU: where is the 1.702?", F.silu),
    ("1.702 belongs inside of the sigmoid", lambda x: 1.702 * x * torch.sigmoid(x)),
    ("1.702 is in the sigmoid, and in front of it as well", lambda x: 1.702 * x * torch.sigmoid(1.702 * x)),
    ("this is the exact GELU, which SD 2.x has: CLIP's quick one is a sigmoid", F.gelu),
    ("this is the GELU by tanh, another approximation", lambda x: F.gelu(x, approximate="tanh")),
    ("this is ReLU", F.relu),
    ("x must be multiplied once with the sigmoid, not added to it", lambda x: x + torch.sigmoid(1.702 * x)),
    ("exp overflows far from zero: `torch.sigmoid` is made so that it does not", by_exp),
]:
    gelu.mistake(diagnosis)(answer)


# --- 2.6 ----------------------------------------------------------------------------------------------

def pooled(hidden: Tensor, ids: Tensor, end: int) -> Tensor:
    """Hidden states (B, L, D) at the first end token of each row of ids (B, L): (B, D)."""
    places = (ids == end).int().argmax(dim=1)                                       # (B,)
    return hidden[torch.arange(len(ids)), places]


pool = lesson.exercise(
    6, pooled, grade="supported", minutes=5,
    asks="Write `pooled(hidden, ids, end)`: the hidden state (B, L, D) at the first end token of each row, (B, D).",
    beyond="In the package it is the last lines of `TextEncoder.forward`, where a row without an end token is read at "
           "its first one.",
    hints=["First the places: where is the first `end` in each row of ids?",
           "`(ids == end).int().argmax(dim=1)` gives the first of the largest, and True is larger than False.",
           "Row b wants place `places[b]`: index with two lists of the same length, `hidden[rows, places]`."])

END = 90
IDS = torch.tensor([[89, 5, 7, END, END, END], [89, 3, 4, 6, 8, END], [89, END, END, END, END, END]])   # (B, L)
HIDDEN = randn(3, 6, 4)                                                             # (B, L, D)
GROWN = torch.tensor([[89, 95, 7, END, END, END], [89, 3, 91, 6, END, 0]])          # with words added after `end`


@pool.test("shape")
def one_vector_a_row(pooled):
    pooled.agrees(lambda answer: answer(HIDDEN, IDS, END) * 0)


@pool.test("value")
def at_the_end_of_each_row(pooled):
    zeros = torch.where(torch.arange(6) > (IDS == END).int().argmax(1, keepdim=True), 0, IDS)
    pooled.agrees(lambda answer: answer(HIDDEN, zeros, END), what="With rows filled up by zeros, the result")


@pool.test("value")
def padding_does_not_matter(pooled):
    pooled.agrees(lambda answer: answer(HIDDEN, IDS, END), what="With rows filled up by end tokens, the result")


@pool.test("edge case")
def words_added_later(pooled):
    pooled.agrees(lambda answer: answer(HIDDEN[:2], GROWN, END), what="With ids above the end token's, the result")


def rows_at(places) -> Callable:
    return lambda hidden, ids, end: hidden[torch.arange(len(ids)), places(ids, end)]


def first(ids: Tensor, end: int) -> Tensor:
    return (ids == end).int().argmax(dim=1)


for diagnosis, answer in [
    ("this is the last end token of a row: those after the first are padding",
     rows_at(lambda ids, end: ids.shape[1] - 1 - (ids == end).flip(1).int().argmax(1))),
    ("this is the last place of a row, which is padding in most: look for the end token",
     lambda hidden, ids, end: hidden[:, -1]),
    ("this is the first place, where the start token has seen nothing", lambda hidden, ids, end: hidden[:, 0]),
    ("this is the mean of all places", lambda hidden, ids, end: hidden.mean(dim=1)),
    ("the places are one too early: this is the last word, not the end token",
     rows_at(lambda ids, end: first(ids, end) - 1)),
    ("the place of the largest id is not the end token's once words are added: compare with `end`",
     rows_at(lambda ids, end: ids.argmax(dim=1))),
    ("every row is read at the places of all rows: index rows and places together",
     lambda hidden, ids, end: hidden[:, first(ids, end)]),
    ("all end tokens of a row are taken, those of the padding too: take the first alone",
     lambda hidden, ids, end: hidden[ids == end]),
    ("this is the sum over all end tokens, padding too: take the first alone",
     lambda hidden, ids, end: (hidden * (ids == end)[..., None]).sum(1)),
    ("this is the mean of the words: only the state at the end token is asked for",
     lambda hidden, ids, end: torch.stack([h[:n].mean(0) for h, n in zip(hidden, first(ids, end), strict=True)])),
]:
    pool.mistake(diagnosis)(answer)


# --- 2.7 ----------------------------------------------------------------------------------------------

contrast = lesson.exercise(
    7, contrastive_loss, grade="supported", minutes=8, also=[similarity_logits],
    asks="Write `contrastive_loss(image_embeds, text_embeds, logit_scale)`: symmetric InfoNCE of unit vectors (B, S) "
         "whose rows belong together; `logit_scale` is the logarithm of the scale, which stays at or below 100.",
    beyond="The package's checks the shapes, and keeps autocast out.",
    hints=["First the matrix of cosines (B, B), images in rows, times the scale. Which entries belong together?",
           "Row i is a classification among B texts, and i is the right class: "
           "`F.cross_entropy(logits, torch.arange(B))`.",
           "The same along the columns: transpose. The loss is the mean of the two.",
           "The scale is `logit_scale.exp()`, and `.clamp(max=100)` keeps it in bounds."])

IMAGES, TEXTS = (F.normalize(randn(5, 8, seed=seed), dim=-1) for seed in (1, 2))    # (B, S)
SCALE = torch.tensor(1.3)


@contrast.test("shape")
def one_number(contrastive_loss):
    require_shape(contrastive_loss(IMAGES, TEXTS, SCALE), ())


@contrast.test("value")
def of_random_vectors(contrastive_loss):
    contrastive_loss.agrees(lambda answer: answer(IMAGES, TEXTS, SCALE), what="The loss")


@contrast.test("value")
def both_directions_weigh_equally(contrastive_loss):
    there, back = contrastive_loss(IMAGES, TEXTS, SCALE), contrastive_loss(TEXTS, IMAGES, SCALE)
    require(torch.allclose(there, back, atol=1e-5), "The loss is another one when images and texts change places")


@contrast.test("edge case")
def equal_vectors_give_chance(contrastive_loss):
    same = IMAGES[:1].expand(5, -1)
    contrastive_loss.agrees(lambda answer: answer(same, same, SCALE), what="With five equal vectors, the loss")


@contrast.test("edge case")
def the_scale_stays_below_100(contrastive_loss):
    contrastive_loss.agrees(lambda answer: answer(IMAGES, TEXTS, torch.tensor(math.log(400.0))),
                            what="With a scale of 400, the loss")


def of_logits(made) -> Callable:
    return lambda images, texts, scale: made(scale.exp().clamp(max=100) * images @ texts.T,
                                             torch.arange(len(images)))


def scaled(by) -> Callable:
    def answer(images, texts, scale):
        logits, own = by(scale) * images @ texts.T, torch.arange(len(images))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2
    return answer


for diagnosis, answer in [
    ("only each image looks for its text: each text must look for its image as well",
     of_logits(lambda logits, own: F.cross_entropy(logits, own))),
    ("only each text looks for its image: each image must look for its text as well",
     of_logits(lambda logits, own: F.cross_entropy(logits.T, own))),
    ("the two directions are added where their mean is asked for",
     of_logits(lambda logits, own: F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own))),
    ("`logit_scale` is a logarithm: the scale is its exp", scaled(lambda scale: scale)),
    ("the cosines are not multiplied by the scale", scaled(lambda scale: 1.0)),
    ("the cosines are divided by the scale where they must be multiplied: it is one over the temperature",
     scaled(lambda scale: 1 / scale.exp())),
    ("the scale must stay at or below 100: the scale itself, after exp", scaled(lambda scale: scale.exp())),
    ("the losses of the rows are summed: the mean is asked for",
     of_logits(lambda logits, own: (F.cross_entropy(logits, own, reduction="sum")
                                    + F.cross_entropy(logits.T, own, reduction="sum")) / 2)),
    ("the softmax is taken twice: `F.cross_entropy` has it in it, and wants the logits themselves",
     of_logits(lambda logits, own: (F.cross_entropy(logits.softmax(1), own)
                                    + F.cross_entropy(logits.T.softmax(1), own)) / 2)),
    ("this only pulls together what belongs together: the other entries of a row must lose",
     of_logits(lambda logits, own: -logits.diag().mean())),
    ("the softmax of each row is missing: cross-entropy, not the sigmoid of each entry",
     of_logits(lambda logits, own: F.binary_cross_entropy_with_logits(logits, torch.eye(len(own))))),
]:
    contrast.mistake(diagnosis)(answer)


# --- 2.8 ----------------------------------------------------------------------------------------------

def zero_shot(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Cosines (B, C) of images (B, S) with classes, each of which is described by P sentences: (C, P, S).

    All vectors have length 1. A class is the mean of its sentences, brought back to length 1 (Radford et
    al. 2021, section 3.1.4).
    """
    classes = F.normalize(text_embeds.mean(dim=1), dim=-1)                          # (C, S)
    return image_embeds @ classes.T


classify = lesson.exercise(
    8, zero_shot, grade="on your own", minutes=8,
    asks="Write `zero_shot(image_embeds, text_embeds)`: cosines (B, C) of images (B, S) with C classes, described by "
         "P sentences each, (C, P, S). A class is the mean of its sentences' unit vectors, brought back to length 1.",
    hints=["Which axis of (C, P, S) holds the sentences of one class?",
           "The mean of unit vectors is shorter than 1, and shorter for a class whose sentences disagree.",
           "`F.normalize(x, dim=-1)` brings vectors to length 1; then one matrix product."])

IMAGES = F.normalize(randn(5, 8, seed=3), dim=-1)                                 # (B, S)
SAID = F.normalize(randn(4, 3, 8, seed=4), dim=-1)                                  # (C, P, S)


@classify.test("shape")
def each_image_with_each_class(zero_shot):
    zero_shot.agrees(lambda answer: answer(IMAGES, SAID) * 0)


@classify.test("value")
def one_sentence(zero_shot):
    zero_shot.agrees(lambda answer: answer(IMAGES, SAID[:, :1]), what="With one sentence a class, the result")


@classify.test("value")
def several_sentences(zero_shot):
    zero_shot.same(IMAGES, SAID)


@classify.test("edge case")
def a_class_whose_sentences_are_all_it_has(zero_shot):
    image = SAID[2].mean(0, keepdim=True)
    image = image / image.norm()
    require(torch.isclose(zero_shot(image, SAID)[0, 2], torch.ones(()), atol=1e-4),
            "An image that points where a class points has another cosine than 1 with it")


@classify.test("edge case")
def one_class_and_one_image(zero_shot):
    zero_shot.agrees(lambda answer: answer(IMAGES[:1], SAID[:1]), what="With one image and one class, the result")


for diagnosis, answer in [
    ("the mean of unit vectors is shorter than 1: bring it back to length 1",
     lambda images, texts: images @ texts.mean(1).T),
    ("this is the best of a class's sentences: their mean is asked for",
     lambda images, texts: (texts @ images.T).amax(1).T),
    ("only the first sentence of each class is read", lambda images, texts: images @ texts[:, 0].T),
    ("the mean runs over the classes: their sentences are axis 1",
     lambda images, texts: images @ F.normalize(texts.mean(0), dim=-1).T),
    ("cosines are asked for, not the shares of a softmax",
     lambda images, texts: zero_shot(images, texts).softmax(-1)),
    ("this is the number of the best class: give the cosines of all of them",
     lambda images, texts: zero_shot(images, texts).argmax(-1)),
    ("rows are classes: they must be images", lambda images, texts: zero_shot(images, texts).T),
    ("the vectors are brought to length 1 along the classes: along the last axis, each by itself",
     lambda images, texts: images @ F.normalize(texts.mean(1), dim=0).T),
]:
    classify.mistake(diagnosis)(answer)
