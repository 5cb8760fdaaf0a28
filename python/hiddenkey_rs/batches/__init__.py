"""Batches on NumPy arrays: the order of an epoch, the schedule of its steps, packing and padding. NumPy only, no torch."""
