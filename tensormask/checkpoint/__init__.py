"""Weights between files and models: read, rename, load, download."""
