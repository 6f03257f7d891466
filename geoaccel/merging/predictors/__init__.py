"""Confidence predictors of the checkpoints in this package, one file each."""
