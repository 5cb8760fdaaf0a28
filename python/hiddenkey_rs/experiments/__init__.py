"""Runs on real tasks: data, models, metrics, training runs and their pictures."""
