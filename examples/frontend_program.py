"""A program in SGLang's frontend language against a running server: one draft, two continuations of it in parallel.

    python -m sglang.launch_server --model-path MODEL --kv-compression hardkv --port 30000
    python examples/frontend_program.py --url http://127.0.0.1:30000

Nothing in the program knows about compression. The forks share the prompt and the draft through the radix cache.
"""

from __future__ import annotations

import argparse
from typing import Any

import sglang as sgl


@sgl.function
def story(s: Any, subject: str, tokens: int) -> None:
    """A draft, and two endings that do not see each other."""
    s += sgl.user(f"Tell a story about {subject}.")
    s += sgl.assistant(sgl.gen("draft", max_tokens=tokens, temperature=0))
    endings = s.fork(2)
    for fork, mood in zip(endings, ("happy", "sad"), strict=True):
        fork += sgl.user(f"Now tell a {mood} ending.")
        fork += sgl.assistant(sgl.gen("ending", max_tokens=tokens, temperature=0))
    s["happy"], s["sad"] = (fork["ending"] for fork in endings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help="most tokens of each part (default: %(default)s)")
    args = parser.parse_args()
    sgl.set_default_backend(sgl.RuntimeEndpoint(args.url))
    state = story.run(subject="a lighthouse keeper who learns to read the weather", tokens=args.tokens)
    for part in ("draft", "happy", "sad"):
        print(f"--- {part}\n{state[part]}\n")


if __name__ == "__main__":
    main()
