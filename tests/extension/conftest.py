"""The package that is installed here brings its own test, which runs where it is installed."""

collect_ignore = ["geoaccel-strided"]
