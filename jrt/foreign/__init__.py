"""Handles models of other projects: chooses rows of their caches, and replaces their saved generation settings."""
