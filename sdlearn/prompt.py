r"""Prompt weighting, and prompts longer than the text encoder's context length.

B  prompts       K  chunks of a prompt        L  places of the text encoder, 77
T  width         M  tokens, K * L

    "a (red:1.3) cat"  ── parse_weights ──         a | red, 1.3 | cat
                       ── split_weighted_words ──  words, each with its ids and its weight
                       ── encode_prompts ──        rows of L ids, hidden states, times the weights     (B, M, T)

A weight multiplies the hidden states of its words, as in AUTOMATIC1111's web UI, whose form
`(words:1.3)` is the only one read here. Beyond L tokens a prompt is cut, or read in chunks: rows of their
own, of which none sees another, laid end to end for the U-Net to attend to.
"""

import re
from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from .clip import TextEncoder
from .tokenizer import LENGTH, Tokenizer

MAX_WEIGHT = 10.0
MIN_MEAN_TO_STD = 0.02                  # share of the standard deviation below which a mean of hidden states is noise
LONG = ("cut", "chunks")        # what becomes of a prompt past the encoder's places
MARKS = re.compile(r"""
    (?P<plain> \\[()] )
  | (?P<open>  \( )
  | (?P<close> (?: : \s* (?P<number> [+-]? (?: (?: [0-9]+ (?:\.[0-9]*)? | \.[0-9]+ ) (?:e[+-]?[0-9]+)? | inf | nan ) )
               \s* )? \) )
    """, re.VERBOSE | re.IGNORECASE | re.ASCII)


class WeightedText(NamedTuple):
    """A part of a prompt and its attention weight."""

    text: str
    weight: float


class WeightedWord(NamedTuple):
    """A word as the tokenizer splits it, its token ids and its attention weight."""

    text: str
    ids: list[int]
    weight: float


def parse_weights(text: str) -> list[WeightedText]:
    r"""The pieces of a prompt, neighbours of different weight; one of weight 1 for a prompt without any.

    `(words:1.3)` gives the words the weight 1.3; nested weights multiply. `\(` and `\)` are plain
    parentheses. So is every other one, "(a cat)" or one without a partner: it stays in the text, and
    nothing else is ever changed in it. "(in 16:9)" does have the form; write `\(in 16:9\)`.
    Raises ValueError, with the place, for a weight that is not in -10...10.
    """
    if not isinstance(text, str):
        raise TypeError(f"A prompt must be a string, not {type(text).__name__}.")
    parts, opens, closes = _groups(text)
    runs, around = [], [1.0]
    for i, part in enumerate(parts):
        if i in opens:
            around.append(_product(around[-1], opens[i]))
        elif i in closes:
            around.pop()
        elif part:
            runs.append((part, around[-1]))
    pieces = [WeightedText("".join(part for part, _ in same), weight)
              for weight, same in groupby(runs, key=itemgetter(1))]
    return pieces or [WeightedText("", 1.0)]


def _groups(text: str) -> tuple[list[str], dict[int, re.Match], set[int]]:
    """The text in parts, and which of them open a weight, with the mark that closes it, and which close one."""
    parts, opens, closes = [], {}, set()
    opened, words, place = [], -1, 0            # parentheses still open; the last part that is not blank
    for mark in MARKS.finditer(text):
        parts.append(text[place:mark.start()])
        words = len(parts) - 1 if parts[-1].strip() else words
        parts.append(mark[0][-1] if mark["plain"] else mark[0])
        place = mark.end()
        if mark["open"]:
            opened.append(len(parts) - 1)
        start = opened.pop() if mark["close"] and opened else len(parts)
        if mark["number"] and words > start:
            opens[start] = mark
            closes.add(len(parts) - 1)
        elif mark["plain"] or mark["close"]:
            words = len(parts) - 1
    return [*parts, text[place:]], opens, closes


def _product(around: float, mark: re.Match) -> float:
    product = around * float(mark["number"])
    if not abs(product) <= MAX_WEIGHT:
        times = f", times the {around:g} around it" if around != 1 else ""
        raise ValueError(f"the prompt's weight {mark['number']}{times}, at character {mark.start('number')}, is not "
                         f"in -{MAX_WEIGHT:g}...{MAX_WEIGHT:g}: give another, or write \\( if no weight is meant")
    return product


def remove_weights(text: str) -> str:
    """The words of a prompt alone, without weights and backslashes. Errors as in `parse_weights`."""
    return "".join(piece.text for piece in parse_weights(text))


def split_weighted_words(text: str, tokenizer: Tokenizer) -> list[WeightedWord]:
    """The words of a prompt, with their ids and weights. Errors as in `parse_weights` and of the tokenizer.

    The ids are always those of `tokenizer.encode(plain(text))`: a weight never makes another token of a
    word. So a word in which a piece ends is not cut there; it has the weight that it begins with.
    """
    pieces = parse_weights(text)
    words = tokenizer.split_words("".join(piece.text for piece in pieces))
    weights, so_far = [], ""
    for piece in pieces[:-1]:
        so_far += piece.text
        begun = _begun(tokenizer.split_words(so_far), words)
        weights += [piece.weight] * (begun - len(weights))
    weights += [pieces[-1].weight] * (len(words) - len(weights))
    return [WeightedWord(word, list(tokenizer._encode_word(word)), weight)
            for word, weight in zip(words, weights, strict=True)]


