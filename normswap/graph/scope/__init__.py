"""Labels on their way to norms that are passed none: what a forward received, and who finds it."""
