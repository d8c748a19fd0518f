"""Figures and widget of notebook 02: each token is drawn once, what is cut is grey, the nearest scenes are nearest."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from models import one_thread, tiny_config, tiny_parts  # noqa: F401

from sdlearn.data import draw_scenes
from sdlearn.explore.conditioning import NEAREST, PromptReader, matrices, merges_of, pairings, read, token_strip
from sdlearn.explore.figures import WIDTH
from sdlearn.images import to_tensor
from sdlearn.pipeline import StableDiffusion
from sdlearn.tokenizer import WORD_END

PROMPT = "a (red:1.5) apple, to the left of a café"
LONG = " ".join(["two small green cars"] * 30)


@pytest.fixture(scope="module")
def model():
    """A tiny model whose image encoder takes the scenes' own size."""
    config = tiny_config()
    return StableDiffusion(tiny_parts(config=replace(config, vision=replace(config.vision, image_size=128,
                                                                            patch_size=32))))


@pytest.fixture(scope="module")
def drawn():
    return list(draw_scenes(0, 12, "test"))


def words(drawing) -> list[str]:
    return [text.get_text() for text in drawing.findobj(Text) if text.get_text()]


def shown(widget: PromptReader) -> str:
    return re.sub("<[^>]+>", "", widget.tokens.value)


# --- tokens -------------------------------------------------------------------------------------------

def test_the_tokens_are_those_of_the_tokenizer_with_the_weights_of_the_prompt(model):
    tokens = read(PROMPT, model.tokenizer, 77)
    assert [token.id for token in tokens] == model.tokenizer.encode("a red apple, to the left of a café")
    assert [token.symbol for token in tokens] == model.tokenizer.convert_ids_to_tokens([token.id for token in tokens])
    assert {token.weight for token in tokens if token.symbol == "red" + WORD_END} == {1.5}
    assert all(token.kept for token in tokens)


@pytest.mark.parametrize("length", [2, 10, 77])
def test_what_the_row_has_no_place_for_is_cut(model, length):
    kept = [token.id for token in read(LONG, model.tokenizer, length) if token.kept]
    row = model.tokenizer(LONG, length)[0].tolist()
    assert kept == row[1:-1]


def test_merges_end_in_the_tokens_of_a_word(model):
    for word, steps in merges_of(PROMPT, model.tokenizer):
        tokens = model.tokenizer.convert_ids_to_tokens(model.tokenizer.encode(word))
        assert steps[-1] == " ".join(tokens).replace(WORD_END, "") and len(steps[0].split()) == len(word.encode())


def test_a_word_that_was_added_has_no_merges():
    model = StableDiffusion(tiny_parts())
    model.tokenizer.add_token("<toy>")
    assert [word for word, _ in merges_of("a <toy>", model.tokenizer)] == ["a"]
    assert read("a <toy>", model.tokenizer, 77)[-1].symbol == "<toy>"


@pytest.mark.parametrize("prompt", ["", PROMPT, LONG, "$x$ _ ^ \\ { <|endoftext|>"])
def test_a_strip_draws_every_token_inside_the_page(model, prompt):
    drawing = token_strip(prompt, model.tokenizer, title="Tokens")
    drawing.canvas.draw()
    tokens = read(prompt, model.tokenizer, 77)
    said = words(drawing)
    assert said[0] == "Tokens" and len(said) == 1 + 2 * len(tokens)
    assert said.count("cut") == sum(not token.kept for token in tokens)
    for text in drawing.findobj(Text):
        box = text.get_window_extent()
        assert not text.get_text() or (0 <= box.x0 and box.x1 <= WIDTH and box.y0 >= 0)
    assert drawing.png()


def test_a_strip_shows_scenes_with_their_captions(model, drawn):
    drawing = token_strip(PROMPT, model.tokenizer, scenes=drawn[:3])
    images = [axes.images[0].get_array() for axes in drawing.axes if axes.images]
    assert all(np.array_equal(a, scene.image) for a, scene in zip(images, drawn[:3], strict=True))
    assert [one.replace("\n", " ") for one in words(drawing)[-3:]] == [scene.caption for scene in drawn[:3]]


# --- matrices -----------------------------------------------------------------------------------------

def test_matrices_stand_side_by_side_with_labels():
    values = {"before": torch.eye(3), "after": torch.rand(3, 3)}
    drawing = matrices(values, title="Two", x="place", y="word", labels=list("abc"), bar="share")
    found = [axes.images[0].get_array() for axes in drawing.axes if axes.images]
    assert all(np.array_equal(a, b.numpy()) for a, b in zip(found, values.values(), strict=True))
    assert {"Two", "before", "after", "place", "word", "share", "a", "b", "c"} <= set(words(drawing))
    assert drawing.width <= WIDTH


def test_pairings_have_captions_in_rows_and_images_in_columns(drawn):
    values = torch.arange(9.0).reshape(3, 3) / 10
    drawing = pairings(drawn[:3], values, title="Pairs")
    said = [one.replace("\n", " ") for one in words(drawing)]
    assert "Pairs" in said and {scene.caption for scene in drawn[:3]} <= set(said)
    cells = {text.get_text(): text.get_position() for text in drawing.axes[0].texts}
    assert cells["0.50"] == (2, 1)                          # x the column, y the row
    with pytest.raises(ValueError, match="3 scenes want 3 rows and columns"):
        pairings(drawn[:3], values[:2], title="Pairs")


# --- the widget ---------------------------------------------------------------------------------------

def test_the_reader_shows_tokens_and_the_scenes_with_the_largest_cosine(model, drawn):
    widget = PromptReader(model, drawn, "a red apple")
    with torch.no_grad():
        text = model.clip.encode_text(model.tokenizer("two small green cars"), end=model.tokenizer.end)
        cosines = (model.clip.encode_image(to_tensor([scene.image for scene in drawn])) @ text[0]).tolist()
    widget.prompt.value = "two (small:1.2) green cars"
    found = widget.nearest_to(widget.prompt.value)
    assert len(found) == NEAREST == len(widget.nearest.children)
    best = sorted(range(len(drawn)), key=lambda i: -cosines[i])[:NEAREST]
    assert [scene.seed for scene in found] == [drawn[i].seed for i in best]
    assert "small × 1.2" in shown(widget) and "0 of them cut" in shown(widget)


def test_the_reader_tells_what_is_cut_and_what_cannot_be_read(model, drawn):
    widget = PromptReader(model, drawn[:2], LONG)
    tokens = read(LONG, model.tokenizer, 77)
    assert f"{len(tokens)} tokens, {len(tokens) - 75} of them cut" in shown(widget)
    widget.prompt.value = "a (red:99) apple"
    assert "is not in -10...10" in widget.tokens.value
    widget.prompt.value = "<b>a</b> & apple"
    assert "<b>" not in widget.tokens.value and "<b>" not in widget.merges.value
    assert widget.still().title.startswith("Tokens of '<b>a</b> & apple'")


def test_the_reader_carries_an_image_for_pages_without_widgets(model, drawn):
    bundle, sizes = PromptReader(model, drawn[:2], "a cat")._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle) and "image/png" in sizes


def test_a_reader_without_vision_encoder_or_scenes_is_refused(model, drawn):
    for parts in ((StableDiffusion(tiny_parts(vision=False)), drawn), (model, [])):
        with pytest.raises(ValueError, match="both encoders"):
            PromptReader(*parts, "a cat")
