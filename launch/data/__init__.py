"""What `setformer data` does."""
