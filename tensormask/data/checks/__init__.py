"""Checks of the entries of a data set, and the log that counts their issues."""
