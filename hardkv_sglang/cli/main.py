"""Entry point of the `hardkv` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from hardkv_sglang.cli import calibrate, demo, doctor, eval, model, top

# each offers add_parser(subparsers) and run(args) -> exit status; heavy imports belong inside run()
SUBCOMMANDS = (calibrate, demo, doctor, eval, model, top)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "takes_server_flags"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.server_flags = rest
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("hardkv: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """Parser with one subparser per subcommand."""
    parser = argparse.ArgumentParser(prog="hardkv", description="Tools of HARD-KV for SGLang.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for subcommand in SUBCOMMANDS:
        subcommand.add_parser(subparsers)
    return parser


if __name__ == "__main__":
    sys.exit(main())
