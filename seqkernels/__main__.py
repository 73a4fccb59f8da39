"""`python -m seqkernels`: what this install has and what is missing; `doctor` tries it, `bench` times it."""

import argparse
import sys

import seqkernels
from seqkernels import hardware
from seqkernels.commands import bench, doctor


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code: 0, 1 where something is missing or wrong, 2 for options that do not
    fit, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m seqkernels", description=f"{__doc__}")
    parser.set_defaults(run=describe)
    commands = parser.add_subparsers(metavar="COMMAND", help="without one, what this install has")
    for name, module in (("doctor", doctor), ("bench", bench)):
        text = str(module.__doc__)
        command = commands.add_parser(name, help=text.splitlines()[0].split(": ", 1)[1], description=text)
        module.add_options(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C.", file=sys.stderr)
        return 130


def describe(options: argparse.Namespace) -> int:
    rows = [("seqkernels", seqkernels.__version__), *hardware.describe()]
    width = max(len(what) for what, _ in rows)
    for what, finding in rows:
        print(f"{what:<{width}}  {finding}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
