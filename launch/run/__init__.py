"""One run: its config, its parts, what begins, continues and ends it, and its trained weights."""
