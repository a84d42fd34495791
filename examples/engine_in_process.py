"""SGLang's Engine in this process, without a server: several generations at once, and what compression did.

    python examples/engine_in_process.py --model MODEL
    python examples/engine_in_process.py --model "$(hardkv model)" --dtype float32 --tokens 320 \\
        --config '{"recent_tokens": 32, "query_window": 16, "select_interval": 32, "condense_interval": 96}'

The second line runs on a CPU with the small demo model, and with intervals so short that a few hundred tokens see
several events.
"""

from __future__ import annotations

import argparse
import json

import sglang as sgl

PROMPTS = ("The history of bread began", "A lighthouse keeper writes into his book:", "How to plan a garden, in steps:")
POOL_TOKENS = 16384  # small on purpose: an example should not take the whole GPU


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of the model")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens of each generation (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of weights and KV; float32 is twice as fast on a CPU")
    parser.add_argument("--config", type=json.loads, default={}, help="options of compression, a JSON object")
    args = parser.parse_args()

    engine = sgl.Engine(
        model_path=args.model,
        dtype=args.dtype,
        kv_compression="hardkv",
        kv_compression_config=args.config,
        max_total_tokens=POOL_TOKENS,
        max_running_requests=8,
    )
    try:
        sampling = {"temperature": 0.7, "max_new_tokens": args.tokens, "ignore_eos": True}
        replies = engine.generate(prompt=list(PROMPTS), sampling_params=sampling)
        for prompt, reply in zip(PROMPTS, replies, strict=True):
            print(f"--- {prompt}{reply['text'][:200]} ...")
        state = engine.get_server_info()["internal_states"][0]["hardkv"]
    finally:
        engine.shutdown()
    print(
        f"\n{state['select_events']} select and {state['condense_events']} condense events; "
        f"{state['freed_pages'] - state['allocated_pages']} token pages given back while requests ran; "
        f"{state['kept_fraction']:.0%} of the scored tokens kept"
    )


if __name__ == "__main__":  # the scheduler is a process of its own, which imports this file
    main()
