"""Pages of HTML that open from a file, without a network."""
