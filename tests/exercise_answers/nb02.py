"""Answers to the exercises of notebook 02."""

import math
from collections import Counter, defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from einops import reduce

from exercise_answers import right, wrong
from sdlearn.tokenizer import merge, to_symbols

# --- merge --------------------------------------------------------------------------------------------


@right("merge")
def with_a_for(symbols, pair):
    out, skip = [], False
    for here, following in zip(symbols, [*symbols[1:], None], strict=True):
        if skip:
            skip = False
        elif (here, following) == tuple(pair):
            out.append(here + following)
            skip = True
        else:
            out.append(here)
    return out


@right("merge")
def recursive(symbols, pair):
    if len(symbols) < 2:
        return list(symbols)
    if (symbols[0], symbols[1]) == pair:
        return [symbols[0] + symbols[1], *recursive(symbols[2:], pair)]
    return [symbols[0], *recursive(symbols[1:], pair)]


@wrong("merge", "only the first occurrence")
def with_index(symbols, pair):
    for i in range(len(symbols) - 1):
        if (symbols[i], symbols[i + 1]) == pair:
            return symbols[:i] + [symbols[i] + symbols[i + 1]] + symbols[i + 2:]
    return symbols


@wrong("merge", "advance by two")
def without_skipping(symbols, pair):
    out = []
    for i, one in enumerate(symbols):
        found = i + 1 < len(symbols) and (one, symbols[i + 1]) == pair
        out.append(one + symbols[i + 1] if found else one)
    return out


@wrong("merge", "the last symbol is lost")
def one_too_early(symbols, pair):
    i, out = 0, []
    while i + 1 < len(symbols):
        if (symbols[i], symbols[i + 1]) == pair:
            out += ["".join(pair)]
            i += 2
        else:
            out += [symbols[i]]
            i += 1
    return out


@wrong("merge", "runs past the end")
def index_error(symbols, pair):
    i, out = 0, []
    while i < len(symbols):
        if symbols[i] == pair[0] and symbols[i + 1] == pair[1]:
            out.append(pair[0] + pair[1])
            i = i + 2
        else:
            out.append(symbols[i])
            i = i + 1
    return out


@wrong("merge", "the text is searched")
def text_replaced(symbols, pair):
    return " ".join(symbols).replace(f"{pair[0]} {pair[1]}", pair[0] + pair[1]).split(" ")


@wrong("merge", "in place")
def popped(symbols, pair):
    i = 0
    while i < len(symbols) - 1:
        if (symbols[i], symbols[i + 1]) == pair:
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
        i += 1
    return symbols


for answer in (lambda symbols, pair: "".join(symbols), lambda symbols, pair: tuple(merge(symbols, pair)),
               lambda symbols, pair: [[one] for one in merge(symbols, pair)]):
    wrong("merge", "where it must give a list of strings")(answer)


# --- learn_merges -------------------------------------------------------------------------------------

@right("learn_merges")
def recounted(words):
    spelled = {word: to_symbols(word) for word in words}
    while True:
        counts = defaultdict(int)
        for word, symbols in spelled.items():
            for pair in zip(symbols, symbols[1:], strict=False):
                counts[pair] += words[word]
        if not counts:
            break
        best = sorted(counts, key=lambda pair: (-counts[pair], pair))[0]
        yield best
        spelled = {word: merge(symbols, best) for word, symbols in spelled.items()}


@right("learn_merges")
def as_a_list(words):
    texts, merges = [(to_symbols(word), times) for word, times in words.items()], []
    while any(len(symbols) > 1 for symbols, _ in texts):
        counts = Counter()
        for symbols, times in texts:
            for i in range(len(symbols) - 1):
                counts[symbols[i], symbols[i + 1]] += times
        most = max(counts.values())
        merges.append(min(pair for pair in counts if counts[pair] == most))
        texts = [(merge(symbols, merges[-1]), times) for symbols, times in texts]
    return merges


def learning(weight=lambda times: times, spell=to_symbols, best=None, unique=False, check=True):
    def learn_merges(words):
        texts = [(spell(word), weight(times)) for word, times in words.items()]
        while True:
            counts = Counter()
            for symbols, times in texts:
                pairs = list(zip(symbols, symbols[1:], strict=False))
                for pair in dict.fromkeys(pairs) if unique else pairs:
                    counts[pair] += times
            if check and not counts:
                return
            pair = best(counts) if best else min(counts, key=lambda one: (-counts[one], one))
            yield pair
            texts = [(merge(symbols, pair), times) for symbols, times in texts]
    return learn_merges


for words, answer in [
    ("every word counts once", learning(weight=lambda times: 1)),
    ("this takes the one met first", learning(best=lambda counts: counts.most_common(1)[0][0])),
    ("this takes the largest", learning(best=lambda counts: max((n, pair) for pair, n in counts.items())[1])),
    ("the end of a word is not marked", learning(spell=list)),
    ("occurs twice in a word counts twice", learning(unique=True)),
    ("occurs least often", learning(best=lambda counts: min((n, pair) for pair, n in counts.items())[1])),
    ("it must end", learning(check=False)),
    ("yield pairs, each a tuple", learning(best=lambda counts: "".join(min(counts)))),
]:
    wrong("learn_merges", words)(answer)


