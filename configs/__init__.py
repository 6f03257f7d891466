"""Hydra presets; the dataclasses and keyword arguments of the library are the truth."""
