"""Sweeps: a plan names tasks, methods and a protocol; trials are run once each, and every one leaves a line."""
