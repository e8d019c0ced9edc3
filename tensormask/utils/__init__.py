"""Files, random states, the environment and the error for users: no knowledge of the method."""
