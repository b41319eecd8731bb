"""What `setformer ckpt` does."""
