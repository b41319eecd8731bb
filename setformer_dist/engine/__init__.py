"""The training engine: one loop over optimizer steps, DeepSpeed underneath, with checkpoints and metrics.

    config.py     the tables of a run config that the engine reads, without torch
    trainer.py    the loop: knows steps, schedule, evaluation, checkpoints, signals
    components.py what a trainer works with, as the composition root makes it
    run_state.py  what changes while a run is under way, and what trainer.json holds of it
    step_log.py   the steps since the last line of metrics: losses reduced, judged, written
    evaluation.py evaluations during training: when, of which weights, who hears of them
    stop_vote.py  how all ranks come to stop at the same step
    protocol.py   what this package uses of DeepSpeed's engine, as a type
    step.py       one optimizer step: forward, backward, update
    compiled.py   torch.compile of a model's blocks, or of the whole, in place
    zero.py       typed config -> DeepSpeed's JSON
    master.py     every ZeRO stage seen as fragments of fp32 masters and optimizer states
    optim.py      parameter groups, optimizers, learning-rate schedules
    lamb.py       LAMB, whose norms are sums over the ranks that hold parts of a parameter
    ema.py        an average of the weights as one more fragment state
    evaluate.py   one pass over a split, each sample once
    metrics.py    the clock of a step, metrics.jsonl
    events.py     calls the callbacks on a run's events, and handles an exception in one
    comm.py       torch.distributed behind the Collectives protocol, and what it costs
    signals.py    SIGTERM and Ctrl-C as a wish to stop at the next step
    averaged.py           a part of the model with the averaged weights, whole on every rank
    batch_plan.py         global batch = micro batch × accumulation × groups: the one equation, solved in this one place
    cuda_graphs.py        what must not lie in the memory of CUDA graphs, and what the log says of them
    deepspeed_engine.py   the one call of `deepspeed.initialize`
    fused_update.py       what DeepSpeed does for each parameter in an update, for all at once: checks, norm, copies
    reduction.py          ZeRO-0 to 2: means of gradients over the ranks, a bucket of them at once
    gathering.py          ZeRO-3: the small weights that stay whole, gathered at once after an update
    refitter.py           who computes new sets: the ranks, or somebody else meanwhile
    refresh.py            reference sets set by K-means: what is sampled when, and where the new sets go
    guard.py              losses that are not finite, and loss spikes: what is done about the step
    offload.py            CPU offload and ZeRO-3: no step sees a gradient of an earlier one
    probe.py              how much frozen features know of classes
    progress.py           what rank 0 shows while a run is under way: a bar on a terminal, a line now and then elsewhere

Few know DeepSpeed: deepspeed_engine.py makes the engine and zero.py its JSON, master.py and offload.py know how it lays
out memory, reduction.py where it wants gradients, gathering.py which weights it keeps whole, fused_update.py what an
update does, comm.py which of its collectives are measured. All others see protocol.py.
"""