@wrong("learn_merges", "recount after each merge")
def counted_once(words):
    counts = Counter()
    for word, times in words.items():
        symbols = to_symbols(word)
        for pair in zip(symbols, symbols[1:], strict=False):
            counts[pair] += times
    yield from sorted(counts, key=lambda pair: (-counts[pair], pair))


# --- encode_word --------------------------------------------------------------------------------------

@right("encode_word")
def by_rank(word, ranks, vocab):
    symbols = to_symbols(word)
    while True:
        best = min(zip(symbols, symbols[1:], strict=False), key=lambda pair: ranks.get(pair, math.inf), default=None)
        if best not in ranks:
            return [vocab[one] for one in symbols]
        symbols = merge(symbols, best)


@right("encode_word")
def merge_after_merge(word, ranks, vocab):
    symbols = to_symbols(word)
    while (found := sorted((ranks[p], p) for p in zip(symbols, symbols[1:], strict=False) if p in ranks)):
        symbols = merge(symbols, found[0][1])
    return list(map(vocab.__getitem__, symbols))


def encoding(choose, spell=to_symbols, steps=10**6):
    def encode_word(word, ranks, vocab):
        symbols = spell(word)
        for _ in range(steps):
            known = [pair for pair in zip(symbols, symbols[1:], strict=False) if pair in ranks]
            if not known:
                break
            symbols = merge(symbols, choose(known, ranks))
        return [vocab[one] for one in symbols]
    return encode_word


def lowest(known, ranks):
    return sorted(known, key=lambda pair: ranks[pair])[0]


def greedy(word, ranks, vocab):
    text, ids = "".join(to_symbols(word)), []
    while text:
        n = next(n for n in range(len(text), 0, -1) if text[:n] in vocab)
        ids.append(vocab[text[:n]])
        text = text[n:]
    return ids


for words, answer in [
    ("the leftmost known pair", encoding(lambda known, ranks: known[0])),
    ("learnt last is merged first", encoding(lambda known, ranks: sorted(known, key=ranks.get)[-1])),
    ("only one merge is made", encoding(lowest, steps=1)),
    ("these are the bytes", encoding(lowest, steps=0)),
    ("the end of the word is not marked", encoding(lowest, spell=list)),
    ("a letter can have two of them", encoding(lowest, spell=lambda word: list(word[:-1]) + [word[-1] + "</w>"])),
    ("as WordPiece does", greedy),
    ("where it must give a list of ids", lambda word, ranks, vocab: to_symbols(word)),
]:
    wrong("encode_word", words)(answer)


# --- causal_mask --------------------------------------------------------------------------------------

right("causal_mask")(lambda length: torch.arange(length)[:, None] >= torch.arange(length)[None])
right("causal_mask")(lambda length: torch.from_numpy(np.tri(length, dtype=bool)))
for words, answer in [
    ("the other triangle", lambda length: torch.arange(length)[:, None] <= torch.arange(length)),
    ("keep the diagonal", lambda length: torch.arange(length)[:, None] > torch.arange(length)),
    ("True says what is forbidden", lambda length: torch.arange(length)[:, None] < torch.arange(length)),
    ("nothing is masked", lambda length: torch.full((length, length), True)),
    ("attends to the next one", lambda length: torch.arange(length)[:, None] + 1 >= torch.arange(length)),
    ("not how much", lambda length: torch.tril(torch.ones(length, length))),
    ("to be added to the scores", lambda length: torch.full((length, length), -torch.inf).triu(1)),
    ("shape (4,) where it must be (4, 4)", lambda length: torch.ones(length, dtype=torch.bool)),
]:
    wrong("causal_mask", words)(answer)


# --- quick_gelu ---------------------------------------------------------------------------------------

right("quick_gelu")(lambda x: x / (1 + torch.exp(-1.702 * x)))
right("quick_gelu")(lambda x: F.silu(1.702 * x) / 1.702)
for words, answer in [
    ("the sigmoid alone", lambda x: (1.702 * x).sigmoid()),
    ("this is SiLU", lambda x: x * x.sigmoid()),
    ("inside of the sigmoid", lambda x: 1.702 * F.silu(x)),
    ("in front of it as well", lambda x: F.silu(1.702 * x)),
    ("this is the exact GELU", lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2),
    ("the GELU by tanh", lambda x: x / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))),
    ("this is ReLU", lambda x: x.clamp(min=0)),
    ("not added to it", lambda x: x + torch.sigmoid(1.702 * x)),
    ("exp overflows", lambda x: x * torch.exp(1.702 * x) / (1 + torch.exp(1.702 * x))),
]:
    wrong("quick_gelu", words)(answer)


# --- pooled -------------------------------------------------------------------------------------------

