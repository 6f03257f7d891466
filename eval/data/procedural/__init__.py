"""Procedural scenes: what stands in a world, where the cameras go, and the ray caster that looks at it."""
