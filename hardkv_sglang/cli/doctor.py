"""`hardkv doctor`: checks an environment, and a server's flags and model, before a start."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hardkv_sglang.engine.preflight import Finding

    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EPILOG = """\
Every flag that is not named here is taken as one of sglang.launch_server: give those that you mean to start with.
--kv-compression hardkv may be left out. Exit status 1: such a start would be refused.

  hardkv doctor
  hardkv doctor --model-path MODEL --tp-size 2 --max-running-requests 512
"""


def add_parser(subparsers: Subparsers) -> None:
    """Declare the subcommand."""
    text = "check packages, device, server flags and model before a start; says what would be refused, and the remedy"
    parser = subparsers.add_parser(
        "doctor",
        help=text,
        usage="hardkv doctor [-h] [--json] [--model-path MODEL] [SERVER FLAGS]",
        description=f"{text[0].upper()}{text[1:]}. Nothing is loaded or started.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an abbreviation may be a flag of the server
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--model-path", metavar="MODEL", help="model folder or name; without it, only the environment")
    parser.set_defaults(run=run, takes_server_flags=True)


def run(args: argparse.Namespace) -> int:
    """Exit status 0 if a server would start, 1 if something refuses it."""
    from hardkv_sglang.engine.preflight import would_start
    from hardkv_sglang.engine.preflight.environment import inspect_environment

    findings = inspect_environment()
    flags = [*args.server_flags, *(["--model-path", args.model_path] if args.model_path else [])]
    if flags and would_start(findings):
        findings += inspect_quietly(flags)
    report(findings, args.json)
    return 0 if would_start(findings) else 1


def inspect_quietly(flags: Sequence[str]) -> list[Finding]:
    """Findings about the flags, without the log that SGLang writes while it resolves them."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from hardkv_sglang.engine.preflight.launch import inspect_launch

            return inspect_launch(flags)
    finally:
        logging.disable(previous)


def report(findings: Sequence[Finding], as_json: bool) -> None:
    """Print one line per finding, or all as one JSON object."""
    from hardkv_sglang.engine.preflight import would_start

    if as_json:
        content = {"would_start": would_start(findings), "findings": [asdict(finding) for finding in findings]}
        print(json.dumps(content, indent=1))
        return
    for finding in findings:
        print(describe(finding))
    print("a server would start" if would_start(findings) else "a start would be refused")


def describe(finding: Finding) -> str:
    """A finding on one line."""
    text = " ".join(f"{finding.subject}: {finding.text}".split())
    return f"{finding.status:<8} {text}" + (f"; {finding.remedy}" if finding.remedy else "")
