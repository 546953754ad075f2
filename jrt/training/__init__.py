"""What a training step computes besides the model: the objective, its loss, and the operations that a token costs."""
