"""What a running server tells: counters, occupancy, Prometheus series."""
