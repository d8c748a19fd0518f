"""The commands of `python -m sdlearn`, a file each: `add_arguments(parser)` and `run(args)`."""
