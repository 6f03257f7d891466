"""Datasets: one file each, and the procedural scenes."""
