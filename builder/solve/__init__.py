"""Runs the graph: cache keys, cache, scheduler, steps."""
