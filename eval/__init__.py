"""Evaluation: datasets, protocols and metrics."""

if not __name__.startswith("geoaccel."):
    raise ImportError(f"this folder installs as geoaccel.eval; {__name__!r} would load a second copy: pip install -e .")
