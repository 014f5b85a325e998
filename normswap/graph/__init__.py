"""Threading the context through a model's forward, with torch.fx."""
