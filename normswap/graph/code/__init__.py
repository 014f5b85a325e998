"""What the code of a function does and asks, read from its bytecode."""
