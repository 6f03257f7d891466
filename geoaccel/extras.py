"""Packages that only some commands need."""

from __future__ import annotations


class MissingPackage(ImportError):
    """An optional package cannot be imported; the message says what needs it and how to get it."""
