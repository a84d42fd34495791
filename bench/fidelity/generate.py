"""Let the model write the texts: sampled densely at temperature 1 from a fixed seed, to be teacher-forced afterwards.

    python -m bench.fidelity.generate --model FOLDER --prompts prompts.json --tokens 3584 --out generated.json

What a server compresses is text of this kind: less surprising to the model than a document, and full of what it said
before.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

SEED = 20261127


def main(argv: Sequence[str] | None = None) -> int:
    """Generate from all prompts at once and write one file of texts."""
    parser = argparse.ArgumentParser(prog="python -m bench.fidelity.generate", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="of bench.fidelity.texts --prompts")
    parser.add_argument("--tokens", type=int, default=3584, metavar="N", help="of each text; end tokens never come")
    parser.add_argument("--suppress", type=int, nargs="+", default=[], metavar="ID", help="tokens that never come, too")
    parser.add_argument(
        "--least-new", type=float, default=0.0, metavar="SHARE",
        help="leave texts out that repeat themselves: in whose second half fewer four-grams are new",
    )  # fmt: skip
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval().to(args.device)
    prompts = json.loads(args.prompts.read_text())
    texts = continue_prompts(model, prompts, args.tokens, args.suppress)
    args.out.write_text(json.dumps([text for text in texts if new_four_grams(text) >= args.least_new]))
    return 0


@torch.inference_mode()
def continue_prompts(
    model: Any, prompts: Sequence[dict[str, Any]], num_tokens: int, suppressed: Sequence[int]
) -> list[dict[str, Any]]:
    """Each prompt with `num_tokens` sampled tokens behind it."""
    never = {"suppress_tokens": list(suppressed)} if suppressed else {}
    longest = max(len(prompt["tokens"]) for prompt in prompts)
    padding = [longest - len(prompt["tokens"]) for prompt in prompts]
    ids = [[0] * pad + prompt["tokens"] for pad, prompt in zip(padding, prompts, strict=True)]
    mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
    torch.manual_seed(SEED)
    sampled = model.generate(
        input_ids=torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
        **never,
    )
    new = sampled[:, longest:].tolist()
    return [{**prompt, "tokens": prompt["tokens"] + row} for prompt, row in zip(prompts, new, strict=True)]


def new_four_grams(text: dict[str, Any]) -> float:
    """Share of the four-grams of a text's second half that do not repeat another one of it."""
    half = text["tokens"][len(text["tokens"]) // 2 :]
    grams = list(zip(half, half[1:], half[2:], half[3:], strict=False))
    return len(set(grams)) / len(grams)


if __name__ == "__main__":
    sys.exit(main())
