"""The report of runs: what their folders hold, as figures, tables and images of one page."""
