"""A mixed load for a chosen time, and what must hold afterwards: `python -m bench.soak --minutes 10`."""
