"""Which requests share a prefix: chosen from paths in the radix tree, looked for only when the batch changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardkv_sglang.lifecycle.prefix_groups import MOST_GROUPS, Path, PrefixGroup, PrefixGrouper, group_by_prefix

SYSTEM = (1, 512)
POOL = 1 << 20


def test_requests_behind_one_node_are_a_group() -> None:
    paths = [[SYSTEM, (2, 576)], [SYSTEM], [], [(7, 512)], [SYSTEM, (3, 640)]]
    assert group_by_prefix(paths, 1, POOL) == (PrefixGroup(512, (0, 1, 4)),)


@pytest.mark.parametrize(("least", "groups"), [(1024, 1), (1025, 0)])
def test_groups_must_save_enough(least: int, groups: int) -> None:
    assert len(group_by_prefix([[SYSTEM], [SYSTEM], [SYSTEM]], least, POOL)) == groups


def test_the_sum_of_all_groups_counts() -> None:
    paths = [[(i // 2, 512)] for i in range(8)]
    assert len(group_by_prefix(paths, 4 * 512, POOL)) == 4
    assert group_by_prefix(paths, 4 * 512 + 1, POOL) == ()
    # a group that saves next to nothing only costs
    assert len(group_by_prefix([*paths, [(9, 16)], [(9, 16)]], 4 * 512, POOL)) == 4


def test_of_nested_prefixes_the_one_that_saves_most_goes_first() -> None:
    deep = [SYSTEM, (2, 4096)]
    # 3 * 4096 saved below node 2; what is left still shares the system prompt
    paths = [deep, deep, [SYSTEM], deep, [SYSTEM, (9, 544)], deep]
    assert group_by_prefix(paths, 1, POOL) == (PrefixGroup(4096, (0, 1, 3, 5)), PrefixGroup(512, (2, 4)))
    # 9 * 512 saved by all together
    assert group_by_prefix([[SYSTEM, (2, 600)]] * 2 + [[SYSTEM]] * 8, 1, POOL) == (PrefixGroup(512, tuple(range(10))),)


def test_nested_prefixes_never_need_more_slots_than_there_are() -> None:
    paths = [[SYSTEM, (2 + i // 2, 8192)] for i in range(8)]
    assert len(group_by_prefix(paths, 1, 4 * 8192)) == 4
    groups = group_by_prefix(paths, 1, 3 * 8192)
    assert sum(group.num_tokens for group in groups) <= 3 * 8192
    assert len(groups) == 3


@st.composite
def trees(draw: st.DrawFn) -> list[Path]:
    """Paths of requests in a random tree."""
    parents = [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(1, 8)))]
    lengths = [draw(st.integers(1, 50)) for _ in parents]

    def path(node: int) -> list[tuple[int, int]]:
        above = path(parents[node]) if parents[node] >= 0 else []
        return [*above, (node, (above[-1][1] if above else 0) + lengths[node])]

    leaves = draw(st.lists(st.integers(-1, len(parents) - 1), max_size=12))
    return [path(leaf) if leaf >= 0 else [] for leaf in leaves]


@given(trees(), st.integers(1, 100))
def test_groups_are_disjoint_shared_and_worth_it(paths: list[Path], least: int) -> None:
    groups = group_by_prefix(paths, least, POOL)
    members = [entry for group in groups for entry in group.members]
    assert len(members) == len(set(members))
    for group in groups:
        assert len(group.members) > 1 and MOST_GROUPS * group.saved_tokens >= least
        common = set.intersection(*(set(paths[entry]) for entry in group.members))
        assert group.num_tokens in {end for _, end in common}
    assert not groups or sum(group.saved_tokens for group in groups) >= least
    # whoever is left could not have formed a group
    if groups:
        alone = [path if entry not in members else [] for entry, path in enumerate(paths)]
        assert group_by_prefix(alone, -(-least // MOST_GROUPS), POOL) == ()


def test_paths_are_read_when_a_node_changes() -> None:
    reads = []

    def find() -> list[Path]:
        reads.append(1)
        return [[SYSTEM], [SYSTEM]]

    grouper = PrefixGrouper(100, POOL)
    # the last one is the same request, once its prefill has been inserted
    for nodes in ([1, 2], [1, 2], [1, None], [1, 3]):
        assert grouper.group(nodes, find) == (PrefixGroup(512, (0, 1)),)
    assert len(reads) == 3
    assert grouper.describe() == [{"tokens": 512, "requests": 2}]
    assert PrefixGrouper(None, POOL).group([1, 2], find) == ()
