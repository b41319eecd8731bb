"""The training engine: one loop over optimizer steps, DeepSpeed underneath, checkpoints and metrics beside it.

    config.py     the tables of a run config that the engine reads, without torch
    trainer.py    the loop: knows steps, schedule, evaluation, checkpoints, signals
    step.py       one optimizer step: forward, backward, update
    zero.py       typed config -> DeepSpeed's JSON
    master.py     every ZeRO stage seen as fragments of fp32 masters and optimizer states
    optim.py      parameter groups, optimizers, learning-rate schedules
    ema.py        an average of the weights as one more fragment state
    evaluate.py   one pass over a split, each sample once
    metrics.py    the clock of a step, metrics.jsonl, TensorBoard
    comm.py       torch.distributed behind the Collectives protocol, and what it costs
    signals.py    SIGTERM and Ctrl-C as a wish to stop at the next step
    batch_plan.py         global batch = micro batch × accumulation × ranks: the one equation, solved in this one place
    deepspeed_engine.py   the one call of `deepspeed.initialize`
    guard.py              losses that are not finite, and loss spikes: what is done about the step
    offload.py            CPU offload: no step sees a gradient of an earlier one
    progress.py           what rank 0 shows while a run goes on: a bar on a terminal, a line now and then elsewhere

Only zero.py, master.py and comm.py know DeepSpeed's insides.
"""
