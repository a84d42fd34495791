"""`hardkv model`: where the demo model is, converting it on first use."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hardkv_sglang.cli.demo_model import DemoModelError, demo_model_path

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


def add_parser(subparsers: Subparsers) -> None:
    """Declare the subcommand."""
    text = "print the folder of the demo model, converting it on first use"
    parser = subparsers.add_parser("model", help=text, description=text)
    parser.add_argument(
        "--path",
        nargs="?",
        type=Path,
        metavar="DIR",
        help="folder for the converted model (default: $HARDKV_CACHE or ~/.cache/hardkv)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the folder on standard output, everything else on standard error."""
    folder = args.path.expanduser() if args.path else None
    try:
        print(demo_model_path(folder))
    except DemoModelError as error:
        print(f"hardkv model: {error}", file=sys.stderr)
        return 2
    return 0
