"""Programs put together at random, converted, and compared with the original; see `__main__`."""
