"""Metrics, one file a kind: cameras, depth, points, confidence, and distances from the dense model."""
