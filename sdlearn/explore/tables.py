"""Tables of measurements: aligned text on a terminal, HTML in a notebook."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

Cell = float | int | str | bool | None


@dataclass(frozen=True)
class Table:
    """Rows of measurements under named columns.

    columns: names of the columns. rows: one sequence of cells each, as long as `columns`. formats: a Python format
    specification by column, for numbers; text is shown as it is, None as an empty cell. Raises ValueError for a row
    of another length and for a format of a column that does not exist.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    formats: Mapping[str, str] | None = None
    caption: str = ""

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row has {len(row)} cells for {len(self.columns)} columns: {row}")
        if unknown := set(self.formats or {}) - set(self.columns):
            raise ValueError(f"there is no column {', '.join(sorted(unknown))}; there are {', '.join(self.columns)}")

    def texts(self) -> list[list[str]]:
        """The cells as they are shown, row by row."""
        formats = [(self.formats or {}).get(column, "") for column in self.columns]
        return [["" if cell is None else str(cell) if isinstance(cell, str | bool) else format(cell, one)
                 for cell, one in zip(row, formats, strict=True)] for row in self.rows]

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers alone; those are aligned at the right."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and not any(isinstance(cell, str | bool) for cell in cells)

    def __str__(self) -> str:
        shown = [list(self.columns), *self.texts()]
        widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
        lines = ["  ".join(text.rjust(width) if self.is_numeric(i) else text.ljust(width)
                           for i, (text, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in shown]
        return "\n".join(filter(None, [self.caption, *lines]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        align = ["right" if self.is_numeric(i) else "left" for i in range(len(self.columns))]

        def line(texts: Sequence[str], tag: str) -> str:
            return "<tr>" + "".join(f'<{tag} style="text-align: {side}">{escape(text)}</{tag}>'
                                    for text, side in zip(texts, align, strict=True)) + "</tr>"

        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        head = f"<thead>{line(self.columns, 'th')}</thead>"
        body = "".join(line(row, "td") for row in self.texts())
        return f"<table>{caption}{head}<tbody>{body}</tbody></table>"
