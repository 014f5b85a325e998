"""Tracing one container: a graph that stands for its forward, or why none does."""
