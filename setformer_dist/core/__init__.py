"""What every package may use: errors, rank facts, seeding, the config base, shared value types.

Nothing here imports torch.distributed, touches a device or has an effect at import time.
"""
