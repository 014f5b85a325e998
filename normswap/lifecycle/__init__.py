"""What is done with a converted model, and what it remembers of its conversion."""