@right("pooled")
def row_by_row(hidden, ids, end):
    return torch.stack([h[row.tolist().index(end)] for h, row in zip(hidden, ids, strict=True)])


@right("pooled")
def by_gather(hidden, ids, end):
    places = (ids == end).long().argmax(dim=-1)
    return hidden.gather(1, places[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]


def place(hidden, ids, end):
    return torch.tensor([row.tolist().index(end) for row in ids])


for words, answer in [
    ("the last place of a row", lambda hidden, ids, end: hidden[:, ids.shape[1] - 1]),
    ("the first place", lambda hidden, ids, end: hidden[:, 0]),
    ("the mean of all places", lambda hidden, ids, end: hidden.sum(1) / hidden.shape[1]),
    ("one too early", lambda hidden, ids, end: torch.stack(
        [h[i - 1] for h, i in zip(hidden, place(hidden, ids, end), strict=True)])),
    ("the last end token of a row", lambda hidden, ids, end: torch.stack(
        [h[(row == end).nonzero()[-1, 0]] for h, row in zip(hidden, ids, strict=True)])),
    ("not the end token's once words are added", lambda hidden, ids, end: hidden[range(len(ids)), ids.argmax(-1)]),
    ("index rows and places together", lambda hidden, ids, end: hidden[:, place(hidden, ids, end)]),
    ("the sum over all end tokens", lambda hidden, ids, end: torch.stack(
        [h[row == end].sum(0) for h, row in zip(hidden, ids, strict=True)])),
]:
    wrong("pooled", words)(answer)


# --- contrastive_loss ---------------------------------------------------------------------------------

@right("contrastive_loss")
def by_log_softmax(image_embeds, text_embeds, logit_scale):
    logits = logit_scale.clamp(max=math.log(100)).exp() * image_embeds @ text_embeds.T
    return -(logits.log_softmax(0).diag() + logits.log_softmax(1).diag()).mean() / 2


@right("contrastive_loss")
def by_logsumexp(image_embeds, text_embeds, logit_scale):
    logits = torch.einsum("is,ts->it", image_embeds, text_embeds) * min(100.0, logit_scale.exp().item())
    return (logits.logsumexp(0) + logits.logsumexp(1) - 2 * logits.diagonal()).mean() / 2


def info_nce(scale=lambda logit_scale: logit_scale.exp().clamp(max=100), rows=0.5, columns=0.5, reduction="mean"):
    def contrastive_loss(image_embeds, text_embeds, logit_scale):
        logits = image_embeds @ text_embeds.T * scale(logit_scale)
        target = torch.arange(logits.shape[0])
        return (rows * F.cross_entropy(logits, target, reduction=reduction)
                + columns * F.cross_entropy(logits.T, target, reduction=reduction))
    return contrastive_loss


for words, answer in [
    ("only each image looks", info_nce(rows=1, columns=0)),
    ("only each text looks", info_nce(rows=0, columns=1)),
    ("their mean is asked for", info_nce(rows=1, columns=1)),
    ("is a logarithm", info_nce(scale=lambda s: s)),
    ("not multiplied by the scale", info_nce(scale=lambda s: 1)),
    ("one over the temperature", info_nce(scale=lambda s: torch.exp(-s))),
    ("at or below 100", info_nce(scale=lambda s: s.exp())),
    ("the losses of the rows are summed", info_nce(reduction="sum")),
    ("the other entries of a row must lose",
     lambda image_embeds, text_embeds, logit_scale: -(image_embeds * text_embeds).sum(-1).mean() * logit_scale.exp()),
    ("has shape (5,) where it must be ()", info_nce(reduction="none")),
]:
    wrong("contrastive_loss", words)(answer)


# --- zero_shot ----------------------------------------------------------------------------------------

@right("zero_shot")
def by_sum(image_embeds, text_embeds):
    classes = text_embeds.sum(1)
    return image_embeds @ (classes / classes.norm(dim=-1, keepdim=True)).T


@right("zero_shot")
def by_cosine(image_embeds, text_embeds):
    classes = reduce(text_embeds, "c p s -> c s", "mean")
    return F.cosine_similarity(image_embeds[:, None], classes[None], dim=-1)


for words, answer in [
    ("shorter than 1", lambda images, texts: torch.einsum("bs,cps->bcp", images, texts).mean(-1)),
    ("the best of a class's sentences", lambda images, texts: torch.einsum("bs,cps->bcp", images, texts).amax(-1)),
    ("only the first sentence", lambda images, texts: torch.einsum("bs,cps->bcp", images, texts)[..., 0]),
    ("their sentences are axis 1", lambda images, texts: images @ F.normalize(texts.mean(dim=0), dim=1).T),
    ("not the shares of a softmax", lambda images, texts: by_sum(images, texts).softmax(dim=1)),
    ("the number of the best class", lambda images, texts: by_sum(images, texts).max(dim=1).indices),
    ("rows are classes", lambda images, texts: by_sum(images, texts).mT),
]:
    wrong("zero_shot", words)(answer)