def _begun(part: list[str], whole: list[str]) -> int:
    """How many words of the whole text begin in its first part, of which `part` are the words.

    They are the same up to the end of the part; a last one that differs is a word of the whole, cut.
    """
    same = next((i for i, (a, b) in enumerate(zip(part, whole, strict=False)) if a != b), min(len(part), len(whole)))
    return same + (same < min(len(part), len(whole)))


def get_truncated_text(text: str, tokenizer: Tokenizer, length: int = LENGTH) -> str:
    """The end of a prompt that a row of `length` tokens does not hold, cleaned; "" if all of it fits.

    That is what `encode_prompts` leaves out with "cut". Errors as in `split_weighted_words`.
    """
    return tokenizer.get_truncated_text(remove_weights(text), length)


def make_token_rows(words: Sequence[WeightedWord], tokenizer: Tokenizer, length: int,
                    long: str) -> list[tuple[list[int], list[float]]]:
    """Rows of `length` ids for the text encoder, and the weight of each place: start, words, end, padding.

    With "cut" one row, as `tokenizer(text, length)` makes it. With "chunks" as many as the words need, at
    least one; a word goes into the next row as a whole unless it is longer than a row. Start, end and
    padding have the weight 1.
    """
    room, chunks = length - 2, [[]]
    for word in words:
        tokens = [(i, word.weight) for i in word.ids]
        if long == "chunks" and len(chunks[-1]) + len(tokens) > room >= len(tokens):
            chunks.append([])
        for token in tokens:
            if long == "chunks" and len(chunks[-1]) == room:
                chunks.append([])
            chunks[-1].append(token)
    made = []
    for chunk in chunks:
        tokens = [(tokenizer.start, 1.0), *chunk[:room], (tokenizer.end, 1.0)]
        tokens += [(tokenizer.pad, 1.0)] * (length - len(tokens))
        made.append(([i for i, _ in tokens], [weight for _, weight in tokens]))
    return made


def encode_prompts(prompts: str | Sequence[str], tokenizer: Tokenizer, encoder: TextEncoder, *, long: str = "cut",
           restore_mean: bool = True) -> Tensor:
    """The prompt embeddings that the U-Net attends to, (B, M, T), of one prompt or several, on the encoder's device.

    long: "cut" leaves out what L places do not hold, so M = L (see `get_truncated_text`). "chunks" encodes
    every 75 tokens in a row of their own, with start, end and padding; shorter prompts of the same call
    get rows of the empty prompt, so that all have the same M = K * L. restore_mean: see `apply_weights`.
    Without weights, or with none but 1, "cut" gives exactly `encoder(tokenizer(prompts, L)).hidden`.

    Raises ValueError for another `long`, no prompts, a weight out of range, and a word whose id is past
    the encoder's vocabulary.
    """
    if long not in LONG:
        raise ValueError(f"long is '{long}': choose one of {', '.join(LONG)}")
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("there is no prompt to encode: give one or more; \"\" is the empty one")
    length, known = encoder.config.length, encoder.embeddings.token_embedding.num_embeddings
    sheets = []
    for text in texts:
        words = split_weighted_words(text, tokenizer)
        if strange := [word.text for word in words if max(word.ids) >= known]:
            raise ValueError(f"the text encoder knows {known} ids, and '{strange[0]}' has one past them: add its "
                             "embedding to the encoder, or take the tokenizer that belongs to it")
        sheets.append(make_token_rows(words, tokenizer, length, long))
    most = max(map(len, sheets))
    empty = make_token_rows([], tokenizer, length, long)
    flat = [row for sheet in sheets for row in sheet + empty * (most - len(sheet))]
    device = encoder.embeddings.token_embedding.weight.device
    hidden = encoder(torch.tensor([ids for ids, _ in flat]).to(device)).hidden                 # (B K, L, T)
    if any(weight != 1 for _, weights in flat for weight in weights):
        weights = torch.tensor([weights for _, weights in flat], dtype=hidden.dtype)         # (B K, L)
        hidden = apply_weights(hidden, weights.to(device), restore_mean=restore_mean)
    return hidden.reshape(len(texts), most * length, -1)                                     # (B, M, T)


def apply_weights(hidden: Tensor, weights: Tensor, *, restore_mean: bool = True) -> Tensor:
    """Hidden states (B, L, T) times the weight (B, L) of their token.

    Then, unless `restore_mean` is off, all of a row times one factor that gives it the mean it had, as
    AUTOMATIC1111's web UI does it. That factor is a quotient of two means, and says something only where they
    are well away from 0, as they are with OpenAI's CLIP (about -0.1, with a standard deviation near 1): a row
    whose mean is below `MIN_MEAN_TO_STD` of its standard deviation keeps its weights as they are. A row of weights 1
    stays as it is, bit by bit.
    """
    scaled = hidden * weights[:, :, None].to(hidden.dtype)
    if not restore_mean:
        return scaled
    exact = torch.promote_types(hidden.dtype, torch.float32)
    before, after = (each.mean(dim=(1, 2), keepdim=True, dtype=exact) for each in (hidden, scaled))  # (B, 1, 1)
    least = MIN_MEAN_TO_STD * hidden.to(exact).std(dim=(1, 2), keepdim=True)
    factor = torch.where(torch.minimum(before.abs(), after.abs()) > least, before / after, 1.0)
    return (scaled * factor).to(hidden.dtype)
