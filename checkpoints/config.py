"""When a checkpoint is due, how it is written, and which ones stay."""

from __future__ import annotations

import re
from typing import Literal

import pydantic
from pydantic import Field

from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.metric import mode_by_name


class CheckpointConfig(FrozenConfig):
    """The `[checkpoint]` table of a run config.

    Attributes:
        every_steps: optimizer steps between two checkpoints.
        keep_last: number of newest checkpoints to keep.
        keep_every: also keep checkpoints whose step is a multiple of this; 0 turns this off.
        keep_best: number of best checkpoints to keep besides the newest; 0 turns this off.
        best_metric: name of the evaluation metric that ranks checkpoints and decides which weights are better; the
            prefix "ema_" selects the averaged weights. The default is the first metric of the task.
        best_mode: whether the largest ("max") or the smallest ("min") value is best; the default comes from the task.
        asynchronous: a save stops training only while the state is copied to host memory; threads write it.
        max_in_flight: maximum number of copies that wait to be written; a further save waits.
        on_disk_full: "stop" ends the run with an error if the disk has no room for a checkpoint; "continue" prints a
            warning and keeps the previous checkpoint. The last checkpoint of a run is always required.
        write_timeout_minutes: how long rank 0 waits for the other ranks' files before it gives up on a checkpoint.
        mirror: URL of a folder in an object store (s3://bucket/runs, or any other URL that fsspec supports). Each
            checkpoint is copied there in the background, into a folder with the name of the run. "" copies nothing. A
            run whose folder has no checkpoint resumes from the newest copy. The client of the store finds the
            credentials.
        mirror_minutes: time limit of one copy, including retries; also how long the end of a run waits for the last
            copy.
        replicas: 0 if the run folder is on storage that all hosts share. Otherwise each host has its own disk under the
            same path, and each file of a checkpoint is also written to this many other hosts. If the disks of as many
            hosts are lost, nothing is lost.
        allow_changes: what may change when a run resumes although it changes the results. "global_batch" continues at
            the sample where the run stopped; a step of the new size must start there. No sample is lost or repeated,
            but later steps contain other samples than before, and schedules use the new step number. Refused with
            data.mixture, data.aspect_buckets and epoch_end = "wrap". "data" continues at the same position of the same
            epoch with other data. "schedule" continues at the same step with another schedule (all of
            its keys) or another optim.lr, for example for more epochs. The model can never change.
    """

    every_steps: int = Field(default=1000, ge=1)
    keep_last: int = Field(default=3, ge=1)
    keep_every: int = Field(default=0, ge=0)
    keep_best: int = Field(default=1, ge=0)
    best_metric: str = "top1"
    best_mode: Literal["max", "min"] = "max"
    asynchronous: bool = True
    max_in_flight: int = Field(default=1, ge=1)
    on_disk_full: Literal["stop", "continue"] = "stop"
    write_timeout_minutes: float = Field(default=10.0, gt=0)
    mirror: str = ""
    mirror_minutes: float = Field(default=30.0, gt=0)
    replicas: int = Field(default=0, ge=0)
    allow_changes: tuple[Literal["global_batch", "data", "schedule"], ...] = Field(default=(), strict=False)

    @pydantic.field_validator("mirror")
    @classmethod
    def _folder_url(cls, value: str) -> str:
        if value:
            check_url(value)
        return value

    @pydantic.model_validator(mode="before")
    @classmethod
    def _mode_by_name(cls, table: object) -> object:
        """Fill in which way is better where neither the config nor its task says so."""
        if not isinstance(table, dict) or "best_mode" in table:
            return table
        return {**table, "best_mode": mode_by_name(str(table.get("best_metric", "")))}

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` optimizer steps."""
        return step > 0 and step % self.every_steps == 0


_URL = re.compile(r"([a-z][a-z0-9+.-]*)://[^?#\s]*[^?#\s/]/*")


_BUCKETS = ("s3", "s3a", "gs", "gcs")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}|arn:[a-z0-9-]+:s3[A-Za-z0-9:-]*")


def check_url(value: str) -> None:
    """Check that a text is the URL of a folder to which objects can be written.

    Raises:
        ValueError: it is not.
    """
    match = _URL.fullmatch(value)
    if match is None or "::" in value:
        raise ValueError("must be the URL of a folder, such as s3://bucket/runs")
    if match[1] in ("http", "https"):
        raise ValueError("is an http address, which takes no files: name a store such as s3://bucket/runs")
    bucket = value.partition("://")[2].partition("/")[0]
    if match[1] in _BUCKETS and not _BUCKET.fullmatch(bucket):
        raise ValueError(
            "names no bucket, or has credentials in it: give s3://bucket/runs, and the credentials to the store's "
            "client (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
        )
