"""Rich output of a check, a hint, a solution and the progress: HTML in a notebook, plain text elsewhere.

Cards are static HTML with inline styles, so that they also show on the web page of a notebook. Backgrounds are
translucent and text takes the page's colour, so that one card fits light and dark themes.
"""

import html
import sys
from dataclasses import dataclass

TINTS = {"green": "46, 160, 67", "grey": "140, 140, 150", "orange": "219, 124, 20", "blue": "56, 132, 220"}
BAR = 20                # characters of a progress bar in plain text
LINES, WIDTH = 12, 100  # the most lines of an answer's output that are shown, and characters of a line


@dataclass(frozen=True)
class Card:
    """A title with a badge, sentences, and the output printed; `plain` is all of it as text."""

    colour: str
    title: str
    badge: str
    sentences: tuple[str, ...]
    plain: str
    printed: str = ""

    def __repr__(self) -> str:
        return self.plain

    def _repr_html_(self) -> str:
        tint = TINTS[self.colour]
        badge = f'<span style="background: rgba({tint}, 0.25); border-radius: 8px; padding: 1px 8px; ' \
                f'font-size: 90%; white-space: nowrap">{html.escape(self.badge)}</span>'
        lines = "".join(f'<div style="margin-top: 4px">{_to_html(sentence)}</div>'
                        for sentence in self.sentences if sentence)
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
    """A progress bar for each notebook: rows of (name, exercises solved, exercises), and a note below."""

    rows: tuple[tuple[str, int, int], ...]
    note: str = ""

    def __repr__(self) -> str:
        width = max((len(name) for name, _, _ in self.rows), default=0)
        lines = [f"{name:{width}}  {'#' * (BAR * done // of):.<{BAR}}  {done} of {of}" for name, done, of in self.rows]
        return "\n".join([*lines, *([self.note] if self.note else [])])

    def _repr_html_(self) -> str:
        cell = 'style="padding: 2px 10px 2px 0; text-align: left; background: transparent"'
        rows = "".join(
            f'<tr style="background: transparent"><td {cell}>{html.escape(name)}</td><td {cell}>'
            '<div style="width: 220px; height: 10px; border-radius: 5px; background: rgba(128, 128, 128, 0.25)">'
            f'<div style="width: {100 * done / of:.0f}%; height: 10px; border-radius: 5px; '
            f'background: rgb({TINTS["green"]})"></div></div></td><td {cell}>{done} of {of}</td></tr>'
            for name, done, of in self.rows)
        return f'<table style="border: none; color: inherit">{rows}</table>{html.escape(self.note)}'


@dataclass(frozen=True)
class Source:
    """Python code as Markdown, which front ends highlight in their theme, and a note above it."""

    title: str
    code: str
    note: str = ""

    def __repr__(self) -> str:
        return "\n".join([f"# {self.title}", *([f"# {self.note}"] if self.note else []), "", self.code])

    def _repr_markdown_(self) -> str:
        note = f"\n\n{self.note}" if self.note else ""
        return f"**{self.title}**{note}\n\n```python\n{self.code}\n```"


def show(card: Card | Bars | Source):
    """Display it in a notebook, print it elsewhere."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        print(card)
        return
    from IPython.display import display

    display(card)


def shorten_output(printed: str) -> str:
    """The first LINES lines of the output, each cut at WIDTH characters; an ellipsis shows each cut."""
    lines = printed.rstrip().splitlines()
    shown = [line if len(line) <= WIDTH else f"{line[:WIDTH]} ..." for line in lines[:LINES]]
    return "\n".join(shown + (["..."] if len(lines) > LINES else []))


def _to_html(sentence: str) -> str:
    """The sentence as HTML, with `code` in a monospaced font."""
    parts = html.escape(sentence).split("`")
    if len(parts) % 2 == 0:             # a backtick without its pair
        return html.escape(sentence)
    code = '<code style="font-family: monospace; background: rgba(128, 128, 128, 0.15); color: inherit">'
    return "".join(part if i % 2 == 0 else f"{code}{part}</code>" for i, part in enumerate(parts))
