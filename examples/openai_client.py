"""Chat with a running server through the OpenAI SDK: streamed and compressed, then the same request kept dense.

python -m sglang.launch_server --model-path MODEL --kv-compression hardkv --port 30000
python examples/openai_client.py --url http://127.0.0.1:30000
"""

from __future__ import annotations

import argparse
from typing import Any

import openai
import requests

QUESTION = "Explain how to plan a vegetable garden, month by month."
DENSE = {"custom_params": {"kv_compression": "none"}}  # keeps one request dense


def stream(client: openai.OpenAI, num_tokens: int, extra_body: dict[str, Any]) -> int:
    """Print one answer as it comes; returns the number of generated tokens."""
    chunks = client.chat.completions.create(
        model="default",
        messages=[{"role": "user", "content": QUESTION}],
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra_body,
    )
    generated = 0
    for chunk in chunks:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:
            generated = chunk.usage.completion_tokens
    print()
    return generated


def compression_state(url: str) -> dict[str, Any]:
    """Counters and occupancy of the server's compression."""
    info = requests.get(f"{url}/server_info", timeout=60).json()
    state: dict[str, Any] = info["internal_states"][0]["hardkv"]
    return state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1024, help="most tokens of an answer (default: %(default)s)")
    args = parser.parse_args()
    client = openai.OpenAI(base_url=f"{args.url}/v1", api_key="unused")

    for title, extra_body in (("compressed", {}), ("dense, by its own wish", DENSE)):
        before = compression_state(args.url)
        print(f"--- {title}")
        generated = stream(client, args.tokens, extra_body)
        after = compression_state(args.url)
        events = after["condense_events"] - before["condense_events"]
        freed = after["freed_pages"] - before["freed_pages"] - (after["allocated_pages"] - before["allocated_pages"])
        print(f"--- {generated} tokens, {events} condense events, {freed} token pages given back while it ran\n")


if __name__ == "__main__":
    main()
