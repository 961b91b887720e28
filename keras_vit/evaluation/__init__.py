"""What a model is worth: scores and names of classes, accuracy."""
