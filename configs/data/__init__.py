"""Presets of data sets."""
