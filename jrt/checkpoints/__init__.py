"""Checkpoints, ours and others': read safely, matched by tables of names, loaded, converted and written."""
