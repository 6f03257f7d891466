"""Errors that the user can put right: wrong input, and packages that are not installed."""

from __future__ import annotations


class UserError(ValueError):
    """The input is wrong; the message is one line that says what was given, what is allowed, what to do.

    Raised where input is checked, and only there: the command line shows it without a traceback and exits with 2.
    """


class UserTypeError(UserError, TypeError):
    """The input is of a wrong type."""


class MissingPackage(ImportError):
    """An optional package cannot be imported; the message says what needs it and how to get it."""
