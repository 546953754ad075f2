"""Set disjointness: the synthetic task behind the paper's theory (section 3, appendix B.1)."""
