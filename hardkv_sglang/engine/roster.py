"""Running requests by their row of req_to_token, and how long they may go on: read once, when each is first seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from hardkv_sglang.engine import compat
from hardkv_sglang.engine.overrides import is_opted_out
from hardkv_sglang.engine.request import Request
from hardkv_sglang.lifecycle.planner import LifecyclePlanner
from hardkv_sglang.lifecycle.request_state import RequestState


class Roster:
    """Owned by admission, which alone writes it: when a pass first finds a request among those that run, and when that
    is released. A request that does not decode under compression yet gets its row of the planner's table here too."""

    def __init__(self, planner: LifecyclePlanner, states: Mapping[Request, RequestState]) -> None:
        self.planner = planner
        self.states = states  # by request
        self._rows: dict[Request, int] = {}
        self.last_len = np.zeros(planner.cfg.num_rows, np.int64)  # by row: tokens with KV after its last decode step
        self.is_exact = np.zeros(planner.cfg.num_rows, np.bool_)  # by row: it will get so long, whatever it generates

    def rows(self, running: Sequence[Request]) -> NDArray[np.int64]:
        """Rows of running requests, [N]."""
        try:
            return np.fromiter([self._rows[req] for req in running], np.int64, len(running))
        except KeyError:
            for req in running:
                if req not in self._rows:
                    self._add(req)
            return self.rows(running)

    def _add(self, req: Request) -> None:
        row = self._rows[req] = compat.row_of(req)
        self.last_len[row] = compat.last_len(req)
        self.is_exact[row] = req.sampling_params.ignore_eos
        if req not in self.states:
            stays_dense = is_opted_out(compat.custom_params(req))
            self.planner.expect(row, len(req.origin_input_ids), compat.committed_len(req), stays_dense)

    def forget(self, req: Request) -> None:
        """The request has been released."""
        self._rows.pop(req, None)

    def __len__(self) -> int:
        return len(self._rows)

    def clear(self) -> None:
        """No request runs."""
        self._rows.clear()
