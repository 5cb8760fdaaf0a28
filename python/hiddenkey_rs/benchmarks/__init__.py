"""Benchmarks: one harness, one file a subject. Every result is compared with a reference before it is timed."""
