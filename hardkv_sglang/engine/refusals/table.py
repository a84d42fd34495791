"""The refusals as a Markdown table, for docs/refusals.md."""

from __future__ import annotations

from hardkv_sglang.engine.refusals.models import MODEL_REFUSALS
from hardkv_sglang.engine.refusals.server_flags import SERVER_REFUSALS
from hardkv_sglang.generated import write_or_print


def refusals_table() -> str:
    """What is refused, flags first, with the message that a start prints."""
    lines = ["| refused | message |", "|---|---|"]
    for row in SERVER_REFUSALS:
        lines.append(f"| {'variable' if row.name.isupper() else 'flag'} | {row.message} |")
    lines += [f"| model: {row.name.replace('_', ' ')} | {row.message} |" for row in MODEL_REFUSALS]
    return "\n".join(lines)


if __name__ == "__main__":
    write_or_print("refusals", refusals_table())
