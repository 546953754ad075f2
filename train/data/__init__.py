"""What a model is trained on: sources of token windows, the order they are read in, and the batches made of them."""
