"""Figures and widgets: they show what they are given, say the shapes that are, and stand still where no widget runs."""

import base64
import io
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from drawings import assert_shows
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.text import Text
from models import one_thread, tiny_parts  # noqa: F401
from PIL import Image

from sdlearn.config import PRESETS
from sdlearn.data import UNTAUGHT
from sdlearn.explore import (
    Drawing,
    PromptExplorer,
    StepSlider,
    architecture_diagram,
    portrait,
    show_images,
    step_strip,
)
from sdlearn.explore.architecture import count_parameters, levels, spelled, tensors, told
from sdlearn.explore.figures import WIDTH, some_of
from sdlearn.explore.widgets import KEPT
from sdlearn.pipeline import StableDiffusion
from sdlearn.unet import UNet

PROMPT = "a red apple to the left of a cat"
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(tiny_parts())


@pytest.fixture(scope="module")
def steps(model):
    return list(model.iter_steps(PROMPT, num_inference_steps=4))


def words(drawing: Drawing) -> list[str]:
    return [text.get_text() for text in drawing.findobj(Text) if text.get_text()]


def shown(drawing: Drawing) -> list[np.ndarray]:
    return [axes.images[0].get_array() for axes in drawing.axes]


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


# --- figures ----------------------------------------------------------------------------------------

def test_images_stand_in_a_grid_row_by_row_with_their_captions():
    images = [np.full((8, 8, 3), level, np.uint8) for level in (0, 80, 160, 240, 255)]
    drawing = show_images(images, list("abcde"), title="Five", columns=2)
    assert words(drawing) == ["Five", *"abcde"]
    assert all(np.array_equal(a, b) for a, b in zip(shown(drawing), images, strict=True))
    boxes = [axes.get_position() for axes in drawing.axes]
    assert boxes[0].x0 == boxes[2].x0 == boxes[4].x0 < boxes[1].x0
    assert boxes[0].y0 == boxes[1].y0 > boxes[2].y0 > boxes[4].y0


@settings(max_examples=15)
@given(width=st.integers(4, 700), height=st.integers(4, 200), count=st.integers(1, 7), columns=st.integers(1, 8))
def test_images_of_any_size_fit_the_page_and_keep_their_shape(width, height, count, columns):
    drawing = show_images([np.zeros((height, width, 3), np.uint8)] * count, title="x", columns=columns)
    assert drawing.width <= WIDTH + 1
    boxes = [axes.get_position() for axes in drawing.axes]
    assert len(boxes) == count and all(0 <= b.x0 and b.x1 <= 1 and 0 <= b.y0 and b.y1 <= 1 for b in boxes)
    drawn = boxes[0].width * drawing.width, boxes[0].height * drawing.height
    assert drawn[0] / drawn[1] == pytest.approx(width / height, rel=0.01)


def test_nothing_is_cut_off_at_the_edges():
    drawing = show_images([Image.new("RGB", (16, 16))], ["words and words\nand words"],
                          title="A title much wider than its only image", columns=1)
    pixels = np.asarray(opened(drawing.png()).convert("L"))
    assert pixels.min() < 60                                            # something is drawn
    assert min(pixels[:, 0].min(), pixels[:, -1].min(), pixels[0].min(), pixels[-1].min()) > 240


def test_colours_of_a_figure_are_kept_and_letters_stay_grey():
    yellow = np.full((64, 64, 3), (255, 230, 20), np.uint8)
    image = opened(show_images([yellow], ["a caption"], title="Yellow").png()).convert("RGB")
    pixels = np.asarray(image).reshape(-1, 3).astype(int)
    assert (np.abs(pixels - (255, 230, 20)).max(axis=1) <= 3).sum() >= 64 * 64
    dark = pixels[pixels.max(axis=1) < 120]
    assert len(dark) and np.ptp(dark, axis=1).max() < 24


@pytest.mark.parametrize("level", [128, 247, 251])
def test_the_ground_of_a_figure_is_white(level):
    """Also where the images are nearly white: of neighbours in the palette any may be taken for the ground."""
    images = np.random.default_rng(0).normal(level, 4, (6, 32, 32, 3)).clip(0, 255).astype(np.uint8)
    pixels = np.asarray(opened(show_images(images, title="x").png()).convert("RGB"))
    assert (pixels[2, -2] == 255).all()


@pytest.mark.parametrize("images, captions, said", [
    ([], (), "no images"), ([np.zeros((4, 4, 3), np.uint8)], ("a", "b"), "2 captions for 1 images"),
])
def test_images_that_cannot_be_shown_are_told(images, captions, said):
    with pytest.raises(ValueError, match=said):
        show_images(images, captions, title="x")


