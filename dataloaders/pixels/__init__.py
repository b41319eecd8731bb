"""From bytes to augmented pixels, keyed by (seed, epoch, sample)."""
