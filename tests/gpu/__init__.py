"""Tests and times for one GPU: `python -m tests.gpu`."""