def test_a_figure_shows_itself_as_an_image_of_its_width(steps):
    drawing = step_strip(steps, title="Steps")
    bundle, sizes = drawing._repr_mimebundle_()
    image = opened(base64.b64decode(bundle["image/png"]))
    assert image.size == (drawing.width, drawing.height) == tuple(sizes["image/png"].values())
    assert bundle["text/plain"] == "<Drawing: Steps>"


def test_a_strip_has_the_first_and_the_last_step_above_what_the_network_saw(steps):
    drawing = step_strip(steps, columns=3)
    chosen = [steps[0], steps[2], steps[3]]
    images = [step.noisy_images()[0] for step in chosen] + [step.images()[0] for step in chosen]
    assert all(np.array_equal(a, b) for a, b in zip(shown(drawing), images, strict=True))
    assert [f"step {step.index + 1} of 4\nfrom t = {step.t:.0f}" for step in chosen] \
        == [text for text in words(drawing) if text.startswith("step")]


@given(st.lists(st.integers(), min_size=1, max_size=60), st.integers(2, 12))
def test_some_of_keeps_the_order_and_both_ends(items, count):
    places = some_of(list(enumerate(items)), count)
    assert len(places) == min(count, len(items)) == len(set(places)) and places == sorted(places)
    assert places[0] == (0, items[0]) and places[-1][0] == len(items) - 1


def test_a_portrait_is_the_object_on_its_ground():
    name = next(iter(UNTAUGHT))                             # drawn when asked for: no atlas is needed
    image = portrait(name, background=(10, 200, 30), size=40)
    assert image.shape == (48, 48, 3) and image.dtype == np.uint8
    assert np.array_equal(image[0, 0], (10, 200, 30)) and not np.array_equal(image[24, 24], (10, 200, 30))


# --- the diagram ------------------------------------------------------------------------------------

def test_the_diagram_says_the_shapes_that_are(model):
    """Every shape in the figure is that of a tensor of a run, and every tensor of the list is there."""
    config, seen = model.config, {}
    ids = model.tokenizer(["", PROMPT])
    context = model.text_encoder(ids).hidden
    noise = torch.randn(model.latent_shape(model.validate()))
    hooks = [module.register_forward_hook(lambda _, __, out, name=name: seen.update({name: tuple(out.shape)}))
             for name, module in (("time", model.unet.time_embedding), ("middle", model.unet.mid_block))]
    features = model.unet.encode(torch.cat([noise, noise]), model.unet.embed_time(1, noise), context)
    output = model.unet(torch.cat([noise, noise]), 1, context)
    for hook in hooks:
        hook.remove()
    run = {"ids": ids, "context": context, "noise": noise, "twice": torch.cat([noise, noise]), "output": output,
           "guided": output[:1], "latent": noise, "pixels": model.vae.to_pixels(noise)}
    told_shapes = tensors(config)
    assert told_shapes == {name: tuple(tensor.shape) for name, tensor in run.items()} | {"time": seen["time"]}
    there = {tuple(feature.shape) for feature in features}
    assert {shape for shape, _ in levels(config)} <= there and levels(config)[-1][0] == seen["middle"]
    text = " ".join(words(architecture_diagram(config)))
    for shape in [*told_shapes.values(), *(shape for shape, _ in levels(config))]:
        assert spelled(shape) in text, shape


@pytest.mark.parametrize("name", ["tiny", "mini", "sd15", "sd21"])
def test_the_diagram_is_read_off_any_config_and_its_words_do_not_overlap(name):
    config = PRESETS[name]
    drawing = architecture_diagram(config)
    text = words(drawing)
    assert any(name in line for line in text)
    assert told(count_parameters(lambda: UNet(config.unet))) + " parameters" in text
    assert ("v, twice" if config.noise.prediction_type == "v_prediction" else "noise, twice") in text
    drawing.canvas.draw()
    boxes = [one.get_window_extent() for one in drawing.findobj(Text) if one.get_text()]
    inner = [box.shrunk(0.97, 0.9) for box in boxes]
    clashes = [(a, b) for i, a in enumerate(inner) for b in inner[:i] if a.overlaps(b)]
    assert clashes == []
    assert all(0 <= box.x0 and box.x1 <= drawing.bbox.x1 and 0 <= box.y0 for box in boxes)


def test_an_odd_latent_is_halved_upwards():
    config = replace(PRESETS["sd15"], image_size=8 * 25)
    assert [shape[2] for shape, _ in levels(config)] == [25, 13, 7, 4]


@pytest.mark.parametrize("count, said", [
    (859_520_964, "860 M"), (16_700_000, "16.7 M"), (60_000, "0.1 M"), (7_123, "7 k")])
