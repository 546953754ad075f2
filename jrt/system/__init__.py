"""Helpers for the machine and for other projects' code: writing files, catching errors, recording versions, free
cores."""
