"""Stop tokens, stop strings and stop regexes that begin before an event and are met after it.

A grammar dictates the answers, a token for each character, so that they are known whatever is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from e2e.compressed import FIRST_EVENT, PAGE, STRICT, TINY, hardkv_state, prompt_ids, two_layers

from hardkv_sglang.cli.server_process import ServerProcess as Server

pytestmark = two_layers
NUM_TOKENS = 165
# the demo model's tokenizer has a token for each digit and none for two of them
DIGITS = "".join(str(i * i * i % 997) for i in range(1, 70))
LETTER, LETTER_TOKEN = "x", 104
PROMPT = prompt_ids(PAGE - 1, seed=830)
PREFIX_END = 1  # the prompt's page has place for one output token
FIRST_CONDENSE = FIRST_EVENT + PAGE
REACH = 4  # tokens from the begin of a stop string to its end
# lengths of an output around the first select event, around the time of the first condense event, which this text puts
# off until it frees a page, and after that; not 101 to 104: with 100 tokens SGLang hands text on, which it cannot take
# back when a stop string ends after it
PLACES = [PREFIX_END + FIRST_EVENT + i for i in (0, 2, 4)] + [PREFIX_END + FIRST_CONDENSE + i for i in (2, 13, 62)]
AT_A_TIME = 9  # of these the pool holds all, so that none is retracted


@dataclass(frozen=True)
class Case:
    """An answer with one letter in it, where it is to stop."""

    answer: str
    place: int  # the letter is the output token of that number
    condition: dict[str, Any]
    matched: int | str
    text: str  # what the client gets


def cases_at(place: int) -> list[Case]:
    """Each kind of condition. SGLang takes stop tokens and strings off the text, but not what matches a regex."""
    answer = DIGITS[: place - 1] + LETTER + DIGITS[place:NUM_TOKENS]
    begin = place - 1 - REACH
    string, regex = answer[begin:place], f"{answer[begin]}[0-9]{{{REACH - 1}}}{LETTER}"
    return [
        Case(answer, place, {"stop_token_ids": [LETTER_TOKEN]}, LETTER_TOKEN, answer[: place - 1]),
        Case(answer, place, {"stop": [string]}, string, answer[:begin]),
        Case(answer, place, {"stop_regex": [regex]}, regex, answer[:place]),
    ]


def ask(server: Server, case: Case) -> Any:
    sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "regex": case.answer, **case.condition}
    return server.generate(input_ids=PROMPT, sampling_params=sampling, return_logprob=True)


def test_stop_conditions_on_both_sides_of_an_event(server_for: Callable[..., Server]) -> None:
    server = server_for(TINY, STRICT)
    cases, before = [case for place in PLACES for case in cases_at(place)], hardkv_state(server)
    with ThreadPoolExecutor(AT_A_TIME) as executor:
        replies = list(executor.map(lambda case: ask(server, case), cases))
    for case, reply in zip(cases, replies, strict=True):
        assert (reply["text"], len(reply["output_ids"])) == (case.text, case.place)
        assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": case.matched}
        assert len(reply["meta_info"]["output_token_logprobs"]) == case.place
    after = hardkv_state(server)
    assert after["select_events"] - before["select_events"] > len(cases) / 2
    assert after["condense_events"] > before["condense_events"]
    server.check_idle()


def test_a_grammar_ends_where_it_must(server_for: Callable[..., Server]) -> None:
    """Nobody stops these answers: the grammar has no more to say."""
    server, before = server_for(TINY, STRICT), hardkv_state(server_for(TINY, STRICT))
    answers = [DIGITS[:place] for place in PLACES]
    with ThreadPoolExecutor(len(answers)) as executor:
        replies = list(executor.map(lambda answer: ask(server, Case(answer, len(answer), {}, 0, answer)), answers))
    for answer, reply in zip(answers, replies, strict=True):
        assert reply["text"] == answer
        assert reply["meta_info"]["finish_reason"]["type"] == "stop"
    assert hardkv_state(server)["condense_events"] > before["condense_events"]
    server.check_idle()
