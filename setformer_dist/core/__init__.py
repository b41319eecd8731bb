"""What every package may use: errors, rank facts, seeding, the config base, shared value types.

Nothing here imports torch.distributed, touches a device or has an effect at import time.

    batch.py           the value that the loaders hand to the engine, and the protocols by which the two meet
    bounded.py         calls into clients that may hang, with a limit
    boxes.py           anchors, the loss of a detector, and the detections that it means
    callback.py        events of a training run, and the base class of what hears them
    comm.py            the few collective operations that packages outside the engine need, as a protocol
    config.py          from a TOML file to a frozen, checked value
    continuing.py      which keys of a config may change in a continuation
    errors.py          our exceptions, with their exit codes
    exits.py           how a rank's process ends
    files.py           small files that are either whole or as they were before
    fragments.py       a fragment: this rank's piece of one state of one parameter
    heartbeat.py       what a rank does and since when, for its supervisor to see
    ledger.py          where the wall time of a run went, over all its attempts: the goodput ledger
    lean.py            keeps out of memory what DeepSpeed imports and nobody asked for
    live.py            what the ranks of a run are doing right now, for `setformer runs top`
    logging_config.py  the `[logging]` table of a run config
    masking.py         which units of an image masked autoencoding hides
    metric.py          what evaluations report: names, directions, and which weights are better
    model_config.py    the `[model]` table of a run config; imports no torch and no timm, so typos are reported at once
    phases.py          what a rank does at an instant, as clock, heartbeat, ledger and report name it
    pixel_maps.py      maps at another size, and the loss of their pixels, repeatable on any device
    ranks.py           rank, world size and their local counterparts: one frozen value
    registry.py        names that a user's own code registers: tasks, callbacks, augmentations
    revisions.py       what a config of an older version means
    secrets.py         texts without secrets: of URLs user, password and query; values that a name gives away
    seeding.py         seeds by purpose: what is drawn, and from what
    shared_memory.py   memory that is full, shared or not: how the system and torch say so, and how we do
    splitmix.py        SplitMix64: words that look random, the same on any machine
    stopping.py        signals that ask a run to stop, and their exit codes
    store.py           checkpoints as the engine sees them; `checkpoints` implements them, the engine never imports it
    strictjson.py      JSON of others: no key twice, nothing that exhausts or misleads the reader
    task.py            what a run learns, as an interface
    task_config.py     the `[task]` table of a run config
    terminal.py        consoles and tables; terminals and pipes that go away
    text_ids.py        token ids of texts, and which tokens masked language modelling hides
    transfer.py        tensors of a micro batch on their way to the device
    words.py           numbers with their nouns, texts without control characters
"""
