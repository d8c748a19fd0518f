"""Types of command-line arguments that several commands take."""

import argparse
import math


def positive(kind: type):
    """An argparse type: a finite number of `kind` above zero."""
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number above zero")
        return value
    return read
