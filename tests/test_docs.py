"""What README and docs name exists: links and their anchors, files, make targets, options and series."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import pytest

from hardkv_sglang.config import HardKVConfig

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
DOCUMENTS = [*GUIDES, *sorted((ROOT / "docs").glob("*.md"))]
ALSO_LINKED = [
    *sorted((ROOT / "bench").rglob("README.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
    ROOT / "patches" / "README.md",
]

LINK = re.compile(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
SOURCE = re.compile(r"[\w./-]+/[\w.-]+\.(?:py|md|json|yaml|yml|toml|png|patch)\b|\b[\w-]+\.py\b")
MAKE = re.compile(r"\bmake ([a-z][\w-]*)")
MODULE = re.compile(r"python3? -m ((?:bench|hardkv_sglang)[\w.]*)")
COMMAND = re.compile(r"(?:^|`| {4})hardkv ([a-z]+)", re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]+")
OPTIONS = re.compile(r"--(?:kv-compression-config|options|config) '(\{[^']*\})'")
# history names files that are gone
HISTORY = ("log.md", "CHANGELOG.md")
# written by the commands beside which they stand, or by users
WRITTEN = {"out.json", "report.json", "priors.json", "options.json", "file.yaml", "engine.py"}

# of programs that are neither ours nor SGLang's server
FOREIGN_FLAGS = {"--profile", "--no-deps"}


def name_of(path: Path) -> str:
    """Identity of a parametrised document."""
    return path.relative_to(ROOT).as_posix()


def anchors(document: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", without_code(document.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def without_code(text: str) -> str:
    """The text without fenced blocks, whose lines may look like headings."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def code_of(text: str) -> str:
    """Inline code, fenced blocks and indented blocks, a piece a line."""
    fenced = re.findall(r"^```.*?^```", text, flags=re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", without_code(text))
    indented = re.findall(r"^ {4}\S.*$", without_code(text), re.MULTILINE)
    return "\n".join([*fenced, *inline, *indented])


def broken_links(document: Path, text: str) -> list[str]:
    """Relative links of the text that lead nowhere, as seen from the document."""
    broken = []
    for match in LINK.finditer(text):
        target = match[1] or match[2]
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


@cache
def repository_files() -> list[str]:
    """Paths of the tree from the root, each with a leading slash; nothing hidden, so nothing of `.venv`."""
    places = [place for place in ROOT.iterdir() if not place.name.startswith(".")]
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place]) if file.is_file()]
    return [f"/{name_of(file)}" for file in files]


def missing_files(text: str) -> list[str]:
    """Files that the code of a text names and that the repository does not have.

    A path may be relative to the root, to the package or to a folder in it: it counts if some file ends with it.
    """
    named = {match for match in SOURCE.findall(code_of(text)) if match.rpartition("/")[2] not in WRITTEN}
    return sorted(
        name for name in named if not any(file.endswith("/" + name.lstrip("./")) for file in repository_files())
    )


def missing_targets(text: str) -> list[str]:
    """Make targets that the code of a text names and the Makefile does not have."""
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    return sorted(set(MAKE.findall(code_of(text))) - targets)


def missing_modules(text: str) -> list[str]:
    """Modules that a text runs with `python -m` and that do not exist."""
    modules = {name: ROOT / name.replace(".", "/") for name in MODULE.findall(text)}
    return sorted(n for n, path in modules.items() if not path.with_suffix(".py").exists() and not path.is_dir())


def missing_commands(text: str) -> list[str]:
    """Subcommands of `hardkv` that a text names and the command does not have."""
    return sorted(name for name in set(COMMAND.findall(text)) if not (ROOT / f"hardkv_sglang/cli/{name}.py").exists())


@cache
def known_flags() -> set[str]:
    """Flags of our programs, and of SGLang's server."""
    package = importlib.util.find_spec("sglang")
    assert package is not None
    assert package.submodule_search_locations is not None
    fields = (Path(package.submodule_search_locations[0]) / "srt" / "server_args.py").read_text()
    ours = [file.read_text() for folder in ("hardkv_sglang", "bench") for file in (ROOT / folder).rglob("*.py")]
    named = {flag for text in ours for flag in re.findall(r"\"(--[a-z][\w-]+)\"", text)}
    derived = {f"--{field.replace('_', '-')}" for field in re.findall(r"^    (\w+): ", fields, re.MULTILINE)}
    return named | derived | set(re.findall(r"(--[a-z][\w-]+)", fields)) | FOREIGN_FLAGS


def unknown_flags(text: str) -> list[str]:
    """Flags that the code of a text names and that no program here has."""
    return sorted(set(FLAG.findall(code_of(text))) - known_flags())


@pytest.mark.parametrize("document", [*DOCUMENTS, *ALSO_LINKED], ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    assert broken_links(document, document.read_text()) == []


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name not in HISTORY], ids=name_of)
def test_named_files_and_commands_exist(document: Path) -> None:
    text = document.read_text()
    assert missing_files(text) == []
    assert missing_targets(text) == []
    assert missing_modules(text) == []
    assert missing_commands(text) == []
    assert unknown_flags(text) == []


@pytest.mark.parametrize("document", [*DOCUMENTS, *ALSO_LINKED], ids=name_of)
def test_options_in_commands_are_accepted(document: Path) -> None:
    for options in OPTIONS.findall(document.read_text()):
        HardKVConfig.from_mapping(json.loads(options))


def test_every_document_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    assert [d.name for d in (ROOT / "docs").glob("*.md") if d.name != "README.md" and f"]({d.name})" not in index] == []


def test_start_errors_are_those_of_the_code() -> None:
    section = (ROOT / "docs" / "operations.md").read_text().partition("## When the server does not start")[2]
    messages = re.findall(r"^\| `([^`]+)`", section, re.MULTILINE)
    source = "\n".join(file.read_text() for file in (ROOT / "hardkv_sglang").rglob("*.py"))
    fragments = [part.strip() for message in messages for part in message.split("...") if len(part.strip()) > 1]
    assert len(fragments) >= len(messages) > 3
    assert [fragment for fragment in fragments if fragment not in source] == []


def test_the_checks_find_what_is_broken() -> None:
    readme = ROOT / "README.md"
    assert broken_links(readme, "[a](docs/none.md) [b](docs/design.md#no-such-heading) [c](docs/design.md)") == [
        "docs/none.md",
        "docs/design.md#no-such-heading",
    ]
    assert broken_links(readme, '<img src="docs/img/none.png">') == ["docs/img/none.png"]
    assert missing_files("`selection/top_p.py` and `selection/bottom_p.py`, `top_q.py`") == [
        "selection/bottom_p.py",
        "top_q.py",
    ]
    assert missing_targets("`make test` and `make tea`") == ["tea"]
    assert missing_modules("python -m bench.serving, python -m bench.nothing") == ["bench.nothing"]
    assert unknown_flags("`--page-size 32 --kv-compression x --no-such`") == ["--no-such"]
    assert missing_commands("`hardkv eval` and `hardkv tea`") == ["tea"]
