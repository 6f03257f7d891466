"""Number formats of weights: one file a format, and the reference arithmetic that each is tested against."""
