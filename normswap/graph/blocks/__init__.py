"""Residual blocks: finding them in graphs, their channels, and layers put inside them."""
