"""Executors run a block list over flat rows."""
