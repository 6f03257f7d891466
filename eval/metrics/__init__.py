"""Metrics, one file per kind: cameras, depth, points, confidence, and distances from the dense model."""
