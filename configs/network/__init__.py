"""Presets of networks that are trained here."""
