"""Tiles: they cover a latent, their weights add up, what is local is not changed."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import one_thread, tiny_config, tiny_parts  # noqa: F401

from sdlearn.tiles import decode_tiled, tile_starts, tile_weights


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 19))
def test_tiles_cover_and_share(length, tile, overlap):
    if overlap >= tile:
        with pytest.raises(ValueError, match="cannot share"):
            tile_starts(length, tile, overlap)
        return
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0 and starts[-1] == max(0, length - tile)
    for one, two in zip(starts, starts[1:], strict=False):
        assert 0 < two - one <= tile - overlap


def test_neighbours_weights_add_up_to_one():
    right, left = tile_weights(10, 4, first=True, last=False), tile_weights(10, 4, first=False, last=True)
    assert torch.allclose(right[-4:] + left[:4], torch.ones(4))
    assert right[:6].eq(1).all() and left[4:].eq(1).all() and right[-1] > 0
    assert tile_weights(5, 0, first=False, last=False).eq(1).all()


@pytest.mark.parametrize("length, overlap", [(4, 3), (5, 4), (6, 3), (7, 6)])
def test_a_tile_with_neighbours_on_both_sides_has_symmetric_weights(length, overlap):
    """Also where the two ramps meet: there the smaller weight of the two is taken."""
    left, right = (tile_weights(length, overlap, first=first, last=not first) for first in (False, True))
    both = tile_weights(length, overlap, first=False, last=False)
    assert torch.equal(both, both.flip(0)) and torch.equal(both, torch.minimum(left, right))


def local(latent):
    """A decoder that knows no neighbours: each cell becomes a square of 2 x 2."""
    return latent[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize("rows, columns, tile, overlap", [(11, 7, 4, 2), (11, 7, 4, 0), (5, 16, 6, 5), (3, 4, 8, 2)])
def test_what_is_local_is_not_changed(rows, columns, tile, overlap):
    latent, sizes = torch.randn(2, 4, rows, columns), []

    def decode(part):
        sizes.append(part.shape)
        return local(part)
    found = decode_tiled(decode, latent, factor=2, tile=tile, overlap=overlap)
    assert torch.allclose(found, local(latent), atol=1e-5)
    assert max(max(shape[2:]) for shape in sizes) <= tile and {shape[:2] for shape in sizes} == {(2, 4)}


def test_tiles_are_mixed_in_proportion():
    """Two tiles that disagree by 1 meet in a straight line."""
    values = iter((0.0, 1.0))
    found = decode_tiled(lambda part: torch.full((1, 3, 8, 8), next(values)), torch.zeros(1, 4, 8, 12),
                         factor=1, tile=8, overlap=4)
    assert torch.allclose(found[0, 0, 3], torch.tensor([0.0] * 4 + [0.125, 0.375, 0.625, 0.875] + [1.0] * 4))


@pytest.mark.parametrize("across", [True, False], ids=["columns", "rows"])
@pytest.mark.parametrize("factor", [1, 2, 4])
def test_tiles_are_blended_over_all_pixels_of_their_overlap(factor, across):
    """An overlap of 4 cells is 4 * factor pixels, over which the first tile's 0 becomes the second tile's 1."""
    values = iter((0.0, 1.0))
    shape = (1, 4, 8, 12) if across else (1, 4, 12, 8)
    found = decode_tiled(lambda part: torch.full((1, 3, 8 * factor, 8 * factor), next(values)), torch.zeros(shape),
                         factor=factor, tile=8, overlap=4)[0, 0]
    pixels = 4 * factor
    ramp_up = (torch.arange(pixels) + 0.5) / pixels
    expected = torch.cat([torch.zeros(pixels), ramp_up, torch.ones(pixels)])
    assert torch.allclose(found[3] if across else found[:, 3], expected)


def test_tiles_are_of_64_cells_and_share_16_unless_given():
    """112 columns take exactly two of them; the first is alone in columns 0 to 47, the second in 64 to 111."""
    sizes, values = [], iter((0.0, 1.0))

    def decode(part):
        sizes.append(tuple(part.shape[2:]))
        return torch.full((1, 3, *part.shape[2:]), next(values))
    found = decode_tiled(decode, torch.zeros(1, 4, 3, 112), factor=1)[0, 0, 0]
    assert sizes == [(3, 64), (3, 64)]
    assert found[:48].eq(0).all() and found[64:].eq(1).all() and found[48:64].diff().gt(0).all()


def test_tiles_are_put_together_on_the_latents_device():
    """On the meta device, where mixing devices raises."""
    found = decode_tiled(local, torch.empty(1, 4, 5, 7, device="meta"), factor=2, tile=4, overlap=2)
    assert found.device.type == "meta" and found.shape == (1, 3, 10, 14)


def test_one_tile_is_the_whole_image():
    vae = tiny_parts(config=tiny_config()).vae
    latent = torch.randn(1, 4, 6, 5)
    with torch.no_grad():
        found = decode_tiled(vae.to_pixels, latent, factor=2, tile=6, overlap=2)
        assert torch.allclose(found, vae.to_pixels(latent), atol=1e-6)
        assert not torch.allclose(decode_tiled(vae.to_pixels, latent, factor=2, tile=4, overlap=2), found, atol=1e-3)
