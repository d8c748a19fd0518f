"""Figures and widget of notebook 01: spectra add up, low-pass images lose what is fast, edits do what they say."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawings import assert_shows
from matplotlib.text import Text
from models import one_thread, randomise  # noqa: F401

from sdlearn.config import PRESETS
from sdlearn.data import SIDE, draw_scenes
from sdlearn.explore.figures import WIDTH
from sdlearn.explore.latents import (
    Edit,
    LatentExplorer,
    channel_maps,
    colour_read,
    enlarged,
    face_error,
    framed,
    heat,
    kept_bytes,
    latent_sheet,
    letters_read,
    linear_probe,
    low_pass,
    reach,
    rings,
    spectrum,
    written,
)
from sdlearn.images import to_images, to_tensor
from sdlearn.vae import VAE, DiagonalGaussian


@pytest.fixture(scope="module")
def drawn():
    return list(draw_scenes(0, 4, "test"))


@pytest.fixture(scope="module")
def pixels(drawn):
    return to_tensor([scene.image for scene in drawn])


@pytest.fixture(scope="module")
def vae():
    made = VAE(PRESETS["tiny"].vae).requires_grad_(False).eval()
    randomise(made, torch.Generator().manual_seed(0))
    return made


def words(drawing) -> list[str]:
    return [text.get_text() for text in drawing.findobj(Text) if text.get_text()]


def wave(cycles: int, side: int = 64, along: int = 3) -> torch.Tensor:
    """One image, (1, 3, side, side), with so many waves from edge to edge."""
    line = torch.sin(2 * torch.pi * cycles * torch.arange(side) / side)
    return (line[:, None] if along == 2 else line).expand(1, 3, side, side)


# --- spectra ------------------------------------------------------------------------------------------

def test_a_limit_keeps_its_square_of_the_numbers():
    for height, width in ((64, 64), (32, 128)):
        for limit in (0.25, 0.5):
            share = (rings(height, width) <= limit).double().mean().item()
            assert abs(share - limit**2) < 4 / min(height, width)
    assert rings(8, 8)[0, 0] == 0 and rings(8, 8).max() == 1


@pytest.mark.parametrize("along", [2, 3])
def test_a_wave_passes_below_the_limit_and_is_gone_above_it(along):
    x = wave(8, along=along)                                # 8 of at most 32 waves: a quarter of the fastest
    assert torch.allclose(low_pass(x, 0.26), x, atol=1e-5)
    assert low_pass(x, 0.24).abs().max() < 1e-5
    assert torch.allclose(low_pass(x + 0.5, 0.24), torch.full_like(x, 0.5), atol=1e-5)


def test_all_of_an_image_passes_without_a_limit(pixels):
    assert torch.allclose(low_pass(pixels, 1.0), pixels, atol=1e-4)


def test_a_spectrum_adds_up_to_the_variance(pixels):
    for bands in (1, 7, 16):
        middles, power = spectrum(pixels, bands)
        variance = (pixels - pixels.mean(dim=(2, 3), keepdim=True)).double().square().mean()
        assert power.shape == middles.shape == (bands,) and torch.isclose(power.sum(), variance, rtol=1e-6)


@pytest.mark.parametrize("cycles, band", [(1, 0), (4, 0), (5, 1), (32, 7)])
def test_a_wave_stands_in_its_band(cycles, band):
    x = wave(cycles) if cycles < 32 else torch.tensor([1.0, -1.0]).repeat(32).expand(1, 3, 64, 64)
    _, power = spectrum(x, 8)
    assert power.argmax() == band and torch.isclose(power[band], power.sum())


def test_what_a_low_pass_takes_away_is_what_the_spectrum_says(pixels):
    _, power = spectrum(pixels, 4)
    lost = (pixels - low_pass(pixels, 0.5)).double().square().mean()
    assert torch.isclose(lost, power[2:].sum(), rtol=1e-4)


# --- probes and memory --------------------------------------------------------------------------------

def test_a_probe_finds_what_is_linear_and_nothing_else():
    draw = torch.Generator().manual_seed(0)
    classes = torch.arange(120) % 3
    noise = torch.randn(120, 2, 4, 4, generator=draw)
    clear = noise.clone()
    clear[:, 0, 1, 2] += 6 * classes                                        # one number of 32 tells
    clear[:, 1, 0, 0] += 6 * (classes == 1)
    for given, low, high in ((clear, 0.9, 1.0), (noise, 0.0, 0.6)):
        found = linear_probe(given[:90], classes[:90], given[90:])
        assert found.shape == (30,) and low <= (found == classes[90:]).double().mean() <= high


@pytest.mark.parametrize("penalty", [0.1, 3.0])
def test_a_probe_is_ridge_regression(penalty):
    draw = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 5, generator=draw), torch.arange(40) % 4
    scaled = ((x - x.mean(0)) / (x.std(0) + 1e-6)).double() / 5**0.5
    whole = torch.cat([scaled, torch.ones(40, 1)], dim=1)
    weights = torch.linalg.solve(whole.T @ whole + penalty * torch.eye(6), whole.T @ torch.eye(4).double()[y])
    assert torch.equal(linear_probe(x, y, x, penalty=penalty), (whole @ weights).argmax(dim=1))


def test_kept_bytes_counts_what_the_way_back_needs():
    network = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    x = torch.randn(5, 8)
    assert kept_bytes(network, x) == 4 * (x.numel() + 5 * 16)               # the input, and tanh's output, once
    with torch.no_grad():
        assert kept_bytes(network, torch.randn(10, 8)) == 2 * kept_bytes(network, x)


def test_reach_is_the_field_that_convolutions_see():
    convolutions = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, stride=2, padding=1),
                                       torch.nn.Conv2d(4, 4, 3, padding=1))
    seen = reach(lambda x: DiagonalGaussian(convolutions(x), torch.zeros(())), torch.rand(1, 3, 16, 16), (4, 3))
    there = (seen > 1e-8).nonzero()
    assert seen.shape == (16, 16) and seen.max() == 1
    middle = reach(lambda x: DiagonalGaussian(convolutions(x), torch.zeros(())), torch.rand(1, 3, 16, 16))
    assert (middle > 1e-8).nonzero().double().mean(dim=0).tolist() == [8, 8]
    # Cell (4, 3) sees rows 3...5 of the first map, and row i of that 2i - 1 ... 2i + 1 of the image.
    assert there.amin(dim=0).tolist() == [5, 3] and there.amax(dim=0).tolist() == [11, 9]


def test_a_colour_is_read_where_a_norm_leaves_it():
    assert colour_read(lambda x, *_: x, 1) == pytest.approx(1)
    assert colour_read(lambda x, *_: x / x.norm(dim=1, keepdim=True), 1) < 0.95            # its strength is gone
    assert colour_read(lambda x, *_: 0 * x, 1) < 0.01


def test_letters_are_read_until_they_are_gone():
    assert letters_read(lambda pixels: pixels, 8) == 1
    assert letters_read(lambda pixels: torch.ones_like(pixels), 20) == pytest.approx(1 / 26)


def test_the_error_of_a_face_is_of_its_own_pixels():
    assert face_error(lambda pixels: pixels, "sad face", 40) == 0
    around = torch.ones(SIDE, SIDE, dtype=torch.bool)
    around[44:84, 44:84] = False
    assert face_error(lambda pixels: pixels + around, "sad face", 40) == 0
    assert face_error(lambda pixels: pixels.mean(dim=(2, 3), keepdim=True) + 0 * pixels, "sad face", 40) > 0.5


# --- images -----------------------------------------------------------------------------------------

def test_a_frame_continues_the_ground():
    small = np.full((5, 5, 3), 7, np.uint8)
    small[2, 2] = 90
    large = framed(small, 12)
    assert large.shape == (12, 12, 3) and (large == 90).all(axis=2).sum() == 1
    assert (large[:, 0] == 7).all() and (framed(small, 5) == small).all()


def test_letters_stand_where_they_are_asked_for_and_grow_with_the_size():
    small, large = (written("x", size, 64, 48) for size in (10, 30))
    assert small.shape == (48, 64, 3) and small.dtype == np.uint8
    assert 0 < (small < 128).sum() < (large < 128).sum()
    assert (written("", 10) == 255).all()
    aside = written("x", 10, 64, 48, place=(12, 10)) < 128
    assert aside[:20, :24].any() and not aside[20:].any() and not aside[:, 24:].any()
    assert (written("x", 30, ink=(255, 0, 0), paper=(0, 0, 255))[0, 0] == (0, 0, 255)).all()


def test_heat_spans_the_range_that_is_given():
    values = torch.tensor([[0.0, 0.5], [1.0, 2.0]])
    assert (heat(values, 0, 1)[1, 0] == heat(values, 0, 1)[1, 1]).all()         # what lies beyond is at the end
    assert len(np.unique(heat(values).reshape(-1, 3), axis=0)) == 4
    assert heat(torch.zeros(2, 2)).shape == (2, 2, 3)                           # without any range


def test_channels_share_one_scale_around_white():
    latent = torch.zeros(2, 4, 4)
    latent[0, 0, 0], latent[1, 1, 1] = 2.0, -1.0
    one, other = channel_maps(latent)
    assert one.shape == (SIDE, SIDE, 3) and (one[-1, -1] > 240).all()           # zero
    (r, _, b), (r_low, _, b_low) = one[0, 0].astype(int), other[40, 40].astype(int)
    assert r > b and b_low > r_low and b_low > b                                # half as far on the blue side
    assert enlarged(np.zeros((16, 16, 3), np.uint8)).shape == (SIDE, SIDE, 3)


def test_a_sheet_has_a_row_for_each_image(drawn):
    latent = torch.randn(4, 16, 16)
    rows = {scene.objects[0].name: (scene.image, latent, [scene.image]) for scene in drawn[:2]}
    drawing = latent_sheet(rows, ["again"], title="Two")
    assert len([axes for axes in drawing.axes if axes.images]) == 2 * (1 + 4 + 1)
    assert {"Two", "image", "channel 3", "again", *rows} <= set(words(drawing)) and drawing.width <= WIDTH
    with pytest.raises(ValueError, match="at least one row"):
        latent_sheet({}, title="None")


# --- the widget ---------------------------------------------------------------------------------------

def test_an_untouched_latent_is_the_autoencoders(vae, drawn, pixels):
    widget = LatentExplorer(vae, drawn)
    latent = widget.latent(Edit(scene=2))
    assert torch.allclose(latent, vae.to_latent(pixels[2:3])[0])
    images, captions = widget.row(Edit(scene=2))
    assert np.array_equal(images[0], drawn[2].image) and len(images) == len(captions) == 7
    assert np.array_equal(images[-2], to_images(vae.to_pixels(latent[None]))[0])
    assert captions[-2].startswith("decoded, ") and captions[-2].endswith(" dB")


def test_edits_do_what_they_say(vae, drawn, pixels):
    widget, latents = LatentExplorer(vae, drawn), vae.to_latent(pixels)
    mixed = widget.latent(Edit(scene=3, mix=0.25))                              # the last one's next is the first
    assert torch.allclose(mixed, 0.75 * latents[3] + 0.25 * latents[0], atol=1e-4)
    noisy = widget.latent(Edit(noise=0.5)) - latents[0]
    assert 0.45 < noisy.std() < 0.55 and torch.equal(widget.latent(Edit(noise=0.5)), widget.latent(Edit(noise=0.5)))
    lost = widget.latent(Edit(lost=1))
    assert not lost[1].any() and torch.allclose(lost[0], latents[0, 0], atol=1e-4)
    text = widget.latent(Edit(scene=1, text="a", size=30))
    assert torch.allclose(text, vae.to_latent(to_tensor([written("a", 30, SIDE, SIDE)]))[0], atol=1e-4)


def test_controls_change_the_image(vae, drawn):
    widget = LatentExplorer(vae, drawn)
    seen = {widget.image.value}
    for name, value in (("scene", 1), ("mix", 0.5), ("noise", 1.0), ("lost", 0), ("text", "a $ word"), ("size", 40)):
        widget.controls[name].value = value
        assert getattr(widget.edit(), name) == value and widget.image.value not in seen
        seen.add(widget.image.value)


def test_it_carries_an_image_for_pages_without_widgets(vae, drawn):
    widget = LatentExplorer(vae, drawn)
    bundle, sizes = widget._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= set(bundle)
    assert sizes["image/png"]["width"] <= WIDTH and widget.edit() == Edit()
    assert "with noise of 0.5" in " ".join(words(widget.still())).replace("\n", " ")
    edit = widget.edit()
    edits = [edit, *(replace(edit, **one) for one in ({"mix": 0.5}, {"noise": 0.5}, {"lost": 0}, {"text": "latent"}))]
    assert_shows(widget.still(), [image for one in edits for image in widget.row(one)[0]])


def test_fewer_than_two_scenes_are_refused(vae):
    with pytest.raises(ValueError, match="two scenes at least"):
        LatentExplorer(vae, [SimpleNamespace()])
