"""What a reader process does: one request in, the pixels of one micro batch out.

A request names samples and positions; the answer depends on it, the data and the config alone, so it does not
matter which process answers. Errors that a user can repair travel back as values, and are raised by the stream
with their own sentence rather than with a reader's traceback.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from dataloaders.config import DataConfig
from dataloaders.damage import candidates
from dataloaders.decode import UndecodableError
from dataloaders.mixing import MixArrays, draw_mix
from dataloaders.source import DamagedSampleError, Source
from dataloaders.transforms import TrainTransform, decode_for_eval, kept_random_state
from setformer_dist.core.errors import DataError, SetformerError
from setformer_dist.core.seeding import Purpose, torch_seed


@dataclass(frozen=True)
class Request:
    """Samples of one micro batch.

    Attributes:
        samples: (k,) int64, k <= m in evaluation, k = m in training.
        epoch: of the training order.
        first_position: of `samples[0]` in that order.
        step: optimizer step since the start of the run.
    """

    samples: npt.NDArray[np.int64]
    epoch: int = 0
    first_position: int = 0
    step: int = -1


@dataclass(frozen=True)
class Loaded:
    """The answer to a request.

    Attributes:
        request: what was asked.
        images: (m, 3, S, S) uint8.
        samples: (m,) int64, what was really delivered; -1 is filling.
        bad: (place in the micro batch, line) of each damaged sample, places rising.
        mix: what `draw_mix` drew.
        error: what stops the run, in place of pixels.
    """

    request: Request
    images: torch.Tensor
    samples: npt.NDArray[np.int64]
    bad: list[tuple[int, str]] = field(default_factory=list)
    mix: MixArrays | None = None
    error: SetformerError | None = None


def failed(request: Request, error: SetformerError) -> Loaded:
    """Return the answer that raises an error where it arrives."""
    return Loaded(request, torch.empty(0), request.samples, error=error)


class TrainLoading:
    """Answers training requests: reads, decodes, augments, replaces what is damaged."""

    def __init__(self, dataset: Source, config: DataConfig, seed: int) -> None:
        self.dataset = dataset
        self._config = config
        self._seed = seed
        self._transform = TrainTransform(config, *dataset.extent(), dataset.name)

    def __getitem__(self, request: Request) -> Loaded:
        size, count = self._config.image_size, len(request.samples)
        images = torch.empty((count, 3, size, size), dtype=torch.uint8)
        delivered = request.samples.copy()
        bad: list[tuple[int, str]] = []
        try:
            with kept_random_state():
                for place, sample in enumerate(request.samples.tolist()):
                    image, delivered[place], line = self._sample(sample, request.epoch)
                    images[place] = image
                    if line:
                        bad.append((place, line))
        except SetformerError as error:
            return failed(request, error)
        mix = draw_mix(self._config.augment, size, self._seed, request.epoch, request.first_position, count)
        return Loaded(request, images, delivered, bad, mix)

    def _sample(self, sample: int, epoch: int) -> tuple[torch.Tensor, int, str]:
        """Return (pixels, the sample they are of, what was damaged or "")."""
        try:
            return self._pixels(sample, epoch, sample), sample, ""
        except (UndecodableError, DamagedSampleError) as error:
            reason = _reason(self.dataset, sample, error)
        for stand_in in candidates(self.dataset.num_samples, self._seed, epoch, sample):
            try:
                pixels = self._pixels(stand_in, epoch, sample)
            except (UndecodableError, DamagedSampleError):
                continue
            return pixels, stand_in, f"{reason}; replaced by sample {stand_in} ({self.dataset.key(stand_in)})"
        raise DataError(f"{reason}, and so is every stand-in tried: restore the shards")

    def _pixels(self, sample: int, epoch: int, place_of: int) -> torch.Tensor:
        """Read and augment a sample with the random choices of the sample whose place it takes."""
        data = self.dataset.read(sample).image
        height, width = self.dataset.size(sample)
        torch.default_generator.manual_seed(torch_seed(Purpose.AUGMENT, self._seed, epoch, place_of))
        return self._transform(data, height, width)


class EvalLoading:
    """Answers evaluation requests; fills up to `micro_batch` with black images."""

    def __init__(self, dataset: Source, config: DataConfig, micro_batch: int) -> None:
        self.dataset = dataset
        self._config = config
        self._micro_batch = micro_batch

    def __getitem__(self, request: Request) -> Loaded:
        size = self._config.image_size
        images = torch.zeros((self._micro_batch, 3, size, size), dtype=torch.uint8)
        delivered = np.full(self._micro_batch, -1, dtype=np.int64)
        bad: list[tuple[int, str]] = []
        for place, sample in enumerate(request.samples.tolist()):
            delivered[place] = sample
            try:
                images[place] = decode_for_eval(self.dataset.read(sample).image, self._config)
            except (UndecodableError, DamagedSampleError) as error:
                line = _reason(self.dataset, sample, error)
                if self._config.bad_validation == "raise":
                    return failed(
                        request,
                        DataError(
                            f"{line}: restore the shard, or set "
                            'data.bad_validation = "zero_weight" to leave such samples out of the count'
                        ),
                    )
                bad.append((place, line))
            except SetformerError as error:
                return failed(request, error)
        return Loaded(request, images, delivered, bad)


def _reason(dataset: Source, sample: int, error: Exception) -> str:
    if isinstance(error, DamagedSampleError):
        return str(error)
    return f"{dataset.place(sample)} is damaged ({error})"
