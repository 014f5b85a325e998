"""What forwards ask of a converted model, and who answers: classes, modes, tensors of norms."""
