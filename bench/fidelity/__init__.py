"""What compression costs in fidelity and saves in bytes: `python -m bench.fidelity` from the repository root."""
