"""What this machine can do, and what can be built on it."""
