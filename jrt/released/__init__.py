"""The original release: its configurations, and what it computes otherwise than the paper says."""
