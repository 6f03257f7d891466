"""Token merging: one paper, one file."""
