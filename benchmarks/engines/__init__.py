"""Engines that benchmarks compare, each a program that answers a `harness.Worker`."""
