"""What drawings of the tests show."""

import numpy as np


def assert_shows(drawing, images, *, start: int = 0):
    """That the axes of a drawing hold exactly those images, in their order, from number `start` on."""
    shown = [axes.images[0].get_array() for axes in drawing.axes if axes.images][start:]
    assert len(shown) == len(images), f"{len(shown)} images where there must be {len(images)}"
    for i, (one, expected) in enumerate(zip(shown, images, strict=True)):
        assert np.array_equal(np.asarray(one), np.asarray(expected)), f"image {start + i} is another one"
