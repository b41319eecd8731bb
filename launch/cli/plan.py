"""`setformer plan`: what a run config would need on devices that are not here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli.options import ConfigPath, Overrides
from launch.run.config import load_run, shipped
from setformer_dist.core.terminal import open_console


def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[str, typer.Option(help="Numbers of devices, separated by commas.")] = "8,64,512",
    gpu: Annotated[str, typer.Option(help="Which device: h100, a100, v100 or cpu.")] = "h100",
    nodes_of: Annotated[int, typer.Option(help="Devices of a node.", min=1)] = 8,
    batch_per_gpu: Annotated[
        int | None,
        typer.Option(
            help="Samples of a step for each device, instead of batch.global_size.", min=1, show_default=False
        ),
    ] = None,
    storage: Annotated[float, typer.Option(help="GB/s that checkpoints are written with.", min=0.001)] = 2.0,
    mtbf: Annotated[float, typer.Option(help="Hours between failures of one device.", min=1.0)] = 50_000.0,
    restart: Annotated[float, typer.Option(help="Seconds from a failure to the next step.", min=0.0)] = 180.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the plan to this file as well.")] = None,
) -> None:
    """Print memory, traffic, time of a step and goodput of a run config on machines that are not here.

    For each number of devices and each ZeRO stage: memory of a rank, the largest micro batch, bytes sent, time and
    efficiency; then the stage to take, and how often to save. What is measured and what is assumed: docs/scaling.md.

    Examples:

        setformer plan demo --gpus 1,2,4 --gpu cpu

        setformer plan imagenet_base --gpus 8,64,512 --batch-per-gpu 128 --json plan.json
    """
    from launch.plan import plan as plans
    from launch.plan.hardware import DEVICES, GB
    from launch.plan.rows import Cluster

    counts = plans.counts_of(gpus)
    device = DEVICES[plans.device_named(gpu)]
    run = load_run(shipped(config), overrides or [])
    cluster = Cluster(device, nodes_of, storage * GB, mtbf, restart)
    plans.plan(run, counts, cluster, batch_per_gpu, json_file, open_console())
