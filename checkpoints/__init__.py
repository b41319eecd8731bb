"""Checkpoints on disk: written aside and renamed, digested, readable by any number of ranks under any ZeRO stage.

`manager.CheckpointManager` is all that the engine sees; `reader.open_checkpoint` serves everyone else. How a save
becomes a checkpoint, step by step, is the docstring of `commit`.
"""
