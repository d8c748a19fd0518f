"""A contact sheet: images in a grid, each with its caption beneath."""

import textwrap

import numpy as np
from PIL import Image, ImageDraw, ImageFont


def contact_sheet(images, captions, columns: int = 8, gap: int = 12, lines: int = 3) -> Image.Image:
    """`images` uint8 arrays (H, W, 3) of one size, `captions` as many strings; a PIL image.

    Captions are wrapped to the images' width and cut after `lines` lines.
    """
    images = [np.asarray(image) for image in images]
    if len(images) != len(captions) or not images:
        raise ValueError(f"a sheet needs one caption for each image, not {len(captions)} for {len(images)}")
    height, width = images[0].shape[:2]
    font = ImageFont.load_default(size=11)
    line = 14
    cell_w, cell_h = width + gap, height + gap + lines * line
    rows = -(-len(images) // columns)
    columns = min(columns, len(images))
    sheet = Image.new("RGB", (columns * cell_w + gap, rows * cell_h + gap), "#fafaf7")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = gap + i % columns * cell_w, gap + i // columns * cell_h
        sheet.paste(Image.fromarray(image), (x, y))
        draw.rectangle((x - 1, y - 1, x + width, y + height), outline="#c8c8c0")
        for j, part in enumerate(textwrap.wrap(caption, max(8, width // 6))[:lines]):
            draw.text((x, y + height + 3 + j * line), part, font=font, fill="#333330")
    return sheet
