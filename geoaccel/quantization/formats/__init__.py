"""Number formats of weights: one file per format, and the reference arithmetic that each is tested against."""
