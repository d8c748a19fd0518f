"""`python -m sdlearn quote`: write the values that notebooks measured into the texts that quote them."""

import argparse
from pathlib import Path

from ..explore.recording import fill_text, fill_values, read_notebook, values_of_course, write_notebook
from ..pipeline import SettingsError


def add_arguments(parser: argparse.ArgumentParser):
    parser.add_argument("files", nargs="+", type=Path, help="executed notebooks, and texts (.md) that quote them")
    parser.add_argument("--notebooks", type=Path, default=Path("notebooks"),
                        help="folder of the notebooks that texts quote (%(default)s)")


def run(args: argparse.Namespace):
    for path in args.files:
        try:
            if path.suffix == ".ipynb":
                write_notebook(path, fill_values(read_notebook(path)))
            else:
                text = fill_text(path.read_text(encoding="utf-8"), values_of_course(args.notebooks))
                path.write_text(text, encoding="utf-8")
        except KeyError as error:
            raise SettingsError(f"{path} quotes {error.args[0]}, which no cell recorded; execute the notebook first") \
                from error
        except ValueError as error:
            raise SettingsError(f"{path}: {error}") from error
        print(path)
