"""Random faults in a real training, and whether anything was lost."""
