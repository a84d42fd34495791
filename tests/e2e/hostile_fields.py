"""Hostile values of every field that a client may send."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from e2e.compressed import prompt_ids

# a field that is not sent
ABSENT: Any = object()
# stands for the path of the model that the server has
SERVED_MODEL = "SERVED MODEL"
CONTEXT_LENGTH = 8192
VOCABULARY = 49152
DEEP = 400  # nested lists: as deep as a JSON parser allows and deeper than any Python recursion should go


def nested(depth: int) -> Any:
    """A list in a list in a list."""
    value: Any = "x"
    for _ in range(depth):
        value = [value]
    return value


JUNK: tuple[Any, ...] = (
    ABSENT, None, True, False, 0, 1, -1, 2, 7, 31, 2**31 - 1, 2**31, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308,
    1e-320, float("nan"), float("inf"), "", "x", " ", "\x00", "\ud800", "\u202e\U0001f600", "null", "-1", "none",
    "x" * 100_000,
    [], [1], ["x"], [None], [[]], [[1], [2]], [1, "x", None, {}], {}, {"x": 1}, {"": None}, {"x": {"y": [1,
    {"z": "w"}]}},
    nested(30), nested(DEEP),
)  # fmt: skip

PROMPTS: tuple[Any, ...] = (
    [1], [0], [VOCABULARY - 1], [VOCABULARY], [-1], [2**31], [2**63 - 1], [1.5], ["x"], [[1], [2]], [[1, 2], []],
    [[1], 2],
    prompt_ids(31, 1), prompt_ids(32, 1), prompt_ids(33, 1), prompt_ids(63, 1), prompt_ids(128, 1), prompt_ids(300, 2),
    prompt_ids(2500, 3), prompt_ids(2559, 4), prompt_ids(2560, 4), prompt_ids(2561, 4), prompt_ids(CONTEXT_LENGTH, 5),
    [1] * (CONTEXT_LENGTH + 1), [[1, 2, 3]] * 20,
)  # fmt: skip
TEXTS: tuple[Any, ...] = (
    "", " ", "a", "\x00", "\ud800", "<|im_end|>", "<|im_start|>" * 40, "ab " * 3000, "a" * 50_000, ["", "a"],
    ["a"] * 20, [],
    ["a", 1], {"text": "a"},
)  # fmt: skip
LENGTHS: tuple[Any, ...] = (0, 1, 2, 65, 130, -1, 3000, CONTEXT_LENGTH, 2**31, 2**63, 10**30, 1.5, "8", None, True, [4])
COUNTS: tuple[Any, ...] = (0, 1, 2, 3, 17, -1, 1.5, "2", None, True, [2])
PENALTIES: tuple[Any, ...] = (0, 1, -1, 2, -2, 2.001, -3, 1e308, 1e-9, "1", None, True)
STOPS: tuple[Any, ...] = (
    "a", "", " ", ["a", "b"], [""], [], ["a"] * 1000, "x" * 10_000, [1], [None], [["a"]], "\x00", "\ud800", {"a": 1},
)  # fmt: skip
STOP_IDS: tuple[Any, ...] = ([], [0], [-1], [VOCABULARY], [2**63], [1.5], ["1"], [None], 5, list(range(5000)), [[1]])
REGEXES: tuple[Any, ...] = (
    "a+",
    "(",
    "(a+)+$",
    "[",
    "a{200}",
    "",
    ".*",
    5,
    ["a", "("],
    None,
    "(?<=a)b",
    "\\d" * 100,
)
SCHEMAS: tuple[Any, ...] = (
    '{"type": "object"}', '{"type": "string", "maxLength": 3}', "{", "", "[]", "null", '{"type": "nothing"}',
    '{"$ref": "#/x"}', 5,
    {"type": "object"}, '{"type": "object", "properties": {"a": {"$ref": "#"}}}', "$$ANY$$", '{"enum": []}', "true",
)  # fmt: skip
EBNFS: tuple[Any, ...] = ('root ::= "a"', "root ::= root", "x", "", 'root ::= "a" |', 5, None, "root ::= [a-z]+", "::=")
BIASES: tuple[Any, ...] = (
    {"1": 5}, {"1": "x"}, {"x": 1}, {"-1": 1}, {str(VOCABULARY): 1}, {"1": 1e308}, {"1": float("nan")}, {}, [],
    {"1": None}, 5,
    {str(i): -100 for i in range(3000)},
)  # fmt: skip
CUSTOM: tuple[Any, ...] = (
    {"kv_compression": "none"}, {"kv_compression": "hardkv"}, {"kv_compression": "off"}, {"kv_compression": None},
    {"kv_compression": ["none"]}, {"kv_compression": {"none": 1}}, {"kv_compression": 1},
    {"kv_compression": "x" * 100_000},
    {"kv_compression": nested(30)}, {"kv_compresion": "none"}, {"KV_COMPRESSION": "none"}, {"kv-compression": "none"},
    {"other": 1},
    {"__req__": 1}, {"thinking_budget": -1}, {"": ""}, [1], [], "x", "", 7, 0, True, False, 1.5, [["kv_compression",
    "none"]],
    {str(i): i for i in range(3000)}, {"x": nested(30)}, {"kv_compression": "none", "x": "y" * 50_000},
)  # fmt: skip
RIDS: tuple[Any, ...] = (
    "same",
    "",
    "x" * 10_000,
    "\x00",
    5,
    ["a", "b"],
    ["a", "a"],
    [],
    [None],
    None,
    {"a": 1},
    "HEALTH_CHECK_x",
)
SESSIONS: tuple[Any, ...] = (
    {"id": "nobody"}, {}, {"id": 1}, {"id": None}, {"id": "nobody", "rid": "x", "offset": -1}, {"id": "nobody",
    "offset": 10**9},
    {"unknown": 1}, [], "x", 5,
)  # fmt: skip
IMAGES: tuple[Any, ...] = (
    "x",
    "data:image/png;base64,AAAA",
    ["x"],
    [["x", "y"]],
    {"url": "x"},
    5,
    [],
    [None],
    "/etc/passwd",
)
PRIORITIES: tuple[Any, ...] = (0, 1, -1, 2**31, 2**63, -(10**30), 1.5, "high", None, True)
TEMPERATURES: tuple[Any, ...] = (0, 1, 1e-9, -1, 2, 1e308, float("nan"), float("inf"), "hot", None, True)
LOGPROB_STARTS: tuple[Any, ...] = (-1, 0, 3, 39, 40, 41, 10**6, -2, -100, 2**63, 1.5, "0", None, [0], [0, 1])
TOPS: tuple[Any, ...] = (0, 1, 5, 20, 1000, VOCABULARY, VOCABULARY + 1, -1, 2**31, 2**63, 1.5, "1", None, [1])
TOKEN_LISTS: tuple[Any, ...] = ([], [0], [1, 2, 3], [-1], [VOCABULARY], [2**40], [1.5], ["x"], [[1], [2]], [None], 5)
FLAGS: tuple[Any, ...] = (True, False, 0, 1, 2, "true", "x", None, [True], [True, False], {})

SAMPLING: Mapping[str, Sequence[Any]] = {
    "max_new_tokens": LENGTHS, "min_new_tokens": LENGTHS, "n": COUNTS, "stop": STOPS, "stop_token_ids": STOP_IDS,
    "stop_regex": REGEXES, "temperature": TEMPERATURES, "top_p": PENALTIES, "top_k": TOPS, "min_p": PENALTIES,
    "frequency_penalty": PENALTIES, "presence_penalty": PENALTIES, "repetition_penalty": PENALTIES,
    "json_schema": SCHEMAS,
    "regex": REGEXES, "ebnf": EBNFS, "structural_tag": SCHEMAS, "ignore_eos": FLAGS, "skip_special_tokens": FLAGS,
    "spaces_between_special_tokens": FLAGS, "no_stop_trim": FLAGS, "stream_interval": COUNTS, "logit_bias": BIASES,
    "sampling_seed": PRIORITIES, "custom_params": CUSTOM, "is_normalized": FLAGS, "stop_strs": STOPS, "unknown": (1,),
}  # fmt: skip
ROUTING: Mapping[str, Sequence[Any]] = {
    "rid": RIDS, "priority": PRIORITIES, "lora_path": ("x", "", ["x"], [None], "../../etc/passwd", 5),
    "extra_key": RIDS,
    "session_params": SESSIONS, "session_id": RIDS, "custom_logit_processor": ("x", "{}", '{"callable": "00"}', 5,
    ["x"]),
    "return_hidden_states": FLAGS, "return_routed_experts": FLAGS, "routed_experts_start_len": COUNTS,
    "routed_dp_rank": COUNTS, "data_parallel_rank": COUNTS, "disagg_prefill_dp_rank": COUNTS,
    "bootstrap_host": ("x", ["x"], 5), "bootstrap_port": COUNTS, "bootstrap_room": COUNTS,
    "custom_labels": ({}, {"a": "b"}, {"a": 1}, [], "x"), "stream": FLAGS, "unknown": JUNK, "images_config": ({},
    {"x": 1}, [], 5),
}  # fmt: skip
GENERATE: Mapping[str, Sequence[Any]] = {
    **ROUTING, "input_ids": PROMPTS, "text": TEXTS, "input_embeds": ([[0.5] * 576] * 3, [], [[]], [[[0.5]]], [[1]],
    "x", [["a"]]),
    "image_data": IMAGES, "video_data": IMAGES, "audio_data": IMAGES, "mm_hashes": RIDS, "modalities": (["image"], [],
    "x", [1]),
    "sampling_params": ({}, [], [{}], [{}, {}], "x", 5, None, [{"n": 2}, {"n": 3}]), "return_logprob": FLAGS,
    "logprob_start_len": LOGPROB_STARTS, "top_logprobs_num": TOPS, "token_ids_logprob": TOKEN_LISTS,
    "return_sampling_mask": FLAGS, "return_text_in_logprobs": FLAGS, "return_flat_raw_top_logprobs": FLAGS,
    "return_flat_raw_top_logprobs_b64": FLAGS, "log_metrics": FLAGS, "return_indexer_topk": FLAGS, "lora_id": RIDS,
    "positional_embed_overrides": JUNK, "bootstrap_pair_key": RIDS, "decode_tp_size": COUNTS, "routing_key": RIDS,
    "conversation_id": RIDS, "http_worker_ipc": ("ipc:///tmp/x", "x", "", 5), "background": FLAGS,
    "require_reasoning": FLAGS,
    "max_thinking_tokens": LENGTHS, "no_logs": FLAGS, "return_bytes": FLAGS, "return_entropy": FLAGS,
    "return_prompt_token_ids": FLAGS, "external_trace_header": ({}, {"x": 1}, 5), "received_time": PENALTIES,
    "need_wait_for_mm_inputs": FLAGS, "num_items_assigned": ({}, {"image": [1]}, 5), "encoder_urls": (["x"], [], 5),
    "max_dynamic_patch": COUNTS, "multi_item_delimiter_indices": ([], [0], [1, 2], [-1], [10**6], [[0]], "x"),
}  # fmt: skip
OPENAI: Mapping[str, Sequence[Any]] = {
    **ROUTING, **{name: SAMPLING[name] for name in (
        "n", "stop", "stop_token_ids", "stop_regex", "temperature", "top_p", "top_k", "min_p", "frequency_penalty",
        "presence_penalty", "repetition_penalty", "regex", "ebnf", "ignore_eos", "skip_special_tokens", "no_stop_trim",
        "logit_bias", "custom_params",
    )},
    "model": ("default", "other", "base:adapter", "", 5, None), "max_tokens": LENGTHS, "min_tokens": LENGTHS,
    "seed": PRIORITIES, "user": RIDS, "cache_salt": RIDS, "return_cached_tokens_details": FLAGS,
    "return_token_ids": FLAGS,
    "stream_options": ({"include_usage": True}, {}, {"include_usage": "x"}, [], "x", 5),
    "response_format": (
        {"type": "json_object"}, {"type": "text"}, {"type": "x"}, {}, "x", {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "nothing"}}},
        {"type": "structural_tag", "structures": [], "triggers": []},
    ),
}  # fmt: skip
COMPLETION: Mapping[str, Sequence[Any]] = {
    **OPENAI, "prompt": (*PROMPTS, *TEXTS), "logprobs": TOPS, "echo": FLAGS, "best_of": COUNTS, "suffix": TEXTS,
    "json_schema": SCHEMAS,
}  # fmt: skip
MESSAGES: tuple[Any, ...] = (
    [], [{}], [{"role": "user"}], [{"role": "nobody", "content": "a"}], [{"role": "user", "content": ""}],
    [{"role": "user", "content": None}], [{"role": "user", "content": 5}], [{"role": "user",
    "content": "ab " * 3000}], "x", None,
    [{"role": "user", "content": [{"type": "text", "text": "a"}]}], [{"role": "user",
    "content": [{"type": "image_url"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], [{"role": "assistant",
    "content": "a"}],
    [{"role": "tool", "content": "a"}], [{"role": "user", "content": [{"type": "x"}]}], [{"role": "system",
    "content": "a"}] * 200,
    [{"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}],
)  # fmt: skip
CHAT: Mapping[str, Sequence[Any]] = {
    **OPENAI, "messages": MESSAGES, "logprobs": FLAGS, "top_logprobs": TOPS, "max_completion_tokens": LENGTHS,
    "input_ids": PROMPTS,
    "tools": ([], [{}], [{"type": "function", "function": {"name": "f"}}], [{"type": "function",
    "function": {"name": 5}}], "x"),
    "tool_choice": ("auto", "required", "none", "x", {"type": "function", "function": {"name": "f"}}, {}, 5),
    "parallel_tool_calls": FLAGS, "reasoning_effort": ("low", "x", 0.5, 2, -1, None), "chat_template_kwargs": ({},
    {"x": 1}, [], 5),
    "continue_final_message": FLAGS, "separate_reasoning": FLAGS, "stream_reasoning": FLAGS,
    "return_prompt_token_ids": FLAGS,
    "return_meta_info": FLAGS, "task": ("action", "x", 5), "use_audio_in_video": FLAGS,
}  # fmt: skip
ABORT: Mapping[str, Sequence[Any]] = {
    "rid": RIDS, "abort_all": FLAGS, "finished_reason": JUNK, "abort_message": RIDS, "http_worker_ipc": RIDS,
    "unknown": JUNK,
}  # fmt: skip
PAUSE: Mapping[str, Sequence[Any]] = {
    "mode": ("abort", "retract", "in_place", "x", "", 5, None, []),
    "rid": RIDS,
    "unknown": JUNK,
}
CONTINUE: Mapping[str, Sequence[Any]] = {"torch_empty_cache": FLAGS, "rid": RIDS, "unknown": JUNK}
WEIGHTS: Mapping[str, Sequence[Any]] = {
    "model_path": (SERVED_MODEL, "nowhere", "", "/", "../..", 5, None, ["x"], "x" * 10_000, "\x00"),
    "load_format": ("auto", "dummy", "x", 5),
    "abort_all_requests": FLAGS, "weight_version": RIDS, "is_async": FLAGS, "keep_pause": FLAGS, "flush_cache": FLAGS,
    "recapture_cuda_graph": FLAGS, "token_step": LENGTHS, "manifest": ({}, {"x": 1}, [], 5), "unknown": JUNK,
}  # fmt: skip
MEMORY: Mapping[str, Sequence[Any]] = {
    "tags": (None, [], ["weights"], ["kv_cache"], ["x"], "kv_cache", 5, [1]), "rid": RIDS, "unknown": JUNK,
}  # fmt: skip
