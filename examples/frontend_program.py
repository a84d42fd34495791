"""A program in SGLang's frontend language against a running server: one draft, two continuations of it in parallel.

    python -m sglang.launch_server --model-path MODEL --kv-compression hardkv --port 30000
    python examples/frontend_program.py --url http://127.0.0.1:30000

Nothing in the program knows about compression. The forks share the prompt and the draft through the radix cache.
"""

from __future__ import annotations

import argparse
from typing import Any

import sglang as sgl

PROMPT = "An essay about the history of bread.\n\nBread is one of the oldest foods."
CONTINUATIONS = {
    "recipe": "\n\nA recipe for a loaf of bread:\n1.",
    "advertisement": "\n\nAn advertisement for a bakery:\n",
}


@sgl.function
def essay(s: Any, tokens: int) -> None:
    """A draft, and continuations that do not see each other."""
    # all parts get their full length, whether the model would end earlier or not
    length: dict[str, Any] = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    s += PROMPT + sgl.gen("draft", **length)
    forks = s.fork(len(CONTINUATIONS))
    for fork, (name, start) in zip(forks, CONTINUATIONS.items(), strict=True):
        fork += start + sgl.gen(name, **length)
    for fork, name in zip(forks, CONTINUATIONS, strict=True):
        s[name] = fork[name]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each part (default: %(default)s)")
    args = parser.parse_args()
    sgl.set_default_backend(sgl.RuntimeEndpoint(args.url))
    state = essay.run(tokens=args.tokens)
    for part in ("draft", *CONTINUATIONS):
        print(f"--- {part}\n{state[part]}\n")


if __name__ == "__main__":
    main()
