"""The `[data]` table: images (where the shards are, transforms, tolerated damage) or tokens.

Everything here changes what a sample looks like or whether it counts; nothing here names ranks, micro batches
or devices, so a config means the same data on every machine. `workers`, `threads`, `prefetch` and `cache` change
speed alone.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal, Self

import pydantic

from dataloaders.pixels.depth import FULL_RANGE, MAX_PIXELS, MOST_BANDS, Numbers, PixelFormat
from setformer_dist.core.config import FrozenConfig
from setformer_dist.core.continuing import FREE

# TOML has arrays, not tuples; strict mode would refuse them.
_Bands = Annotated[tuple[float, ...], pydantic.Field(strict=False, min_length=1, max_length=MOST_BANDS)]
_Range = Annotated[tuple[float, float], pydantic.Field(strict=False)]

# Channel statistics of ImageNet's training images, as timm and torchvision use them.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)

LARGEST_SIDE = 65_536  # pixels of what a model sees, beyond which no tensor could hold a picture
LARGEST_JITTER = 16  # of a side, beyond which nothing is left to be seen
_LARGEST_STATISTIC = 1000.0  # of mean and std; beyond 1 only by mistake, and far beyond no pixel can be padded with it


class AugmentConfig(FrozenConfig):
    """What is done to training images, each drawn from (seed, epoch, sample id).

    Attributes:
        crop: "resized" (random area and aspect ratio, then resized to the image size), "scale_jitter" (resized by a
            random factor with its proportions kept, then a random window, with the mean colour where the image is
            smaller; for segmentation and detection), "pad" (zero padding and a random window; for images already at
            the image size), "window" (a random window of the image size, not resized; evaluation uses the window at
            the image's centre) or "none" (as in evaluation).
        pad: pixels added on each side by crop = "pad".
        scale: smallest and largest share of the image's area that crop = "resized" takes.
        ratio: smallest and largest width / height of that crop.
        scale_jitter: smallest and largest factor of crop = "scale_jitter"; at 1 the image just covers the image size,
            as in evaluation of whole images.
        flip: whether to mirror half of the images left to right.
        vflip: probability that an image is turned upside down (mirrored top to bottom), as for satellite images and
            microscopy; 0 is off.
        randaugment_ops: RandAugment operations per image (Cubuk et al. 2019); 0 is off.
        randaugment_magnitude: strength of those operations, 0 to 30.
        policy: one operation per image, in place of RandAugment: "trivialaugment" (TrivialAugment Wide, Müller & Hutter
            2021: any operation, of any strength), "3augment" (DeiT III, Touvron et al. 2022: grey, solarized or
            blurred) or "none".
        color_jitter: largest relative change of brightness, contrast and saturation; 0 is off.
        erasing: probability that a rectangle is replaced by the mean colour; 0 is off.
        mixup: alpha of the Beta distribution of mixup; 0 is off.
        cutmix: alpha of the Beta distribution of cutmix; 0 is off. With both on, each group draws one.
        mix_off_epoch: mixup and cutmix are off from this epoch on, and smoothing stays (timm's --mixup-off-epoch); none
            is never.
        mix_off_step: the same by optimizer step; give one of the two.
        mix_prob: probability that a group of samples is mixed at all.
        mix_group: consecutive positions of the global order that mix among themselves; must divide the micro
            batch, so that who mixes with whom does not depend on ranks.
        smoothing: label smoothing of the training targets.
        repeats: times that each image is in a global batch, every time augmented anew (Hoffer et al. 2020; timm's
            --aug-repeats). An epoch has as many steps as without, so it shows 1 / repeats of the images; 1 is off.
        own: augmentations of your own, in their order, after all others that change an image and before mixing; a
            module of run.imports registers them (docs/library.md).
    """

    crop: Literal["resized", "scale_jitter", "pad", "window", "none"] = "resized"
    pad: int = pydantic.Field(default=4, ge=1)
    scale: _Range = (0.08, 1.0)
    ratio: _Range = (3 / 4, 4 / 3)
    scale_jitter: _Range = (0.5, 2.0)
    flip: bool = True
    vflip: float = pydantic.Field(default=0.0, ge=0.0, le=1.0)
    randaugment_ops: int = pydantic.Field(default=0, ge=0, le=14)
    randaugment_magnitude: int = pydantic.Field(default=9, ge=0, le=30)
    policy: Literal["none", "trivialaugment", "3augment"] = "none"
    color_jitter: float = pydantic.Field(default=0.0, ge=0.0, le=1.0)
    erasing: float = pydantic.Field(default=0.0, ge=0.0, le=1.0)
    mixup: float = pydantic.Field(default=0.0, ge=0.0)
    cutmix: float = pydantic.Field(default=0.0, ge=0.0)
    mix_off_epoch: int | None = pydantic.Field(default=None, ge=1)
    mix_off_step: int | None = pydantic.Field(default=None, ge=1)
    mix_prob: float = pydantic.Field(default=1.0, ge=0.0, le=1.0)
    mix_group: int = pydantic.Field(default=2, ge=2)
    smoothing: float = pydantic.Field(default=0.0, ge=0.0, lt=1.0)
    repeats: int = pydantic.Field(default=1, ge=1, le=1024)
    own: tuple[str, ...] = pydantic.Field(default=(), strict=False)

    @property
    def mixes(self) -> bool:
        """Whether any sample can be mixed with another."""
        return self.mix_prob > 0 and (self.mixup > 0 or self.cutmix > 0)

    def mixed_steps(self, steps_per_epoch: int) -> int | None:
        """Return the optimizer steps from the start of a run that may mix; None if that is all of them."""
        if self.mix_off_epoch is not None:
            return self.mix_off_epoch * steps_per_epoch
        return self.mix_off_step

    @pydantic.model_validator(mode="after")
    def _ranges(self) -> Self:
        check_scale(self.scale)
        low, high = self.ratio
        if not 0 < low <= high:
            raise ValueError(f"ratio = [{low}, {high}] must satisfy 0 < first <= second")
        low, high = self.scale_jitter
        if not 1 / LARGEST_JITTER <= low <= high <= LARGEST_JITTER:
            raise ValueError(
                f"scale_jitter = [{low}, {high}] must satisfy {1 / LARGEST_JITTER} <= first <= second <= "
                f"{LARGEST_JITTER}"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.mix_off_epoch is not None and self.mix_off_step is not None:
            raise ValueError("mixing ends at an epoch or at a step: give mix_off_epoch or mix_off_step")
        if self.policy != "none" and self.randaugment_ops:
            raise ValueError(
                f'policy = "{self.policy}" takes the place of RandAugment, and randaugment_ops = '
                f'{self.randaugment_ops}: set randaugment_ops = 0, or policy = "none"'
            )
        return self


def check_scale(scale: tuple[float, float]) -> None:
    """Check limits of the share of an image that a crop takes; raises ValueError."""
    low, high = scale
    if not 0 < low <= high <= 1:
        raise ValueError(f"scale = [{low}, {high}] must satisfy 0 < first <= second <= 1")


class MixtureEntry(FrozenConfig):
    """One data set of a mixture.

    Attributes:
        root: as `DataConfig.root`.
        train: as `DataConfig.train`.
        weight: its share of the samples, relative to the other entries.
    """

    root: str
    train: str = "train"
    weight: float = pydantic.Field(default=1.0, gt=0.0)


_MOST_SIDES = 256


class ResolutionStage(FrozenConfig):
    """From this epoch or step on, training images have this size, or sizes from this one to another.

    Attributes:
        epoch: first epoch; give this or `step`.
        step: first optimizer step.
        image_size: height in pixels; the width scales with it, in the proportion of `data.image_width`.
        ramp_to: last height of a ramp: from image_size on, every height lasts equally long, until the next stage
            begins.
        random_to: other end of the range from which the height of every step is drawn, by the seed and the step.
        multiple: distance between two heights of a ramp or a range; none means 32.
        scale: share of the area of the stage's crops, instead of `augment.scale`.
    """

    # In a list of tables, a key that older runs do not name must be none by default: see `core/continuing.py`.
    epoch: int | None = pydantic.Field(default=None, ge=0)
    step: int | None = pydantic.Field(default=None, ge=0)
    image_size: int = pydantic.Field(ge=1, le=LARGEST_SIDE)
    ramp_to: int | None = pydantic.Field(default=None, ge=1, le=LARGEST_SIDE)
    random_to: int | None = pydantic.Field(default=None, ge=1, le=LARGEST_SIDE)
    multiple: int | None = pydantic.Field(default=None, ge=1, le=LARGEST_SIDE)
    scale: Annotated[tuple[float, float] | None, pydantic.Field(strict=False)] = None

    @property
    def sides(self) -> range:
        """All heights of the stage, from image_size on."""
        last = self.ramp_to or self.random_to or self.image_size
        way = 1 if last >= self.image_size else -1
        return range(self.image_size, last + way, way * (self.multiple or 32))

    @pydantic.model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.epoch is None) == (self.step is None):
            raise ValueError("a resolution stage begins at an epoch or at a step: give exactly one of the two")
        if self.scale is not None:
            check_scale(self.scale)
        if self.ramp_to and self.random_to:
            raise ValueError("the sizes of a resolution stage follow a ramp or are drawn: give ramp_to or random_to")
        last = self.ramp_to or self.random_to
        if self.multiple and not last:
            raise ValueError("multiple is the distance between the sizes of a ramp or a range: give ramp_to, random_to")
        if last and self.sides[-1] != last:
            raise ValueError(
                f"a resolution stage cannot go from {self.image_size} to {last} by {self.multiple or 32}: its sizes "
                f"end at {self.sides[-1]}; take that one, or another multiple"
            )
        if len(self.sides) > _MOST_SIDES:
            raise ValueError(
                f"a resolution stage has {len(self.sides)} sizes, and {_MOST_SIDES} at most are tried with the model "
                "before training: take a larger multiple"
            )
        return self


class DataConfig(FrozenConfig):
    """The data of a run.

    Attributes:
        root: folder that holds the splits, or the URL of one (http, https, or any that fsspec knows).
        train: the training split below `root`: a folder (packed, of external WebDataset shards, or of class folders),
            a .beton file, or a pattern of shards such as "train-{0000..0146}.tar" or "train-*.tar".
        val: the validation split below `root`, in the same forms.
        engine: what reads and decodes: "native" (this package) or "ffcv" (FFCV's loader, for .beton alone).
        access: "random" reads each sample at its offset; "sequential" reads whole shards, for storage without random
            access (pipes, object stores without range requests).
        cache: folder for shards fetched from a URL, and for indexes of class folders and of shards in folders that
            cannot be written; "" fetches no shards, and keeps such indexes in the user's cache folder.
        cache_gib: GiB of shards and whole .beton files that `cache` may hold in total; the least recently used are
            removed first.
        read_timeout: longest time in seconds of a read from a URL, or of a wait for a reader.
        order: "full" permutes all samples; "block" permutes shards, then samples within blocks of `block_shards`
            shards, for storage where random reads are slow.
        block_shards: shards per block of order = "block".
        epoch_end: what happens to the last samples of an epoch if they fill no batch: "drop" leaves them out (different
            ones each epoch), "wrap" fills the batch from the next epoch, so that none is left out.
        mixture: several data sets of the same classes, each with a weight, in place of `root`/`train` for training.
            Each data set has its own epochs, and none of its samples is left out (`epoch_end` has no effect). An
            epoch of the run has as many samples as all data sets together.
        image_size: height and width of the images the model sees, in pixels.
        image_width: width in pixels of rectangular images, whose height is image_size; 0 means square images.
        eval_crop: side of the centre crop in evaluation as a share of the resized image's; an image of the model's
            size is not cropped.
        eval_view: what of an image evaluation shows the model: "centre" (the centre crop) or "whole" (the whole image,
            resized until image_size fits into it, with sides that are multiples of `bucket_multiple`; with
            augment.crop = "window" at native scale). Masks and boxes stay as they are stored. Where a split has
            images of several sizes, micro batches have one image. Tasks "segmentation" and "detection" set "whole".
        eval_longest: most pixels of the longer side of whole images, such as 1333 for COCO; elongated images are then
            resized to less than image_size. 0 is no limit.
        interpolation: how images are resized (antialiased).
        mean: means of the bands that normalisation subtracts, as shares of the full range (with pixels = "float32", in
            the units of the data). One number per band: this sets the number of bands that images must have, and the
            model's in_chans.
        std: deviations of the bands that normalisation divides by, in the same units.
        pixels: data type of the bands: "uint8" (with three bands, all other 8-bit images are converted to RGB),
            "uint16" or "float32"; other images are refused. Values reach the device unchanged.
        max_pixels: largest height x width of an image; larger ones are refused before they are decoded. Memory grows
            with it. Of images packed as tiles, only what training reads counts.
        resolutions: stages of progressive resizing; before the first, and without any, images have `image_size`.
        aspect_buckets: shapes (width / height) of training images, such as [0.75, 1.0, 1.33]; each batch has one
            shape of about image_size x image_size pixels and the images closest to it. Empty: square.
        bucket_multiple: sides of bucketed images, and of whole ones in evaluation, are multiples of this, in pixels.
        workers: processes that read and decode; with 0 the training process does it.
        threads: threads that decode within the training process, or within each worker; with 0, decoding starts only
            when a batch is requested. One thread suffices where training computes on the same cores. On a GPU host,
            use one thread less than the cores of each rank.
        prefetch: micro batches that the threads, or each worker, prepare in advance.
        max_bad_share: largest share of damaged training samples that is tolerated; above it the run stops. A few
            samples are tolerated in any case (`SPARED` in `dataloaders.reading.damage`).
        skip_bad: skip incomplete samples of external shards (no image, no label, members without a sample, empty
            shards), and report how many; otherwise they are an error.
        allow_empty_classes: ignore class folders without a readable image; otherwise they are an error.
        labels: whether samples must have labels; with false, folders need no class folders and external shards no
            labels, for a task that learns without them ("mae", "simmim").
        channels_last: pass images to the model in the channels-last memory format, which makes convolutions faster on
            many devices; results differ by rounding.
        bad_validation: "raise" stops the run at a damaged validation sample; "zero_weight" gives it weight 0.
        augment: augmentations of training images.
    """

    root: Annotated[str, FREE] = ""
    train: Annotated[str, FREE] = "train"
    val: Annotated[str, FREE] = "val"
    engine: Literal["native", "ffcv"] = "native"
    access: Annotated[Literal["random", "sequential"], FREE] = "random"
    cache: Annotated[str, FREE] = ""
    cache_gib: Annotated[float, FREE] = pydantic.Field(default=64.0, gt=0.0)
    read_timeout: Annotated[float, FREE] = pydantic.Field(default=60.0, gt=0.0)
    order: Literal["full", "block"] = "full"
    block_shards: int = pydantic.Field(default=64, ge=1)
    epoch_end: Literal["drop", "wrap"] = "drop"
    mixture: Annotated[tuple[MixtureEntry, ...], pydantic.Field(strict=False)] = ()
    image_size: int = pydantic.Field(default=224, ge=1, le=LARGEST_SIDE)
    image_width: int = pydantic.Field(default=0, ge=0, le=LARGEST_SIDE)
    resolutions: Annotated[tuple[ResolutionStage, ...], pydantic.Field(strict=False)] = ()
    aspect_buckets: Annotated[tuple[float, ...], pydantic.Field(strict=False)] = ()
    bucket_multiple: int = pydantic.Field(default=32, ge=1, le=LARGEST_SIDE)
    eval_crop: float = pydantic.Field(default=0.875, gt=0.0, le=1.0)
    eval_view: Literal["centre", "whole"] = "centre"
    eval_longest: int = pydantic.Field(default=0, ge=0, le=LARGEST_SIDE)
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: _Bands = _IMAGENET_MEAN
    std: _Bands = _IMAGENET_STD
    pixels: Numbers = "uint8"
    max_pixels: int = pydantic.Field(default=MAX_PIXELS, ge=1, le=1 << 36)
    workers: Annotated[int, FREE] = pydantic.Field(default=0, ge=0)
    threads: Annotated[int, FREE] = pydantic.Field(default=1, ge=0, le=1024)
    prefetch: Annotated[int, FREE] = pydantic.Field(default=2, ge=1)
    max_bad_share: Annotated[float, FREE] = pydantic.Field(default=1e-3, ge=0.0, le=1.0)
    skip_bad: Annotated[bool, FREE] = False
    allow_empty_classes: Annotated[bool, FREE] = False
    labels: bool = True
    channels_last: Annotated[bool, FREE] = False
    bad_validation: Annotated[Literal["raise", "zero_weight"], FREE] = "raise"
    augment: AugmentConfig = AugmentConfig()

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the images that the model sees."""
        return self.image_size, self.image_width or self.image_size

    @property
    def bands(self) -> int:
        """C, the bands of images and the channels of the model's input."""
        return len(self.mean)

    @property
    def form(self) -> PixelFormat:
        """What images are decoded to."""
        return PixelFormat(self.bands, self.pixels, self.max_pixels)

    @property
    def group(self) -> int:
        """Factor of the micro batch: the samples that are mixed with each other."""
        return self.augment.mix_group if self.augment.mixes else 1

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.root and not all(entry.root for entry in self.mixture):
            raise ValueError("root is missing: name the folder or the URL of the data")
        if min(self.std) <= 0:
            raise ValueError(f"std = {list(self.std)} must be positive, as images are divided by it")
        if len(self.mean) != len(self.std):
            raise ValueError(
                f"mean names {len(self.mean)} bands and std names {len(self.std)}: give one number of each for each "
                "band of the images"
            )
        if self.pixels != "float32" and max(map(abs, (*self.mean, *self.std))) > _LARGEST_STATISTIC:
            raise ValueError(
                f"mean = {list(self.mean)} and std = {list(self.std)} are in units of the full range: divide by "
                f"{FULL_RANGE[self.pixels]}"
            )
        if self.augment.crop == "pad" and self.augment.pad >= min(self.shape):
            raise ValueError(
                f"augment.pad = {self.augment.pad} must be smaller than image_size = {min(self.shape)}, "
                "or a crop can miss the image altogether"
            )
        return self

    @pydantic.model_validator(mode="after")
    def _possible_pixels(self) -> Self:
        if self.form.is_rgb:
            return self
        for key, off in (("randaugment_ops", 0), ("policy", "none"), ("color_jitter", 0)):
            if (value := getattr(self.augment, key)) != off:
                raise ValueError(
                    f"augment.{key} = {json.dumps(value)} changes colours of RGB images of 8 bits, and the images have "
                    f"{self.form} (data.pixels, data.mean): set it to {json.dumps(off)}"
                )
        if self.engine == "ffcv":
            raise ValueError(
                f'engine = "ffcv" reads RGB images of 8 bits, and the images have {self.form} (data.pixels, '
                'data.mean): set engine = "native"'
            )
        return self

    @pydantic.model_validator(mode="after")
    def _possible_sizes(self) -> Self:
        if self.eval_longest and (self.eval_view != "whole" or self.augment.crop == "window"):
            raise ValueError(
                f"eval_longest = {self.eval_longest} limits whole images that are resized, and here eval_view = "
                f'"{self.eval_view}" and augment.crop = "{self.augment.crop}": leave it out'
            )
        if 0 < self.eval_longest < max(self.shape):
            raise ValueError(
                f"eval_longest = {self.eval_longest} must be at least {max(self.shape)}, the longer side of the images "
                "that the model sees (image_size, image_width)"
            )
        if self.eval_view == "whole" and self.engine == "ffcv":
            raise ValueError('eval_view = "whole" shows images of any shape, and FFCV has one: set engine = "native"')
        if self.augment.crop == "window" and self.engine == "ffcv":
            raise ValueError('augment.crop = "window" is not one of FFCV\'s crops: set engine = "native"')
        if self.augment.crop != "resized" and any(stage.scale is not None for stage in self.resolutions):
            raise ValueError(
                f'resolutions: scale is the share of the area that augment.crop = "resized" takes, and the crop here '
                f'is "{self.augment.crop}": leave scale out'
            )
        if self.augment.crop == "pad" and (self.resolutions or self.aspect_buckets):
            raise ValueError(
                'augment.crop = "pad" keeps images as large as they are stored, so it excludes resolutions '
                'and aspect_buckets: set augment.crop = "resized"'
            )
        if self.aspect_buckets and self.image_width:
            raise ValueError("image_width gives all images one shape, aspect_buckets several: leave one out")
        if self.aspect_buckets and (self.mixture or self.order == "block"):
            other = "mixture" if self.mixture else 'order = "block"'
            raise ValueError(f"aspect_buckets forms batches by shape, which {other} does not allow: leave one out")
        if not all(aspect > 0 for aspect in self.aspect_buckets):
            raise ValueError(f"aspect_buckets = {list(self.aspect_buckets)} must be positive: they are width / height")
        if len(set(self.aspect_buckets)) < len(self.aspect_buckets):
            raise ValueError(f"aspect_buckets = {list(self.aspect_buckets)} names a shape twice: leave one out")
        return self


class TokenConfig(FrozenConfig):
    """The token sequences of a run.

    Attributes:
        kind: "tokens": the data are token sequences and not images.
        root: folder that holds the packed splits.
        train: sub-folder of `root` with the training split.
        val: sub-folder of `root` with the validation split.
        length: tokens to which sequences are padded and cut; 0 takes the length stored in the split.
        trim: pad a micro batch only to its longest sequence, as a multiple of 16 tokens; for models that take any
            length (those of texts).
        smoothing: label smoothing of the training targets.
    """

    kind: Literal["tokens"] = "tokens"
    root: Annotated[str, FREE]
    train: Annotated[str, FREE] = "train"
    val: Annotated[str, FREE] = "val"
    length: int = pydantic.Field(default=0, ge=0)
    trim: bool = False
    smoothing: float = pydantic.Field(default=0.0, ge=0.0, lt=1.0)

    @property
    def group(self) -> int:
        """Factor of the micro batch: 1, as sequences are not mixed."""
        return 1


def _kind_of(data: object) -> str:
    kind = data.get("kind", "images") if isinstance(data, dict) else getattr(data, "kind", "images")
    return str(kind)


# Configs without data.kind describe images: they are older than the key.
AnyDataConfig = Annotated[
    Annotated[DataConfig, pydantic.Tag("images")] | Annotated[TokenConfig, pydantic.Tag("tokens")],
    pydantic.Discriminator(
        _kind_of,
        custom_error_type="data_kind",
        custom_error_message='kind must be "tokens", or left out for images',
    ),
]
