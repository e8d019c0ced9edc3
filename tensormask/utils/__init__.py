"""Files, random states and the environment: helpers that know nothing of the method."""
