"""Figures and widget of notebook 06: arrows end where the formula ends, the widget draws what is set."""

import numpy as np
import pytest
import torch
from drawings import assert_shows
from models import one_thread, tiny_config, tiny_parts  # noqa: F401

from sdlearn.explore.figures import WIDTH
from sdlearn.explore.guidance_figures import KEPT, SHOWN, GuidanceExplorer, guidance_arrows, in_plane, side_by_side
from sdlearn.guidance import classifier_free_guidance
from sdlearn.pipeline import StableDiffusion

U, C, N = (torch.randn(1, 4, 5, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))


@pytest.fixture(scope="module")
def model():
    return StableDiffusion(tiny_parts(config=tiny_config()))


def place(x: torch.Tensor) -> np.ndarray:
    return np.array(in_plane(U, C, x))


def test_places_keep_all_lengths():
    assert np.allclose(place(U), (0, 0)) and np.allclose(place(C), (1, 0), atol=1e-6)
    for a, b in ((U, N), (C, N)):
        assert np.linalg.norm(place(a) - place(b)) == pytest.approx(float((a - b).norm() / (C - U).norm()), rel=1e-5)


def test_arrows_end_where_guidance_ends():
    drawing = guidance_arrows(U, C, N, scales=(2, 4), title="Arrows")
    [axes] = drawing.axes
    from_u, from_n = axes.lines[1].get_xydata(), axes.lines[3].get_xydata()
    assert np.allclose(from_u, [place(classifier_free_guidance(U, C, w)) for w in (2, 4)], atol=1e-5)
    assert np.allclose(from_n[:, 0], [place(classifier_free_guidance(N, C, w))[0] for w in (2, 4)], atol=1e-5)
    assert np.allclose(np.abs(from_n[:, 1]), [place(classifier_free_guidance(N, C, w))[1] for w in (2, 4)], atol=1e-5)
    words = [text.get_text() for text in axes.texts]
    assert words.count("2") == 2 and {"u", "c", "n"} <= set(words) and drawing.width <= WIDTH
    assert drawing.png().startswith(b"\x89PNG")


def test_without_a_negative_there_is_one_line():
    [axes] = guidance_arrows(U, C, scales=(3,), title="One").axes
    assert [line.get_label() for line in axes.lines if "w (c" in line.get_label()] == ["u + w (c - u)"]


@pytest.mark.parametrize("n", [None, N])
def test_no_arrow_is_told(n):
    with pytest.raises(ValueError, match="c is u"):
        guidance_arrows(U, U, n, title="none")


def test_the_explorer_draws_what_is_set(model):
    explorer = GuidanceExplorer(model, "a red apple", steps=2)
    explorer.negative.value, explorer.guidance.value, explorer.rescale.value = "a blue star", 3.0, 0.5
    explorer.interval.value = (100, 800)
    explorer.draw()
    (said, images), (_, first) = explorer.rows
    expected = model.text2img("a red apple", "a blue star", guidance_scale=3.0, guidance_rescale=0.5,
                              guidance_interval=(100, 800), num_inference_steps=2,
                              batch=SHOWN, seed=0)
    assert [one.tobytes() for one in images] == [one.tobytes() for one in expected]
    assert [one.tobytes() for one in images] != [one.tobytes() for one in first]
    assert said == "a red apple, w = 3, negative: a blue star, rescale 0.5, interval 100 to 800"
    assert_shows(explorer.still(), [*images, *first])
    assert len(explorer.shown.children) == 4 and not explorer.button.disabled
    assert explorer.rows[1][0] == "a red apple, w = 5"                     # what is off is not said


def test_the_explorer_keeps_the_last_rows_and_has_a_still(model):
    explorer = GuidanceExplorer(model, "a red apple", steps=1)
    for scale in range(KEPT + 2):
        explorer.guidance.value = scale
        explorer.button.click()
    assert [said for said, _ in explorer.rows] == [f"a red apple, w = {w}" for w in range(KEPT + 1, 1, -1)]
    assert "image/png" in explorer._repr_mimebundle_()[0] and explorer.still().width <= WIDTH


def test_the_explorer_tells_and_does_not_raise(model, monkeypatch):
    explorer = GuidanceExplorer(model, "a red apple", steps=1)
    explorer.prompt.value = "a (red apple"
    monkeypatch.setattr(model, "text2img", lambda **given: (_ for _ in ()).throw(ValueError("too <much>")))
    explorer.button.click()
    assert explorer.message.value == "too &lt;much&gt;" and not explorer.button.disabled and len(explorer.rows) == 1


def test_images_stand_side_by_side(model):
    images = model.text2img("", num_inference_steps=1, batch=2, guidance_scale=1)
    row = side_by_side(images)
    assert row.crop((row.width - images[1].width, 0, row.width, row.height)).tobytes() == images[1].tobytes()
