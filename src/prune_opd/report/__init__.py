"""Runs as a page that people can look at, and as a model card."""
