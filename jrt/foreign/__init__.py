"""Handles models of other projects: registers their classes, chooses rows of their caches, and replaces their saved
generation settings."""
