"""What a compressing server holds and did, as its HTTP endpoints tell it at one moment."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import requests

TIMEOUT_S = 30.0
RETRACTED = re.compile(r"^sglang:num_retracted_requests_total(?:\{.*\})? (\S+)", re.MULTILINE)


class SnapshotError(Exception):
    """The server cannot be asked, or does not compress; the message says why and what to do."""


@dataclass(frozen=True)
class Snapshot:
    """Sums over the server's data-parallel replicas; counters are since its start."""

    running_requests: int
    waiting_requests: int
    tokens_per_second: float  # generated, at SGLang's last log line
    pool_tokens: int
    used_tokens: int  # of the pool, without what is only cached
    output_pages: int  # token pages that the output of running requests holds
    dense_output_pages: int  # that it would hold uncompressed
    kept_ratio: float  # of the two; 1 while there is no output
    kept_fraction: float  # share of the scored tokens that select events kept
    select_events: int
    condense_events: int
    early_events: int
    postponed_events: int  # attempts
    freed_pages: int
    allocated_pages: int
    retractions_avoided: int  # decode steps
    retracted_requests: int | None  # None: the server runs without --enable-metrics

    @classmethod
    def of(cls, loads: Iterable[Mapping[str, Any]], states: Iterable[Mapping[str, Any]], metrics: str) -> Snapshot:
        """From `/v1/loads`, the `hardkv` blocks of `/server_info`, and the text of `/metrics` (empty: none)."""
        loads, states = list(loads), list(states)

        def total(key: str) -> int:
            return sum(int(state[key]) for state in states)

        held, dense = (sum(s["running"][k] for s in states) for k in ("output_pages", "dense_output_pages"))
        scored = sum(s["candidate_tokens"] for s in states)
        retracted = [float(value) for value in RETRACTED.findall(metrics)]
        return cls(
            running_requests=sum(load["num_running_reqs"] for load in loads),
            waiting_requests=sum(load["num_waiting_reqs"] for load in loads),
            tokens_per_second=sum(load["gen_throughput"] for load in loads),
            pool_tokens=sum(load["max_total_num_tokens"] for load in loads),
            used_tokens=sum(load["num_used_tokens"] for load in loads),
            output_pages=held,
            dense_output_pages=dense,
            kept_ratio=held / dense if dense else 1.0,
            kept_fraction=sum(s["kept_tokens"] for s in states) / scored if scored else 1.0,
            select_events=total("select_events"),
            condense_events=total("condense_events"),
            early_events=total("early_events"),
            postponed_events=total("postponed_events"),
            freed_pages=total("freed_pages"),
            allocated_pages=total("allocated_pages"),
            retractions_avoided=total("retractions_avoided"),
            # a series appears with its first increment
            retracted_requests=int(sum(retracted)) if metrics else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable fields."""
        return asdict(self)


class ServerView:
    """Reads snapshots of one server."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def read(self) -> Snapshot:
        """Ask the server now. Raises `SnapshotError`."""
        replicas = self._list("/server_info", "internal_states")
        states = [replica["hardkv"] for replica in replicas if "hardkv" in replica]
        if not states or len(states) < len(replicas):
            raise SnapshotError(f"{self.url} runs without KV compression; start it with --kv-compression hardkv")
        metrics = self._get("/metrics")
        return Snapshot.of(self._list("/v1/loads", "loads"), states, metrics.text if metrics.ok else "")

    def _list(self, path: str, key: str) -> list[dict[str, Any]]:
        reply = self._get(path)
        if reply.status_code in (401, 403):
            raise SnapshotError(f"{self.url}{path} asks for a key; pass the server's --api-key")
        try:
            reply.raise_for_status()
            found: list[dict[str, Any]] = reply.json()[key]
        except (requests.RequestException, KeyError, TypeError) as error:
            raise SnapshotError(f"{self.url} is no SGLang server: {path}: {error}; check --url") from error
        return found

    def _get(self, path: str) -> requests.Response:
        try:
            return requests.get(self.url + path, headers=self._headers, timeout=TIMEOUT_S)
        except requests.Timeout as error:
            raise SnapshotError(f"{self.url}{path} did not answer within {TIMEOUT_S:.0f} s") from error
        except requests.RequestException as error:
            reason = str(error.__cause__ or error)
            raise SnapshotError(f"{self.url} cannot be reached ({reason}); check --url and the server") from error
