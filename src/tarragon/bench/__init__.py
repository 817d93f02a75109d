"""Benchmarks: one file a question, and the baselines they are compared with."""
