"""Benchmarks: same-run ratios against a floor or a peer, never timed tests."""
