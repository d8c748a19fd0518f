"""What a check, a hint, a solution and the progress look like: a small card in a browser, plain text elsewhere.

Cards are static and carry their own style, so that they show on the web page of a notebook too. Their
grounds are tints that let the page's own show through, and letters take the page's colour: one card for
light themes and dark ones.
"""

import html
import sys
from dataclasses import dataclass

TINTS = {"green": "46, 160, 67", "grey": "140, 140, 150", "orange": "219, 124, 20", "blue": "56, 132, 220"}
BAR = 20                # characters of a bar in plain text
LINES, WIDTH = 12, 100  # of what an answer printed, shown at most


@dataclass(frozen=True)
class Card:
    """A title, a word beside it, sentences, and what was printed; `plain` is all of it as text."""

    colour: str
    title: str
    badge: str
    said: tuple[str, ...]
    plain: str
    printed: str = ""

    def __repr__(self) -> str:
        return self.plain

    def _repr_html_(self) -> str:
        tint = TINTS[self.colour]
        badge = f'<span style="background: rgba({tint}, 0.25); border-radius: 8px; padding: 1px 8px; ' \
                f'font-size: 90%; white-space: nowrap">{html.escape(self.badge)}</span>'
        lines = "".join(f'<div style="margin-top: 4px">{_marked(one)}</div>' for one in self.said if one)
        if self.printed:
            lines += ('<div style="margin-top: 6px; font-size: 85%; opacity: 0.8">it printed</div>'
                      '<pre style="margin: 2px 0 0 0; padding: 4px 8px; background: rgba(128, 128, 128, 0.12); '
                      'color: inherit; font-family: monospace; font-size: 85%; white-space: pre-wrap">'
                      f'{html.escape(self.printed)}</pre>')
        return (f'<div style="border-left: 4px solid rgb({tint}); background: rgba({tint}, 0.10); color: inherit; '
                'border-radius: 3px; padding: 6px 12px; margin: 2px 0; max-width: 760px; line-height: 1.45">'
                f'<b>{html.escape(self.title)}</b> &ensp;{badge}{lines}</div>')


@dataclass(frozen=True)
class Bars:
    """A bar for each notebook: (name, done, of)."""

    rows: tuple[tuple[str, int, int], ...]
    said: str = ""

    def __repr__(self) -> str:
        width = max((len(name) for name, _, _ in self.rows), default=0)
        lines = [f"{name:{width}}  {'#' * (BAR * done // of):.<{BAR}}  {done} of {of}" for name, done, of in self.rows]
        return "\n".join([*lines, *([self.said] if self.said else [])])

    def _repr_html_(self) -> str:
        cell = 'style="padding: 2px 10px 2px 0; text-align: left; background: transparent"'
        rows = "".join(
            f'<tr style="background: transparent"><td {cell}>{html.escape(name)}</td><td {cell}>'
            '<div style="width: 220px; height: 10px; border-radius: 5px; background: rgba(128, 128, 128, 0.25)">'
            f'<div style="width: {100 * done / of:.0f}%; height: 10px; border-radius: 5px; '
            f'background: rgb({TINTS["green"]})"></div></div></td><td {cell}>{done} of {of}</td></tr>'
            for name, done, of in self.rows)
        return f'<table style="border: none; color: inherit">{rows}</table>{html.escape(self.said)}'


@dataclass(frozen=True)
class Source:
    """Python code, as Markdown: front ends colour it to their theme."""

    title: str
    code: str
    said: str = ""

    def __repr__(self) -> str:
        return "\n".join([f"# {self.title}", *([f"# {self.said}"] if self.said else []), "", self.code])

    def _repr_markdown_(self) -> str:
        said = f"\n\n{self.said}" if self.said else ""
        return f"**{self.title}**{said}\n\n```python\n{self.code}\n```"


def show(card: Card | Bars | Source):
    """Display it where there is a notebook, print it elsewhere."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        print(card)
        return
    from IPython.display import display

    display(card)


def shortened(printed: str) -> str:
    """The first lines of what was printed, and that there were more."""
    lines = printed.rstrip().splitlines()
    kept = [line if len(line) <= WIDTH else f"{line[:WIDTH]} ..." for line in lines[:LINES]]
    return "\n".join(kept + (["..."] if len(lines) > LINES else []))


def _marked(said: str) -> str:
    """The sentence as HTML, with `code` in the letters of code."""
    parts = html.escape(said).split("`")
    if len(parts) % 2 == 0:             # one that has no end
        return html.escape(said)
    code = '<code style="font-family: monospace; background: rgba(128, 128, 128, 0.15); color: inherit">'
    return "".join(part if i % 2 == 0 else f"{code}{part}</code>" for i, part in enumerate(parts))
