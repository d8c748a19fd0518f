r"""Prompts: the form of a weight, the words that it falls on, and rows past the encoder's 77 places.

What the text encoder should give is computed by transformers' CLIPTextModel on the same random weights.
"""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from models import CAPTIONS, one_thread, randomise  # noqa: F401
from transformers import CLIPTextConfig, CLIPTextModel

from sdlearn.clip import TextEncoder
from sdlearn.config import PRESETS
from sdlearn.prompt import (
    WeightedText,
    apply_weights,
    encode_prompts,
    get_truncated_text,
    make_token_rows,
    parse_weights,
    remove_weights,
    split_weighted_words,
)
from sdlearn.tokenizer import Tokenizer

CONFIG = PRESETS["tiny"].text
LENGTH = CONFIG.length
ROOM = LENGTH - 2


def tokenizer_of(pad_with_end=True) -> Tokenizer:
    return Tokenizer.train([*CAPTIONS] * 2, CONFIG.vocab_size, pad_with_end)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_of()


@pytest.fixture(scope="module")
def reference() -> CLIPTextModel:
    model = CLIPTextModel(CLIPTextConfig(
        vocab_size=CONFIG.vocab_size, hidden_size=CONFIG.dim, intermediate_size=CONFIG.mlp_dim,
        num_hidden_layers=CONFIG.layers, num_attention_heads=CONFIG.heads, hidden_act=CONFIG.activation,
        max_position_embeddings=LENGTH, projection_dim=CONFIG.projection_dim)).eval()
    randomise(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.state_dict()[next(n for n in model.state_dict() if n.endswith("final_layer_norm.bias"))].sub_(0.2)
    return model                    # hidden states with a mean, as OpenAI's CLIP has them


@pytest.fixture(scope="module")
def encoder(reference) -> TextEncoder:
    encoder = TextEncoder(CONFIG).eval()
    encoder.load_state_dict(reference.state_dict(), strict=True)
    return encoder.requires_grad_(False)


@torch.no_grad()
def theirs(reference, tokenizer, ids: list[int]) -> torch.Tensor:
    """The hidden states of one row of ids: (1, 77, T)."""
    row = [tokenizer.start, *ids, tokenizer.end]
    return reference(torch.tensor([row + [tokenizer.pad] * (LENGTH - len(row))])).last_hidden_state


def difference(ours, wanted) -> float:
    assert ours.shape == wanted.shape
    return ((ours - wanted).abs().max() / wanted.abs().max()).item()


# ---------------------------------------------------------------------------- parse

@pytest.mark.parametrize("text, pieces", [
    ("", [("", 1)]),
    ("a red cat", [("a red cat", 1)]),
    ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
    ("(red cat:0.5)", [("red cat", 0.5)]),
    ("(red:1.5)(cat:.5)", [("red", 1.5), ("cat", 0.5)]),
    ("(red : 2 ) cat", [("red ", 2), (" cat", 1)]),
    ("(a:-1) (b:+2) (c:0) (d:1e1) (e:2.)", [("a", -1), (" ", 1), ("b", 2), (" ", 1), ("c", 0), (" ", 1), ("d", 10),
                                            (" ", 1), ("e", 2)]),
    ("(a (b:2) c:3)", [("a ", 3), ("b", 6), (" c", 3)]),                    # nested weights multiply
    ("((a:2):3)", [("a", 6)]),
    ("(a (b:2):0.5)", [("a ", 0.5), ("b", 1)]),
    ("(a (b (c:2):2):2)", [("a ", 2), ("b ", 4), ("c", 8)]),
    ("a (cat) and (a) dog", [("a (cat) and (a) dog", 1)]),                  # plain parentheses
    ("((a))", [("((a))", 1)]),
    ("(a (b) c:2)", [("a (b) c", 2)]),
    ("(a (b:2) c)", [("(a ", 1), ("b", 2), (" c)", 1)]),
    (") a ( b", [(") a ( b", 1)]),
    ("((a:2)", [("(", 1), ("a", 2)]),
    ("(a:2))", [("a", 2), (")", 1)]),
    ("a:2) b", [("a:2) b", 1)]),
    (":) (: (:3) ( :2) (;-)", [(":) (: (:3) ( :2) (;-)", 1)]),              # words are needed
    ("(a:b) (a:) (a 2) (a:1,3) (a:1.2.3)", [("(a:b) (a:) (a 2) (a:1,3) (a:1.2.3)", 1)]),
    ("(a:1:2)", [("a:1", 2)]),
    (r"a \(cat:1.3\)", [("a (cat:1.3)", 1)]),                               # escaped
    (r"(a \(b\) c:2)", [("a (b) c", 2)]),
    (r"\(a (b:2)\)", [("(a ", 1), ("b", 2), (")", 1)]),
    (r"(\(:2) (():3)", [("(", 2), (" ", 1), ("()", 3)]),                     # signs are words too
    (r"(a:2\) b", [("(a:2) b", 1)]),
    (r"a\b \\ \n", [(r"a\b \\ \n", 1)]),
    ("red(dish:1)", [("reddish", 1)]),                                      # neighbours of one weight are one
    ("(a:2)(b:2)", [("ab", 2)]),
    ("[a] {b} a::b", [("[a] {b} a::b", 1)]),
    ("A  (É\n:1.1)  ", [("A  ", 1), ("É\n", 1.1), ("  ", 1)]),
])
def test_pieces_of_a_prompt(text, pieces):
    found = parse_weights(text)
    assert [piece.text for piece in found] == [text for text, _ in pieces]
    assert [piece.weight for piece in found] == pytest.approx([weight for _, weight in pieces])
    assert all(type(piece) is WeightedText and type(piece.weight) is float for piece in found)


@given(st.one_of(st.text(), st.text("(();.1 \na-:)"), st.text("(()) ab:")))
def test_a_prompt_without_the_form_is_untouched(text):
    """Byte by byte, whatever parentheses, colons and numbers it has."""
    text = text.replace("\\", "/")
    assume(not re.search(r":\s*[\w.+-]+\s*\)", text))
    assert parse_weights(text) == [WeightedText(text, 1.0)]
    assert remove_weights(text) == text


@given(st.lists(st.tuples(st.text(min_size=1), st.sampled_from([0.5, 1.0, 1.25, -2.0]))))
def test_what_is_written_in_the_form_is_read(pieces):
    """Any text has a form, its parentheses escaped; blank ones have no words and no weight."""
    pieces = [(text.replace("\\", "/"), weight if text.strip() else 1.0) for text, weight in pieces]
    written = ""
    for text, weight in pieces:
        escaped = text.replace("(", r"\(").replace(")", r"\)")
        written += escaped if weight == 1 else f"({escaped}:{weight})"
    found = parse_weights(written)
    assert "".join(piece.text for piece in found) == "".join(text for text, _ in pieces) == remove_weights(written)
    weights = [piece.weight for piece in found for _ in piece.text]
    assert weights == [weight for text, weight in pieces for _ in text]


@pytest.mark.parametrize("text, words", [
    ("a (cat:11)", "weight 11, at character 7, is not in -10...10"),
    ("(cat:-10.5)", "weight -10.5, at character 5, is"),
    ("(cat:1e999)", "weight 1e999, at"),
    ("(cat:inf) and", "weight inf, at character 5"),
    ("(cat:-Inf)", "weight -Inf, at"),
    ("(cat:nan)", "weight nan, at"),
    ("((cat:5) dog:3)", "weight 5, times the 3 around it, at character 6, is"),
    ("((cat:0.5) dog:15)", "weight 15, at character 15, is"),
])
def test_a_weight_out_of_range_is_told_with_its_place(text, words, tokenizer, encoder):
    for function in (parse_weights, remove_weights, lambda text: split_weighted_words(text, tokenizer),
                     lambda text: get_truncated_text(text, tokenizer),
                     lambda text: encode_prompts(["a", text], tokenizer, encoder)):
        with pytest.raises(ValueError) as told:
            function(text)
        assert words in str(told.value) and "\n" not in str(told.value)


def test_ten_is_the_most_and_nested_weights_may_come_back_below_it():
    assert parse_weights("(a:10) (b:-10)")[0] == WeightedText("a", 10.0)
    assert parse_weights("((a:10):0.5)") == [WeightedText("a", 5.0)]
    assert parse_weights("(((a:10):10):0.1)") == [WeightedText("a", 10.0)]


def test_many_parentheses_are_no_trouble():
    deep = 20_000
    assert parse_weights("(" * deep + "a" + ")" * deep) == [WeightedText("(" * deep + "a" + ")" * deep, 1.0)]
    assert parse_weights("(" * deep + "a" + ":1)" * deep) == [WeightedText("a", 1.0)]
    assert remove_weights(":" + "1" * 20_000 + " " * 20_000) == ":" + "1" * 20_000 + " " * 20_000


@pytest.mark.parametrize("text", [5, None, b"cat", ["cat"]])
def test_what_is_no_text_is_told(text):
    with pytest.raises(TypeError, match="A prompt must be a string, not"):
        parse_weights(text)


# ---------------------------------------------------------------------------- weigh

def test_weights_fall_on_their_words(tokenizer):
    words = split_weighted_words("A (Red  apple,:1.5) on a (big (blue:2):0.5) cat's hat", tokenizer)
    assert [(word.text, word.weight) for word in words] == [
        ("a", 1), ("red", 1.5), ("apple", 1.5), (",", 1.5), ("on", 1), ("a", 1), ("big", 0.5), ("blue", 1),
        ("cat", 1), ("'s", 1), ("hat", 1)]
    assert [i for word in words for i in word.ids] == tokenizer.encode("a red apple, on a big blue cat's hat")


@pytest.mark.parametrize("text, words", [
    ("red(dish:2) cat", [("reddish", 1), ("cat", 1)]),          # a word has the weight that it begins with
    ("(red:2)dish cat", [("reddish", 2), ("cat", 1)]),
    ("(r:2)(e:3)(d:4) cat", [("red", 2), ("cat", 1)]),
    ("it(‘s:2)", [("it", 1), ("‘", 2), ("s", 2)]),
    ("it'(s:2) hat", [("it", 1), ("'s", 1), ("hat", 1)]),
    ("it('s hat:2)", [("it", 1), ("'s", 2), ("hat", 2)]),
    ("cat(,:2), dog", [("cat", 1), (",,", 2), ("dog", 1)]),
    ("1(2:2)3", [("1", 1), ("2", 2), ("3", 1)]),
    ("caf(e:2)\u0301 (cat:3)", [("café", 1), ("cat", 3)]),
    ("(e:2)(\u0301:3)x", [("éx", 2)]),
    ("<|end(oftext|>:2) cat", [("<|endoftext|>", 1), ("cat", 1)]),
    ("a ( :2)(\n b:3)", [("a", 1), ("(", 1), (":", 1), ("2", 1), (")", 1), ("b", 3)]),
])
def test_a_word_in_which_a_piece_ends_is_not_cut(text, words, tokenizer):
    assert [(word.text, word.weight) for word in split_weighted_words(text, tokenizer)] == words


TEXTS = st.lists(st.sampled_from([
    "a", "red", "Cat", " ", " ", ", ", "'", "s", "e\u0301", "\u0301", "İ", "3", "<toy>", "<t", "oy>", "<|endoftext|>",
    "<|end", "!", "(", ")", "日本", "\u1112\u1161", "\u11ab"]), min_size=1).map("".join)


@given(st.lists(st.tuples(TEXTS, st.sampled_from([1.0, 0.5, 2.0]))))
def test_weights_never_change_the_tokens(pieces):
    """Wherever pieces end: in a word, before an accent, in an added word of several ids."""
    tokenizer = with_toy()
    written = "".join(f"({text.replace('(', ' ').replace(')', ' ')}x:{weight})" for text, weight in pieces)
    words = split_weighted_words(written, tokenizer)
    assert [i for word in words for i in word.ids] == tokenizer.encode(remove_weights(written))
    assert [word.text for word in words] == tokenizer.split_words(remove_weights(written))
    assert {word.weight for word in words} <= {weight for _, weight in pieces}


def with_toy(n=3, pad_with_end=True) -> Tokenizer:
    tokenizer = tokenizer_of(pad_with_end)
    tokenizer.add_token("<toy>", n)
    return tokenizer


def test_an_added_word_has_its_ids_and_one_weight():
    tokenizer = with_toy()
    first = tokenizer.vocab_size - 3
    words = split_weighted_words("a (<toy>:1.5) on (<TOY> cat:0.5)", tokenizer)
    toys = [word for word in words if word.text == "<toy>"]
    assert [toy.ids for toy in toys] == [[first, first + 1, first + 2]] * 2
    assert [toy.weight for toy in toys] == [1.5, 0.5]
    words[1].ids.append(7)                                      # what is handed out is no part of the tokenizer
    assert tokenizer.added["<toy>"] == [first, first + 1, first + 2]


# ---------------------------------------------------------------------------- rows

def chunk_words(text, tokenizer):
    """The text of each chunk's row, and how long the rows are."""
    made = make_token_rows(split_weighted_words(text, tokenizer), tokenizer, LENGTH, "chunks")
    assert all(len(ids) == len(weights) == LENGTH for ids, weights in made)
    return [tokenizer.decode(ids) for ids, _ in made]


def test_cut_is_what_the_tokenizer_makes(tokenizer):
    for text in ("", "a cat", "cat " * 75, "cat " * 76, "a red xylophone " * 30):
        [(ids, weights)] = make_token_rows(split_weighted_words(text, tokenizer), tokenizer, LENGTH, "cut")
        assert [ids] == tokenizer(text).tolist() and weights == [1.0] * LENGTH


def test_chunks_are_full_rows_of_75(tokenizer):
    assert tokenizer.encode("cat cat") == 2 * tokenizer.encode("cat") and len(tokenizer.encode("cat")) == 1
    counts = {0: [0], 1: [1], 75: [75], 76: [75, 1], 150: [75, 75], 151: [75, 75, 1]}
    for n, wanted in counts.items():
        assert chunk_words("cat " * n, tokenizer) == [" ".join(["cat"] * k) for k in wanted]


def test_a_word_is_not_cut_between_chunks_unless_it_is_longer(tokenizer):
    word = "xyzzy"
    assert len(tokenizer.encode(word)) == 5
    assert chunk_words("cat " * 72 + word, tokenizer) == [" ".join(["cat"] * 72), word]
    assert chunk_words("cat " * 70 + word, tokenizer) == [" ".join(["cat"] * 70 + [word])]
    long = "x" * 200
    first, *others = make_token_rows(split_weighted_words("cat " + long, tokenizer), tokenizer, LENGTH, "chunks")
    assert tokenizer.convert_ids_to_tokens(first[0])[1] == "cat</w>"
    ids = [i for row, _ in (first, *others) for i in row if i not in (tokenizer.start, tokenizer.end)]
    assert ids == tokenizer.encode("cat " + long)


def test_a_word_longer_than_a_chunk_fills_the_chunk_that_it_begins_in(tokenizer):
    """It cannot be kept whole, so it starts right behind the word before it; what follows fills its last chunk."""
    long = "x" * 200
    ids = tokenizer.encode("cat " + long + " cat")
    assert len(tokenizer.encode(long)) > ROOM
    made = make_token_rows(split_weighted_words("cat " + long + " cat", tokenizer), tokenizer, LENGTH, "chunks")
    cut = [ids[i:i + ROOM] for i in range(0, len(ids), ROOM)]
    padding = [tokenizer.pad] * (ROOM - len(cut[-1]))
    expected = [[tokenizer.start, *part, tokenizer.end] for part in cut]
    assert [row for row, _ in made] == [*expected[:-1], expected[-1] + padding]


def test_weights_stand_at_their_tokens(tokenizer):
    words = split_weighted_words("cat " * 74 + "(red:2) (cat:0.5)", tokenizer)
    (first, weights), (second, more) = make_token_rows(words, tokenizer, LENGTH, "chunks")
    assert weights == [1.0] * 75 + [2.0, 1.0] and more == [1.0, 0.5] + [1.0] * 75
    assert first[75] == tokenizer.encode("red")[0] and second[1] == tokenizer.encode("cat")[0]


def test_what_is_lost_is_told_without_its_weights(tokenizer):
    text = "(cat:1.2) " * 75 + "a (red:1.5) (dog)"
    assert get_truncated_text(text, tokenizer) == "a red ( dog )"
    assert get_truncated_text("(cat:1.2) " * 75, tokenizer) == ""
    assert get_truncated_text("(red:2) cat", tokenizer, 3) == "cat"


# ---------------------------------------------------------------------------- encode

PLAIN = ("", "a red apple to the left of a cat", "a (small) cat :) 3", "cat " * 100)


@pytest.mark.parametrize("text", PLAIN)
def test_without_weights_it_is_the_encoder_bit_by_bit(text, tokenizer, encoder):
    expected = encoder(tokenizer(text)).hidden
    assert torch.equal(encode_prompts(text, tokenizer, encoder), expected)
    assert torch.equal(encode_prompts([text], tokenizer, encoder), expected)
    ones = " ".join(f"({word}:1.0)" for word in text.split() if "(" not in word and ")" not in word)
    assert torch.equal(encode_prompts(ones, tokenizer, encoder),
                       encode_prompts(remove_weights(ones), tokenizer, encoder))
    both = encode_prompts([text, "a cat"], tokenizer, encoder)
    assert torch.equal(both, encoder(tokenizer([text, "a cat"])).hidden) and both.shape == (2, LENGTH, CONFIG.dim)


@pytest.mark.parametrize("pad_with_end", [True, False])
def test_hidden_states_are_those_of_transformers(pad_with_end, reference, encoder):
    tokenizer = tokenizer_of(pad_with_end)
    for text in PLAIN:
        wanted = theirs(reference, tokenizer, tokenizer.encode(text)[:ROOM])
        assert difference(encode_prompts(text, tokenizer, encoder), wanted) < 1e-5


def by_hand(reference, tokenizer, ids, weights, restore_mean=True):
    """One row: hidden states, weights at the places of the words, and the mean put back."""
    hidden = theirs(reference, tokenizer, ids)
    scaled = hidden.clone()
    for place, weight in enumerate(weights, start=1):
        scaled[:, place] = scaled[:, place] * weight
    return scaled * (hidden.mean() / scaled.mean()) if restore_mean else scaled


@pytest.mark.parametrize("pad_with_end", [True, False])
@pytest.mark.parametrize("restore_mean", [True, False])
def test_weights_are_those_applied_by_hand(pad_with_end, restore_mean, reference, encoder):
    tokenizer = tokenizer_of(pad_with_end)
    ids = [tokenizer.encode(word) for word in ("a", "red apple", "and a", "cat")]
    weights = [w for row, w in zip(ids, (1.0, 1.5, 1.0, 0.25), strict=True) for _ in row]
    wanted = by_hand(reference, tokenizer, sum(ids, []), weights, restore_mean)
    ours = encode_prompts("a (red apple:1.5) and a (cat:0.25)", tokenizer, encoder, restore_mean=restore_mean)
    assert difference(ours, wanted) < 1e-5
    assert difference(encode_prompts("a red apple and a cat", tokenizer, encoder), wanted) > 1e-2


def test_a_mean_that_is_no_more_than_noise_is_not_put_back():
    hidden = torch.randn(1, 77, 16, generator=torch.Generator().manual_seed(0))
    hidden -= hidden.mean() - 1e-4              # the factor would be any number
    weights = torch.ones(1, 77)
    weights[0, 3] = -2.0
    assert torch.equal(apply_weights(hidden, weights), apply_weights(hidden, weights, restore_mean=False))
    restored = apply_weights(hidden + 0.3, weights)
    assert abs(float(restored.mean() / (hidden + 0.3).mean()) - 1) < 1e-5


def test_chunks_are_encoded_one_by_one(reference, tokenizer, encoder):
    """Joined along M, each with the weights and the mean of its own row."""
    red, cat = tokenizer.encode("red"), tokenizer.encode("cat")
    text = "cat " * 70 + "(red:1.5) " * 10 + "cat"
    first = by_hand(reference, tokenizer, cat * 70 + red * 5, [1] * 70 + [1.5] * 5)
    second = by_hand(reference, tokenizer, red * 5 + cat, [1.5] * 5 + [1])
    ours = encode_prompts(text, tokenizer, encoder, long="chunks")
    assert ours.shape == (1, 2 * LENGTH, CONFIG.dim)
    assert difference(ours, torch.cat([first, second], dim=1)) < 1e-5
    assert difference(encode_prompts(text, tokenizer, encoder), first) < 1e-5


def test_a_batch_is_filled_up_with_the_empty_prompt(reference, tokenizer, encoder):
    cat = tokenizer.encode("cat")
    empty = theirs(reference, tokenizer, [])
    prompt, negative, none = encode_prompts(["cat " * 160, "(cat:0.5)", ""], tokenizer, encoder, long="chunks")[:, None]
    assert prompt.shape == negative.shape == none.shape == (1, 3 * LENGTH, CONFIG.dim)
    full = theirs(reference, tokenizer, cat * ROOM)
    assert difference(prompt, torch.cat([full, full, theirs(reference, tokenizer, cat * 10)], dim=1)) < 1e-5
    weighed = by_hand(reference, tokenizer, cat, [0.5])
    assert difference(negative, torch.cat([weighed, empty, empty], dim=1)) < 1e-5
    assert difference(none, torch.cat([empty] * 3, dim=1)) < 1e-5


@pytest.mark.parametrize("long", ["cut", "chunks"])
def test_a_prompt_is_encoded_alike_alone_and_in_a_batch(long, tokenizer, encoder):
    texts = ["a (red:1.4) cat", "", "cat " * 60, "(apple:0.3)"]
    batch = encode_prompts(texts, tokenizer, encoder, long=long)
    for text, row in zip(texts, batch, strict=True):
        assert difference(encode_prompts(text, tokenizer, encoder, long=long), row[None]) < 1e-5
    again = encode_prompts(["a red cat", *texts[1:3]], tokenizer, encoder, long=long)
    plain_rows = encode_prompts(["a (red:1.4) cat", *texts[1:3]], tokenizer, encoder, long=long)[1:]
    assert torch.equal(again[1:], plain_rows)           # a neighbour's weights change no bit


def test_short_prompts_are_the_same_in_both_ways(tokenizer, encoder):
    for text in ("", "a (red:1.4) cat", "cat " * 75):
        assert torch.equal(encode_prompts(text, tokenizer, encoder, long="chunks"),
                           encode_prompts(text, tokenizer, encoder))


def test_the_mean_is_put_back():
    hidden = torch.randn(3, LENGTH, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.2
    weights = torch.ones(3, LENGTH, dtype=torch.float64)
    weights[0, 3:20], weights[1, :9] = 1.7, -0.5
    copies = hidden.clone(), weights.clone()
    ours = apply_weights(hidden, weights)
    assert ours.mean(dim=(1, 2)).tolist() == pytest.approx(hidden.mean(dim=(1, 2)).tolist(), rel=1e-12)
    off = apply_weights(hidden, weights, restore_mean=False)
    assert torch.equal(off, hidden * weights[..., None])
    factor = ours / off                                         # one number for each row
    assert (factor.amax(dim=(1, 2)) - factor.amin(dim=(1, 2))).max() < 1e-12 and factor[0].max() < 1
    assert torch.equal(ours[2], hidden[2])
    assert torch.equal(hidden, copies[0]) and torch.equal(weights, copies[1])


def test_a_mean_of_zero_stays_finite():
    hidden = torch.ones(1, 4, 2)
    assert torch.equal(apply_weights(hidden, torch.zeros(1, 4)), torch.zeros(1, 4, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_are_kept(dtype, tokenizer, encoder):
    twin = TextEncoder(CONFIG).eval()
    twin.load_state_dict(encoder.state_dict())
    text = "a (red:1.3) apple and a (cat:0.7)"
    ours = encode_prompts(text, tokenizer, twin.to(dtype))
    assert ours.dtype == dtype
    tolerance = {torch.float16: 1e-2, torch.bfloat16: 1e-1, torch.float64: 1e-5}[dtype]
    assert difference(ours.double(), encode_prompts(text, tokenizer, encoder).double()) < tolerance
    [(ids, weights)] = make_token_rows(split_weighted_words(text, tokenizer), tokenizer, LENGTH, "cut")
    hidden = twin(torch.tensor([ids])).hidden
    assert torch.equal(ours, apply_weights(hidden, torch.tensor([weights], dtype=torch.float64)))


def test_nothing_waits_for_the_device(tokenizer):
    """On the meta device, which has no values, reading one raises, and so does mixing devices."""
    encoder = TextEncoder(CONFIG).to("meta")
    context = encode_prompts(["a (red:1.3) cat", "cat " * 80], tokenizer, encoder, long="chunks")
    assert context.device.type == "meta" and context.shape == (2, 2 * LENGTH, CONFIG.dim)


@pytest.mark.parametrize("long", ["cut", "chunks"])
def test_added_words_are_weighed_and_kept_whole(long):
    tokenizer, n = with_toy(4), 4
    config = replace(CONFIG, vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    encoder = TextEncoder(config).eval().requires_grad_(False)
    first = tokenizer.vocab_size - n
    toy = list(range(first, first + n))
    cat = tokenizer.encode("cat")
    ours = encode_prompts("cat " * 72 + "(<toy>:1.5)", tokenizer, encoder, long=long, restore_mean=False)
    if long == "cut":
        hidden = encoder(tokenizer("cat " * 72 + "<toy>")).hidden
        assert torch.equal(ours[:, 73:76], hidden[:, 73:76] * 1.5) and torch.equal(ours[:, :73], hidden[:, :73])
    else:
        row = torch.tensor([[tokenizer.start, *toy] + [tokenizer.end] * (LENGTH - 1 - n)])
        hidden = encoder(row).hidden
        torch.testing.assert_close(ours[:, LENGTH + 1:LENGTH + 1 + n], hidden[:, 1:1 + n] * 1.5)
        row = torch.tensor([[tokenizer.start, *cat * 72] + [tokenizer.end] * (LENGTH - 73)])
        torch.testing.assert_close(ours[:, :LENGTH], encoder(row).hidden)


@pytest.mark.parametrize("arguments, settings, words", [
    (["a cat"], {"long": "chunk"}, "long is 'chunk': choose one of cut, chunks"),
    ([[]], {}, "no prompt to encode: give one or more"),
    (["a \ud800 cat"], {}, "not valid Unicode"),
])
def test_bad_input_is_told_in_a_sentence(arguments, settings, words, tokenizer, encoder):
    with pytest.raises(ValueError, match=words) as told:
        encode_prompts(*arguments, tokenizer, encoder, **settings)
    assert "\n" not in str(told.value)


def test_a_word_without_an_embedding_is_told():
    tokenizer = with_toy()
    encoder = TextEncoder(replace(CONFIG, vocab_size=tokenizer.vocab_size - 3))
    assert encode_prompts("a cat", tokenizer, encoder).isfinite().all()
    with pytest.raises(ValueError, match=r"knows \d+ ids, and '<toy>' has one past them: add its embedding"):
        encode_prompts("a <toy>", tokenizer, encoder)


def test_ids_are_known_up_to_the_size_of_the_embedding():
    """Ids begin at 0, so the first one without an embedding equals the number of embeddings."""
    tokenizer = with_toy(n=1)
    short, exact = (TextEncoder(replace(CONFIG, vocab_size=tokenizer.vocab_size - less)) for less in (1, 0))
    assert encode_prompts("a <toy>", tokenizer, exact).isfinite().all()
    with pytest.raises(ValueError, match="'<toy>' has one past them"):
        encode_prompts("a <toy>", tokenizer, short)


def test_weights_can_be_learnt_through(tokenizer, encoder):
    """The hidden states are not cut off from what made them, as textual inversion needs it."""
    twin = TextEncoder(CONFIG)
    twin.load_state_dict(encoder.state_dict())
    encode_prompts("a (red:1.3) cat", tokenizer, twin).square().sum().backward()
    assert math.isfinite(twin.embeddings.token_embedding.weight.grad.abs().sum().item())
