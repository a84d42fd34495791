"""Tokenised texts of a frontier run, as JSON: documents, documents with facts to recall, prompts to generate from.

    python -m bench.fidelity.texts --model FOLDER --out documents.json
    python -m bench.fidelity.texts --model FOLDER --prompts --out prompts.json
    python -m bench.fidelity.texts --model FOLDER --needles --out needles.json

A file may go to a machine that has neither tokenizer nor documents. Files of `bench.fidelity.generate` look the same.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from bench.fidelity.documents import DOCUMENTS
from bench.fidelity.needle import Span, plant
from bench.fidelity.tasks import Text
from hardkv_sglang.cli.demo_model import cache_directory

PROMPT, DECODED = 512, 3584  # tokens of a document
RECALLED = 3072  # decoded tokens of a document among which facts are planted
FORMS = {
    "story": "Write a very long story about {}. Describe every scene in detail.",
    "program": "Write a complete Python program about {}, without any framework: modules, classes, tests, docs. "
    "Show all files in full.",
    "worked": "Explain {} from the beginning, with many worked numerical examples, step by step.",
    "letters": "Write a long exchange of letters about {} between two friends who disagree.",
    "plan": "Plan a year of work on {}, week by week, with tasks, costs and risks of every week.",
    "interview": "Write a long interview about {}. At least forty questions and answers.",
    "lessons": "Write a course of twenty lessons about {}, each with explanations, exercises and solutions.",
    "glossary": "Write a glossary of one hundred terms of {}, each with a definition and an example.",
}
TOPICS = ("coral reefs", "statistics", "railway timetables", "database engines")
PROMPTS = {
    f"generated_{name}_{topic.split()[-1]}": form.format(topic) for topic in TOPICS for name, form in FORMS.items()
}


def read_texts(paths: Sequence[Path]) -> list[Text]:
    """Texts of some files, numbered through."""
    entries = [entry for path in paths for entry in json.loads(path.read_text())]
    return [
        Text(
            entry["name"], number, torch.tensor(entry["tokens"]), entry["prompt_len"],
            [Span(**span) for span in entry.get("spans", [])],
        )
        for number, entry in enumerate(entries)
    ]  # fmt: skip


def document_entries(tokenizer: Any) -> list[dict[str, Any]]:
    """The benchmark's documents, cut to a prompt and a decoded part."""
    cache, size = cache_directory() / "fidelity-texts", PROMPT + DECODED + 1
    texts = {document.name: document.read(cache)[: 12 * size] for document in DOCUMENTS}
    ids = {name: tokenizer(text, add_special_tokens=False).input_ids[:size] for name, text in texts.items()}
    return [{"name": name, "prompt_len": PROMPT, "tokens": tokens} for name, tokens in ids.items()]


def needle_entries(tokenizer: Any) -> list[dict[str, Any]]:
    """The documents with facts planted in their decoded part, and questions for them at its end."""

    def tokenize(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return ids

    entries = []
    for document in document_entries(tokenizer):
        tokens, spans = plant(document["tokens"], PROMPT, RECALLED, tokenize)
        found = {"spans": [asdict(span) for span in spans], "tokens": tokens.tolist()}
        entries.append({"name": f"needles_{document['name']}", "prompt_len": PROMPT, **found})
    return entries


def prompt_entries(tokenizer: Any) -> list[dict[str, Any]]:
    """Prompts that ask for long answers, in the model's chat format."""
    entries = []
    for name, prompt in PROMPTS.items():
        tokens = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        entries.append({"name": name, "prompt_len": len(tokens), "tokens": tokens})
    return entries


def main(argv: Sequence[str] | None = None) -> int:
    """Write one file."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.texts", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder with the model's tokenizer")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--prompts", action="store_true", help="prompts instead of documents")
    kind.add_argument("--needles", action="store_true", help="documents with facts to recall")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    entries = prompt_entries if args.prompts else needle_entries if args.needles else document_entries
    args.out.write_text(json.dumps(entries(tokenizer)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
