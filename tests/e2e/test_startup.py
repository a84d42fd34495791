"""Options that cannot work stop the server before anything is loaded, with a message that names the remedy."""

from __future__ import annotations

from typing import Any

import pytest
from e2e.compressed import STOCK
from e2e.server import ServerPool


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"kv-compression-config": '{"top_p": 1.5}'}, r"top_p=1.5 is out of range: 0.01 .. 1"),
        ({"page-size": 1}, "--page-size"),
        ({"enable-mixed-chunk": True}, "--enable-mixed-chunk"),
    ],
)
def test_refusal(server_pool: ServerPool, flags: dict[str, Any], message: str) -> None:
    server = server_pool.launch({**STOCK, "kv-compression": "hardkv", **flags}, {})
    assert server.wait_exit() != 0
    assert message in server.log_text()
    server.stop()
