"""Checkpoints on disk: written aside and renamed, hashed, readable by any number of ranks under any ZeRO stage.

`manager.CheckpointManager` is all that the engine sees; `reader.open_checkpoint` serves everyone else.
"""