def test_counts_are_told_shortly(count, said):
    assert told(count) == said


# --- widgets ----------------------------------------------------------------------------------------

def test_a_slider_has_a_frame_for_each_step_decoded_beforehand(steps):
    slider = StepSlider(steps)
    frames = slider.frames.children
    assert len(frames) == len(steps) == len(slider.slider.options) == slider.play.max + 1
    for step, frame in zip(steps, frames, strict=True):
        both = np.asarray(opened(frame.value))
        left, right = (np.asarray(images[0]) for images in (step.noisy_images(), step.images()))
        times = both.shape[0] // left.shape[0]
        assert np.array_equal(both[::times, :left.shape[1] * times:times], left)
        assert np.array_equal(both[::times, -right.shape[1] * times::times], right)
    assert [name for name, _ in slider.slider.options][0].startswith("1 of 4")


def test_the_slider_is_linked_in_the_browser_so_that_it_works_while_python_is_busy(steps):
    slider = StepSlider(steps)
    assert {type(link).__name__ for link in slider.links} == {"Link"}           # made by jslink, not in Python
    assert [(link.source, link.target) for link in slider.links] == [
        ((slider.play, "value"), (slider.slider, "index")),
        ((slider.slider, "index"), (slider.frames, "selected_index"))]


def test_a_sliders_still_shows_what_the_network_predicted_in_each_step(steps):
    still = StepSlider(steps).still()
    assert_shows(still, [step.images()[0] for step in steps])
    assert [one for one in words(still) if one.startswith("step ")] == [f"step {i + 1}" for i in range(len(steps))]


def test_a_slider_needs_steps():
    with pytest.raises(ValueError, match="no steps"):
        StepSlider([])
    with pytest.raises(ValueError, match="no steps"):
        step_strip([])


@pytest.mark.parametrize("kind", [StepSlider, PromptExplorer])
def test_a_widget_carries_a_still_image_for_where_none_runs(model, steps, kind):
    widget = StepSlider(steps) if kind is StepSlider else PromptExplorer(model, PROMPT)
    bundle, _ = widget._repr_mimebundle_()
    assert bundle[WIDGET]["model_id"] == widget.model_id
    assert opened(base64.b64decode(bundle["image/png"])).width > 100
    assert re.fullmatch(r"<\w+: [^\n]*Jupyter[^\n]*>", bundle["text/plain"])


@pytest.fixture
def explorer(model):
    explorer = PromptExplorer(model, PROMPT)
    explorer.num_inference_steps.value = 3
    return explorer


def as_shown(explorer: PromptExplorer, image: Image.Image) -> bool:
    large = np.asarray(opened(explorer.image.value))
    times = large.shape[0] // image.height
    return np.array_equal(large[::times, ::times], np.asarray(image))


def test_the_button_draws_what_is_set_and_keeps_what_was_there(model, explorer):
    explorer.prompt.value, explorer.seed.value, explorer.guidance_scale.value = "a cat", 7, 2.0
    explorer.sampler.value = "euler"
    explorer.button.click()
    [image] = model.text2img("a cat", seed=7, guidance_scale=2.0, num_inference_steps=3, sampler="euler")
    assert as_shown(explorer, image)
    assert explorer.progress.value == explorer.progress.max == 3 and not explorer.button.disabled
    assert len(explorer.earlier.children) == 2 and "seed 7" in explorer.earlier.children[0].children[1].value
    assert "a cat" in " ".join(words(explorer.still()))
    expected = model.text2img("a cat", **explorer.settings())
    assert_shows(explorer.still(), expected)            # the newest, and not the first


def test_only_the_latest_images_are_kept(explorer):
    for seed in range(KEPT + 2):
        explorer.seed.value = seed
        explorer.draw()
    labels = [box.children[1].value for box in explorer.earlier.children]
    assert len(labels) == KEPT and f"seed {KEPT + 1}" in labels[0] and "seed 2" in labels[-1]


def test_a_word_it_was_never_taught_is_told_and_drawn_without_a_warning(explorer, recwarn):
    explorer.prompt.value = "a <b>penguin</b>"
    explorer.draw()
    assert "penguin" in explorer.message.value and "<b>" not in explorer.message.value
    assert not recwarn.list
    explorer.prompt.value = "a cat"
    explorer.draw()
    assert explorer.message.value == ""


def test_settings_that_cannot_be_are_told_and_the_last_image_stays(explorer):
    before = explorer.image.value
    explorer.sampler.options = [*explorer.sampler.options, "magic"]
    explorer.sampler.value = "magic"
    explorer.draw()
    assert "magic" in explorer.message.value and explorer.image.value == before
    assert not explorer.button.disabled
