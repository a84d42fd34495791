"""Device operations: one file per op. `reference.py` is the specification of all of them.

Sizes, everywhere: L layers, R rows, H KV heads, HQ query heads, G = HQ / H, D head dim, W observation queries,
B requests of a batch, N tokens of a list, S slots. Base-2 log-sum-exp values are named `lse2`.
"""

EMPTY_LSE2 = -1.0e30
"""`lse2` of an empty list: finite, so that merging two empty states yields zeros instead of NaN."""
