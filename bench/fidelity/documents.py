"""Real texts of different kinds: from the standard library, installed packages, and Debian packages."""

from __future__ import annotations

import argparse
import hashlib
import html
import importlib.util
import json
import re
import subprocess
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

DEBIAN_SHA256 = {
    "r-cran-janeaustenr=1.0.0-1": "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    "debian-handbook=11.20220922": "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
}
R_STRING = re.compile(rb"\x00\x04\x00\x09(....)", re.DOTALL)
"""Header of an ASCII string in R's serialisation: flags, then a big-endian length."""


class DocumentError(Exception):
    """A text cannot be had; the message says which and why."""


@dataclass(frozen=True)
class Document:
    """One text: where it comes from and what kind it is."""

    name: str
    kind: str
    source: str
    read: Callable[[Path], str]  # takes the cache folder


def module_file(module: str, name: str = "") -> Path:
    """A file of an importable package, without importing it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise DocumentError(f"package {module} is not installed")
    origin = Path(spec.origin)
    return origin.parent / name if name else origin


def debian_folder(package: str, cache: Path) -> Path:
    """Contents of a Debian package (`name=version`), downloaded once and checked.

    Raises `DocumentError` when the download fails or is not the file that this benchmark was written for.
    """
    folder = cache / package.replace("=", "_")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run(["apt-get", "download", package], cwd=cache, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DocumentError(f"cannot download Debian package {package}: {error}") from error
    archive = next(cache.glob(f"{package.split('=')[0]}_*.deb"))
    if hashlib.sha256(archive.read_bytes()).hexdigest() != DEBIAN_SHA256[package]:
        raise DocumentError(f"{archive} is not the file that this benchmark expects")
    partial = folder.with_suffix(".partial")
    subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True)
    return partial.rename(folder)


def read_novel(cache: Path) -> str:
    """Emma by Jane Austen, out of the R package's serialised data; the first value stored is that book."""
    folder = debian_folder("r-cran-janeaustenr=1.0.0-1", cache)
    stored = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    data = zlib.decompressobj().decompress(stored[4:])
    lines = []
    for match in R_STRING.finditer(data):
        length = int.from_bytes(match.group(1), "big")
        if length < 200:
            lines.append(data[match.end() : match.end() + length].decode("latin-1"))
    return "\n".join(lines)


def read_handbook(cache: Path) -> str:
    """The Debian Administrator's Handbook, chapter on network services, without its markup."""
    folder = debian_folder("debian-handbook=11.20220922", cache)
    page = (folder / "usr/share/doc/debian-handbook/html/en-US/network-services.html").read_text()
    body = page[page.index("<body") :]
    text = html.unescape(re.sub(r"<[^>]+>", "", body))
    return re.sub(r"\s*\n\s*", "\n", text)


def read_file(module: str, name: str = "") -> Callable[[Path], str]:
    """Reader of a text file that belongs to a package."""
    return lambda cache: module_file(module, name).read_text(errors="replace")


def read_topics(cache: Path) -> str:
    """The Python language reference, as `help()` shows it."""
    del cache
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def read_maths(cache: Path) -> str:
    """Documentation of special functions, half of it LaTeX and worked numerical examples."""
    source = module_file("mpmath", "function_docs.py").read_text()
    return source[source.index("zeta = ") :]


def read_licence(cache: Path) -> str:
    """Licence terms, as Debian installs them."""
    del cache
    return Path("/usr/share/common-licenses/GPL-3").read_text()


def read_records(cache: Path) -> str:
    """Structured data: one JSON object per line."""
    del cache
    entries = json.loads(module_file("pycountry", "databases/iso3166-2.json").read_text())["3166-2"]
    return "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)


DOCUMENTS = (
    Document("novel", "prose", "Debian r-cran-janeaustenr 1.0.0-1: Emma", read_novel),
    Document("python", "code", "standard library: argparse.py", lambda cache: Path(argparse.__file__).read_text()),
    Document("reference", "API documentation", "standard library: pydoc_data.topics", read_topics),
    Document("licence", "licence text", "Debian common-licenses: GPL-3", read_licence),
    Document("maths", "maths-like text", "mpmath: function_docs.py", read_maths),
    Document("handbook", "technical prose", "Debian debian-handbook 11.20220922: network services", read_handbook),
    Document("cpp", "code", "torch: include/fmt/chrono.h", read_file("torch", "include/fmt/chrono.h")),
    Document("records", "structured data", "pycountry: iso3166-2.json", read_records),
)
