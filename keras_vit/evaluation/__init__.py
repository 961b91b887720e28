"""What a model is worth: scores and names of classes, accuracy and its certainty, few-shot learning on its features."""
