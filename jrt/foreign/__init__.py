"""What is done to any causal model of transformers: its caches are copied, its saved generation settings set aside."""
