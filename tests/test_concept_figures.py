"""Figures and widget of notebook 09: what learns is coloured, sheets keep their rows, every way is asked the same."""

import copy

import numpy as np
import pytest
import torch
from drawings import assert_shows
from matplotlib.colors import to_hex
from matplotlib.text import Text
from models import one_thread, tiny_config, tiny_parts  # noqa: F401

from sdlearn.explore.concept_figures import KEPT, LEARNS, PARTS, ConceptExplorer, sheet, what_learns
from sdlearn.explore.curves import COLOURS
from sdlearn.explore.figures import WIDTH
from sdlearn.finetune import new_lora
from sdlearn.pipeline import StableDiffusion

IMAGES = [np.full((32, 32, 3), shade, np.uint8) for shade in (20, 90, 160)]


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(tiny_parts(config=tiny_config()))


@pytest.fixture(scope="module")
def lora(model):
    made = new_lora(model.unet, rank=2)
    for change in made.unet.values():
        torch.nn.init.normal_(change.up)
    return made


def assert_equal_weights(one, other):
    for name in ("unet", "text_encoder"):
        pairs = zip(getattr(one, name).parameters(), getattr(other, name).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), name


def test_the_diagram_colours_what_learns_and_names_every_way():
    drawing = what_learns(title="What learns")
    [axes] = drawing.axes
    words = [text.get_text() for text in axes.texts]
    assert set(LEARNS) <= set(words) and words.count("learns") == 4 and words.count("one new row") == 1
    frozen = sum(len(PARTS) - len(parts) for parts in LEARNS.values())
    assert words.count("frozen") == frozen
    coloured = [bar for bar in axes.patches if to_hex(bar.get_facecolor()) == COLOURS[1]]
    assert len(coloured) == 1 + 10 + 1 + 3            # a row, five pairs of matrices, a U-Net, three parts
    assert drawing.width <= WIDTH and drawing.png().startswith(b"\x89PNG")


def test_a_sheet_has_a_row_for_each_name_and_heads_beneath():
    drawing = sheet({"the base": IMAGES, "DreamBooth with prior": IMAGES[::-1]}, ["one", "two", "three"], title="Sheet")
    assert len(drawing.axes) == 6 and drawing.width <= WIDTH
    words = [text.get_text() for text in drawing.findobj(Text)]
    assert {"the base", "Dream-\nBooth with\nprior", "one", "two", "three"} <= set(words)
    assert np.array_equal(drawing.axes[3].images[0].get_array(), IMAGES[2])


@pytest.mark.parametrize("rows", [{}, {"one": IMAGES, "two": IMAGES[:2]}])
def test_a_sheet_with_holes_is_told(rows):
    with pytest.raises(ValueError, match="an image for each of the 3 heads"):
        sheet(rows, ["a", "b", "c"], title="Sheet")


def test_the_explorer_asks_every_way_in_its_own_words(model, lora):
    other = copy.copy(model)
    other.unet, other.text_encoder = copy.deepcopy(model.unet), copy.deepcopy(model.text_encoder)
    explorer = ConceptExplorer({"base": (model, "cat"), "LoRA": (other, "zwx cat")}, "a {} here",
                               lora=("LoRA", lora), steps=2)
    explorer.strength.value, explorer.seed.value = 0.5, 3
    explorer.button.click()
    assert_equal_weights(other, model)              # the LoRA is merged for its own image alone
    said, images = explorer.rows[0]
    assert said == "a {} here, seed 3, LoRA 0.5: base, LoRA"
    [base] = model.text2img("a cat here", seed=3, num_inference_steps=2, guidance_scale=3.0)
    merged = other.add_lora(lora, 0.5)
    [learnt] = other.text2img("a zwx cat here", seed=3, num_inference_steps=2, guidance_scale=3.0)
    other.remove_lora(merged)
    assert [one.tobytes() for one in images] == [base.tobytes(), learnt.tobytes()]
    assert_equal_weights(other, model)
    assert "image/png" in explorer._repr_mimebundle_()[0] and explorer.still().width <= WIDTH


def test_the_explorer_keeps_the_last_rows_and_tells_what_cannot_be(model, monkeypatch):
    explorer = ConceptExplorer({"base": (model, "cat")}, "a {}", steps=1)
    for _ in range(KEPT + 1):
        explorer.button.click()
    assert len(explorer.rows) == KEPT and len(explorer.shown.children) == 2 * KEPT
    monkeypatch.setattr(model, "text2img", lambda *given, **named: (_ for _ in ()).throw(ValueError("too <much>")))
    explorer.button.click()
    assert explorer.message.value == "too &lt;much&gt;" and not explorer.button.disabled and len(explorer.rows) == KEPT


def test_the_lora_is_removed_after_an_error(model, lora, monkeypatch):
    other = copy.copy(model)
    other.unet, other.text_encoder = copy.deepcopy(model.unet), copy.deepcopy(model.text_encoder)
    explorer = ConceptExplorer({"LoRA": (other, "cat")}, "a {}", lora=("LoRA", lora), steps=1)
    monkeypatch.setattr(other, "text2img", lambda *given, **named: (_ for _ in ()).throw(ValueError("refused")))
    explorer.button.click()
    assert explorer.message.value == "refused"
    assert_equal_weights(other, model)


def test_the_still_shows_the_newest_row_in_the_order_of_the_ways(model):
    explorer = ConceptExplorer({"base": (model, "cat"), "rare": (model, "zwx cat")}, "a {}", steps=1)
    explorer.seed.value = 5
    explorer.button.click()
    expected = [model.text2img(f"a {words}", seed=5, num_inference_steps=1, guidance_scale=3.0)[0]
                for words in ("cat", "zwx cat")]
    still = explorer.still()
    assert_shows(still, expected)
    assert [text.get_text() for text in still.texts if text.get_text() in ("base", "rare")] == ["base", "rare"]
    assert "seed 5" in still.title
