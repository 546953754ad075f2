"""What a training step computes besides the model: `objective` makes labels, `loss` the loss, `flops` counts
operations."""
