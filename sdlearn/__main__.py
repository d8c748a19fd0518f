"""The command line: `python -m sdlearn COMMAND`, the commands of `COMMANDS`.

Bad input is one sentence on stderr and exit status 2; Ctrl-C is exit status 130. A command's modules are
imported only when it is the one that runs, so that --help does not wait for PyTorch.
"""

import argparse
import sys
from importlib import import_module


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        self.exit(2, f"error: {message} (see --help)\n")


# Command: its help, and the module that has its `add_arguments` and `run`.
COMMANDS = {
    "generate": ("make images of a prompt", "commands.generate"),
    "scenes": ("draw a sheet of the scenes that the model learns from", "commands.scenes"),
    "train": ("train the model's parts, or the judge", "commands.train"),
    "evaluate": ("measure how well a model follows prompts", "commands.evaluate"),
    "ablate": ("ablations: train or sample with one thing left out, and write the measurements", "commands.ablate"),
    "bench": ("measure how long an image takes, side by side with diffusers", "commands.bench"),
    "optimizations": ("measure what makes sampling fast, one change after the other", "commands.optimizations"),
    "quote": ("write the values that notebooks measured into the texts that quote them", "commands.quote"),
    "export": ("write a model as a folder for diffusers or as a single file", "commands.export"),
}
RENAMED = {"ladder": "optimizations"}           # commands of earlier versions, which still run


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in RENAMED:
        print(f"`{argv[0]}` is now called `{RENAMED[argv[0]]}`", file=sys.stderr)
        argv = [RENAMED[argv[0]], *argv[1:]]
    try:
        return run(argv)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def run(argv: list[str]) -> int:
    parser = Parser(prog="python -m sdlearn", description="Stable Diffusion, small enough to learn from.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, (help, module) in COMMANDS.items():
        command = commands.add_parser(name, help=help, description=help)
        if argv[:1] == [name]:
            import_module(f".{module}", __package__).add_arguments(command)
    args = parser.parse_args(argv)

    from .checkpoint import CheckpointError, first_line
    from .pipeline import SettingsError

    try:
        import_module(f".{COMMANDS[args.command][1]}", __package__).run(args)
    except (CheckpointError, SettingsError, FloatingPointError, MemoryError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
