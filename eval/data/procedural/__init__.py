"""Procedural scenes: the contents of a world, the camera paths, and the ray caster that renders it."""
