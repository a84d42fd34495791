"""HTTP client of a server under soak: every answer is complete, or an exception says what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import requests

ANSWER_TIMEOUT_S = 600.0
"""Between two pieces of an answer; a request that takes longer counts as lost."""


class SoakError(Exception):
    """An answer that no client should get, or none.

    status: of the answer, where it is the status that is wrong.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class AbortedError(SoakError):
    """The server says that the request was aborted: with status 499, or 400 on the OpenAI endpoints."""


def refusal(path: str, status: int, text: str) -> SoakError:
    """The exception for an answer that is an error."""
    kind = AbortedError if re.search(r"Request \w+ was aborted", text) else SoakError
    return kind(f"{path} {status}: {text[:500]}", status)


class Client:
    """Requests to one server, each on a connection of its own: a server may close one that it keeps at any time."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.sent: tuple[str, Any] | None = None  # path and parameters of the last request

    def get(self, path: str) -> requests.Response:
        """Reply to a GET. Raises `SoakError` for any status but 200."""
        reply = self._request("GET", path)
        if reply.status_code != 200:
            raise refusal(path, reply.status_code, reply.text)
        return reply

    def post(self, path: str, body: dict[str, Any] | None = None, **options: Any) -> requests.Response:
        """Reply to a POST, whatever its status. Raises `SoakError` if there is none."""
        return self._request("POST", path, json=body or {}, **options)

    def ask(self, path: str, body: dict[str, Any]) -> Any:
        """Parsed reply to a well-formed request. Raises `SoakError` for any status but 200."""
        reply = self.post(path, body)
        if reply.status_code != 200:
            raise refusal(path, reply.status_code, reply.text)
        return reply.json()

    @contextmanager
    def stream(self, path: str, body: dict[str, Any]) -> Iterator[Iterator[Any]]:
        """Pieces of a streamed answer; leaving the block early disconnects."""
        with self.post(path, {**body, "stream": True}, stream=True) as reply:
            if reply.status_code != 200:
                raise refusal(path, reply.status_code, reply.text)
            yield self._pieces(path, reply)

    def _pieces(self, path: str, reply: requests.Response) -> Iterator[Any]:
        try:
            for line in reply.iter_lines():
                data = line.decode().removeprefix("data: ")
                if data == "[DONE]":
                    return
                if data:
                    piece = json.loads(data)
                    if "error" in piece:
                        raise refusal(path, reply.status_code, data)
                    yield piece
        except requests.RequestException as error:
            raise SoakError(f"{path}: the stream breaks off: {error}") from error
        raise SoakError(f"{path}: the stream ends without [DONE]")

    def abort(self, rid: str = "", *, everything: bool = False) -> None:
        """Abort one request, or all."""
        self.post("/abort_request", {"rid": rid, "abort_all": everything})

    def _request(self, method: str, path: str, **options: Any) -> requests.Response:
        self.sent = path, options.get("json")
        try:
            return requests.request(method, self.url + path, timeout=ANSWER_TIMEOUT_S, **options)
        except requests.RequestException as error:
            raise SoakError(f"{method} {path}: no answer: {error}") from error
