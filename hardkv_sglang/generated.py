"""Tables in `docs/` that the code writes: the text between `<!-- NAME: ... -->` and `<!-- NAME end -->` of a file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path


def insert_generated(document: str, name: str, text: str) -> str:
    """The document with `text` between the markers of `name`. Raises `ValueError` unless it has them exactly once."""
    pattern = re.compile(rf"(<!-- {name}: [^>]*-->\n)(.*?)(\n?<!-- {name} end -->)", re.DOTALL)
    changed, places = pattern.subn(lambda match: f"{match[1]}{text}\n<!-- {name} end -->", document)
    if places != 1:
        raise ValueError(f"expected one pair of markers `<!-- {name}: ... -->`, `<!-- {name} end -->`, found {places}")
    return changed


def write_or_print(name: str, text: str, argv: Sequence[str] | None = None) -> None:
    """Print the text, or with `--write FILE` put it between the markers of `name` in that file."""
    parser = argparse.ArgumentParser(description=f"Print the table of {name}, or write it into a document.")
    parser.add_argument("--write", type=Path, metavar="FILE", help=f"document with the markers of {name}")
    file = parser.parse_args(argv).write
    if file is None:
        print(text)
    else:
        file.write_text(insert_generated(file.read_text(), name, text))
