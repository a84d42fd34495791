"""Proof that no page is lost or owned twice."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class IntegrityError(RuntimeError):
    """A page has no owner, or two."""


def check_ownership(owners: Mapping[str, torch.Tensor], num_pages: int) -> None:
    """Check that pages `1 .. num_pages` each have exactly one owner (page 0 is padding and has none).

    owners: token pages [n] of each owner, by name. Synchronises with the device.
    Raises `IntegrityError` naming the first offending page and its owners.
    """
    count = torch.zeros(num_pages + 1, dtype=torch.int64)
    for name, pages in owners.items():
        pages = pages.cpu().long()
        if pages.numel() and not 1 <= int(pages.min()) <= int(pages.max()) <= num_pages:
            raise IntegrityError(f"{name} owns a page outside 1 .. {num_pages}: {pages.tolist()}")
        count += torch.bincount(pages, minlength=num_pages + 1)
    for page in (count[1:] != 1).nonzero().flatten().tolist():
        holders = [name for name, pages in owners.items() if (pages.cpu() == page + 1).any()]
        raise IntegrityError(f"token page {page + 1} has {int(count[page + 1])} owners: {holders or 'leaked'}")
