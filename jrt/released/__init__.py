"""The original release of the paper's code: its configurations, and where it computes something else than the paper
says."""
