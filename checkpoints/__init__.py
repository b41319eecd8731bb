"""Checkpoints on disk: written aside and renamed, digested, readable by any number of ranks under any ZeRO stage.

`manager.CheckpointManager` is all that the engine sees; `reader.open_checkpoint` serves everyone else. How a save
becomes a checkpoint, step by step, is the docstring of `commit`.

    beside.py            hosts with a disk each: what else lies in a run's folder, which every host follows
    config.py            when a checkpoint is due, how it is written, and which ones stay
    deepspeed_files.py   DeepSpeed's own checkpoints: read, and written for its tools
    digest.py            digests of files: which algorithm, and how bytes on disk are held against what was written
    errors.py            damage, which another checkpoint can make good, and storage that fails
    identity.py          what a checkpoint belongs to: enough to refuse another model and to say what differs
    layout.py            names of everything a run keeps under its `checkpoints` folder, and nothing else
    manifest.py          what a checkpoint consists of, with sizes and digests, protected by a hash of its own
    policy.py            which checkpoints stay: a pure function, tested without a disk
    rankfile.py          fragments in the safetensors format, written and read by our own few lines
    spread.py            hosts with a disk each: how a save proceeds; its docstring is the protocol
    spread_manager.py    hosts with a disk each: `manager.CheckpointManager` for them
    strictjson.py        `core.strictjson` for checkpoints: what it refuses is damage
    copies.py            copies in an object store: listed, read, verified
    fetch.py             a copy becomes a checkpoint of the run's own folder again
    mirror.py            how copies are made behind training; its docstring is the protocol
    objects.py           every operation on an object store, in one place, where tests make each of them fail
    together.py          work of several ranks that ends with every rank knowing whether every other one succeeded
    verdicts.py          what rank 0 finds out about a folder that may hold a checkpoint
    commit.py            the commit protocol: how the files of all ranks become one checkpoint, or nothing
    disk.py              every operation on the disk, in one place, where tests make each of them fail
    manager.py           the only class of this package that the engine sees: save, find the newest that verifies, load
    reader.py            any ranges of any parameter, from whichever rank files hold them
"""
