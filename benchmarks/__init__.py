"""Benchmarks: one command each, JSON and a table out, limits measured in the same run."""
