"""Images as tiles: a window is read to the last bit from the tiles that it touches and from no others."""

import itertools
import json
import pickle
import shutil
import zlib
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.inspection import inspect, pictures
from dataloaders.packing.intake import check
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.packing.verify import verify
from dataloaders.pixels.decode import UndecodableError, decode
from dataloaders.pixels.depth import PixelFormat
from dataloaders.reading.loading import EvalLoading, Request, TrainLoading, answer
from dataloaders.reading.streams import ShardEvalStream, ShardTrainStream
from dataloaders.source import DamagedSampleError, Stored
from dataloaders.sources import tiles
from dataloaders.sources.index import fingerprint_of
from dataloaders.sources.shards import ShardDataset, open_split
from dataloaders.sources.tiles import Grid, TiledImage, encode_table
from dataloaders.storage.base import LocalFolder
from setformer_dist.core.errors import ConfigError, DataError
from setformer_dist.core.ranks import RankInfo
from tests.unit.test_data_tiff import pixels_of, written

SIZES = [(150, 210), (96, 64), (64, 333), (129, 65)]


def folder_of(root, kind="png", bands=3, numbers="uint8", sizes=SIZES):
    """Class folders of images of several sizes; return their pixels by name."""
    pixels = {}
    for number, (height, width) in enumerate(sizes):
        name = f"{number}"
        folder = root / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels[name] = pixels_of(bands, numbers, height, width, number)
        if kind == "tif":
            (folder / f"{name}.tif").write_bytes(written(pixels[name], compression="deflate", tile=(48, 48)))
        else:
            PIL.Image.fromarray(pixels[name]).save(folder / f"{name}.{kind}", quality=95)
    return pixels


def packed(tmp_path, name="packed", source="source", **options):
    pack_image_folder(tmp_path / source, tmp_path / name / "train", PackOptions(**options))
    return open_split(tmp_path / name / "train")


def config_of(tmp_path, name="packed", bands=3, numbers="uint8", side=48, **kwargs):
    augment = {"crop": "window", **kwargs.pop("augment", {})}
    return DataConfig(root=str(tmp_path / name), train="train", val="train", image_size=side, pixels=numbers,
                      cache=str(tmp_path / "cache"), mean=[0.5] * bands, std=[0.25] * bands, augment=augment,
                      **kwargs)  # fmt: skip


def name_of(split, sample):
    return split.key(sample).rpartition("-")[2]


@pytest.mark.parametrize("side", [16, 64, 512])
@pytest.mark.parametrize(
    ("kind", "bands", "numbers"),
    [("png", 3, "uint8"), ("tif", 12, "uint16"), ("tif", 1, "float32"), ("tif", 4, "uint8")],
)
def test_every_window_is_what_was_packed_to_the_last_bit(tmp_path, side, kind, bands, numbers):
    pixels = folder_of(tmp_path / "source", kind, bands, numbers)
    form = PixelFormat(bands, numbers)
    split = packed(tmp_path, tiles=side, form=form)
    assert split.parts == frozenset()
    for sample in range(split.num_samples):
        image, wanted = split.read(sample).image, pixels[name_of(split, sample)]
        assert image.shape == wanted.shape
        assert image.numbers == numbers
        height, width = wanted.shape[:2]
        assert np.array_equal(decode(image, form=form), wanted)
        for top, left in itertools.product((0, 1, height // 2), (0, 3, width // 2)):
            box = (top, left, height - top, min(31, width - left))
            assert np.array_equal(image.window(box), wanted[top:, left : left + box[3]])
    assert verify(tmp_path / "packed" / "train", workers=0).damaged == []


def test_tiles_of_a_jpeg_are_near_to_it(tmp_path):
    folder_of(tmp_path / "source", "jpg")
    split = packed(tmp_path, tiles=32)
    for sample in range(split.num_samples):
        file = next((tmp_path / "source").rglob(f"{name_of(split, sample)}.jpg"))
        difference = decode(split.read(sample).image).astype(int) - decode(file.read_bytes())
        assert np.abs(difference).mean() < 2
        assert split.read(sample).image.num_bytes < difference.size  # still compressed


class CountingFolder(LocalFolder):
    """A folder that remembers what was read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.reads = []

    def read(self, name, offset, size):
        self.reads.append((offset, size))
        return super().read(name, offset, size)


def test_a_window_reads_the_table_and_the_tiles_that_it_touches_and_nothing_else(tmp_path):
    folder_of(tmp_path / "source", "tif", 4, "uint16", [(512, 768)])
    split = packed(tmp_path, tiles=64, form=PixelFormat(4, "uint16"))
    storage = CountingFolder(tmp_path / "packed" / "train")
    counted = ShardDataset(storage, split.index)
    image = counted.read(0).image
    table = 8 + 6 * 4 + 8 * 12 * 20
    assert [size for _, size in storage.reads] == [table]
    tile = 64 * 64 * 4 * 2
    for box, count in [((0, 0, 64, 64), 1), ((63, 63, 2, 2), 4), ((64, 128, 128, 64), 2), ((10, 10, 100, 100), 4)]:
        storage.reads.clear()
        image.window(box)
        assert [size for _, size in storage.reads] == [tile] * count
        assert len(set(storage.reads)) == count
    whole = sum(path.stat().st_size for path in (tmp_path / "packed" / "train").glob("*.tar"))
    assert 4 * tile < whole / 20


def test_what_training_sees_depends_on_neither_tiles_nor_ranks_nor_readers(tmp_path):
    """A run is a function of config and step: class folders, and tiles of any side, give the same bits."""
    folder_of(tmp_path / "source" / "train", sizes=[(80 + 7 * n, 140 - 9 * n) for n in range(8)])
    streams = {}
    roots = {"source": "source"}
    for side in (16, 64):
        packed(tmp_path, f"tiles{side}", "source/train", tiles=side)
        roots[f"tiles{side}"] = f"tiles{side}"
    packed(tmp_path, "plain", "source/train")
    roots["plain"] = "plain"

    def batches(name, world, micro, **how):
        config = config_of(tmp_path, name, **how)
        found = {}
        for rank in range(world):
            source = open_source(config.root, "train", config)
            stream = ShardTrainStream(source, config, 5, RankInfo(rank, world), 4, micro)
            accumulation = 4 // world // micro
            for number, batch in enumerate(itertools.islice(stream.micro_batches(0), 4 * accumulation)):
                for sample, image in zip(batch.sample_ids.tolist(), batch.inputs, strict=True):
                    found[number // accumulation, sample] = image.numpy().tobytes()
            stream.close()
        return found

    for name in roots:
        streams[name] = batches(name, 1, 4)
    first = streams["source"]
    assert len(first) == 16
    assert len(set(first.values())) == 16  # other windows in the second epoch
    assert all(found == first for found in streams.values())
    assert batches("tiles16", 2, 1) == first
    assert batches("tiles64", 4, 1, threads=3) == first


def test_a_part_of_a_window_decodes_its_own_tiles_and_checks_all(tmp_path, monkeypatch):
    folder_of(tmp_path / "source")
    packed(tmp_path, tiles=16)
    config = config_of(tmp_path)
    request = Request(np.arange(4), np.zeros(4, np.int64), shape=(48, 48))

    def shown(rows, loading=TrainLoading, more=(0,)):
        source = open_source(config.root, "train", config)
        source.decode_only(rows)
        source = pickle.loads(pickle.dumps(source))  # as it goes to other processes
        source.storage = CountingFolder(Path(config.root) / "train")
        decoded = []
        whole = tiles.decode
        monkeypatch.setattr(tiles, "decode", lambda data, form: (decoded.append(1), whole(data, form=form))[1])
        found = answer(loading(source, config, *more), request)
        monkeypatch.setattr(tiles, "decode", whole)
        return found, len(decoded), len(source.storage.reads)

    for loading, more in ((TrainLoading, (0,)), (EvalLoading, (4,))):
        wanted, decoded, reads = shown({}, loading, more)
        parts = {(0, 17): 0, (15, 33): 0, (31, 48): 0}
        for first, end in parts:
            found, parts[first, end], its_reads = shown({48: (first, end), 64: (0, 1)}, loading, more)
            assert torch.equal(found.images[:, :, first:end], wanted.images[:, :, first:end])
            assert its_reads == reads
        assert all(count < decoded for count in parts.values())
        assert not found.images[:, :, :8].any(), "of rows that nobody looks at, nothing is decoded"


def test_ranks_with_other_rows_find_the_same_images_damaged(tmp_path):
    folder_of(tmp_path / "source")
    packed(tmp_path, tiles=16)
    config = config_of(tmp_path)
    shard = next((tmp_path / "packed" / "train").glob("*.tar"))
    sound = open_source(config.root, "train", config).read(0).image
    data = bytearray(shard.read_bytes())
    row, column = sound.grid.rows // 2, sound.grid.columns // 2  # which the window in the middle touches
    tile = sound._tiles[row * sound.grid.columns + column]
    data[int(tile["offset"]) + 3] ^= 1
    shard.write_bytes(data)
    told = set()
    for rows in ({}, {48: (0, 1)}, {48: (24, 48)}):
        source = open_source(config.root, "train", config)
        source.decode_only(rows)
        loaded = answer(EvalLoading(source, config, 4), Request(np.arange(4)))
        told.add(str(loaded.bad or loaded.error))
    assert len(told) == 1
    assert "sample 0" in told.pop()


def test_windows_lie_everywhere_and_are_never_resized(tmp_path):
    height, width = 50, 60
    y, x = np.mgrid[:height, :width]
    (tmp_path / "source" / "a").mkdir(parents=True)
    PIL.Image.fromarray(np.stack([y, x, 0 * x], -1).astype(np.uint8)).save(tmp_path / "source" / "a" / "0.png")
    packed(tmp_path, tiles=16)
    config = config_of(tmp_path, side=48, image_width=32, augment={"flip": False})
    source = open_source(config.root, "train", config)
    loading = TrainLoading(source, config, 3)
    places = set()
    for epoch in range(400):
        image = answer(loading, Request(np.zeros(1, np.int64), np.array([epoch]), shape=(48, 32))).images[0]
        top, left = int(image[0, 0, 0]), int(image[1, 0, 0])
        assert torch.equal(image[0], torch.arange(top, top + 48, dtype=torch.uint8)[:, None].expand(48, 32))
        assert torch.equal(image[1], torch.arange(left, left + 32, dtype=torch.uint8)[None].expand(48, 32))
        places.add((top, left))
    assert {top for top, _ in places} == {0, 1, 2}
    assert {left for _, left in places} == set(range(29))


def test_evaluation_sees_the_window_in_the_middle(tmp_path):
    pixels = folder_of(tmp_path / "source")
    packed(tmp_path, tiles=32)
    config = config_of(tmp_path)
    source = open_source(config.root, "train", config)
    shown = answer(EvalLoading(source, config, 4), Request(np.arange(4)))
    for sample in range(4):
        wanted = pixels[name_of(source, sample)]
        top, left = ((side - 48 + 1) // 2 for side in wanted.shape[:2])
        assert np.array_equal(shown.images[sample].permute(1, 2, 0), wanted[top : top + 48, left : left + 48])
    seen = [
        batch for rank in range(3) for batch in ShardEvalStream(source, config, RankInfo(rank, 3), 1).micro_batches()
    ]
    assert sorted(s for b in seen for s in b.sample_ids.tolist() if s >= 0) == [0, 1, 2, 3]


def test_a_window_larger_than_an_image_is_one_sentence(tmp_path):
    folder_of(tmp_path / "source")
    packed(tmp_path, tiles=32)
    words = r'augment.crop = "window" shows 65 x 65 pixels .* have only 64 rows or 64 columns'
    for loading in (lambda s, c: TrainLoading(s, c, 0), lambda s, c: EvalLoading(s, c, 1)):
        config = config_of(tmp_path, side=65)
        with pytest.raises(ConfigError, match=words):
            loading(open_source(config.root, "train", config), config)
    config = config_of(tmp_path, side=32, resolutions=[{"step": 3, "image_size": 128}])
    with pytest.raises(ConfigError, match="shows 128 x 128 pixels"):
        TrainLoading(open_source(config.root, "train", config), config, 0)


# -------------------------------------------------------------------------------------------------------------- damage


def damage_tile(folder, row, column, sample=0):
    split = open_split(folder)
    image = split.read(sample).image
    offset = int(image._tiles[row * image.grid.columns + column]["offset"])
    with (folder / "shard-000000.tar").open("r+b") as file:
        file.seek(offset + 20)
        byte = file.read(1)[0]
        file.seek(offset + 20)
        file.write(bytes([byte ^ 255]))


def test_a_damaged_tile_is_a_damaged_sample_where_it_is_seen(tmp_path):
    folder_of(tmp_path / "source", sizes=[(160, 160)] * 6)
    packed(tmp_path, tiles=80)
    whole = config_of(tmp_path, side=64, augment={"flip": False})
    source = open_source(whole.root, "train", whole)
    before = [
        answer(TrainLoading(source, whole, 1), Request(np.arange(6), np.full(6, epoch), shape=(64, 64)))
        for epoch in range(6)
    ]
    damage_tile(tmp_path / "packed" / "train", 1, 1)
    source = open_source(whole.root, "train", whole)
    replaced = 0
    for epoch, was in enumerate(before):
        now = answer(TrainLoading(source, whole, 1), Request(np.arange(6), np.full(6, epoch), shape=(64, 64)))
        for place in range(6):
            if place in dict(now.bad):
                replaced += 1
                assert place == 0
                assert "a tile's bytes do not have the checksum of the index; replaced by sample" in dict(now.bad)[0]
            else:
                assert torch.equal(now.images[place], was.images[place])
    assert 0 < replaced < 6  # windows beside the tile are whole
    shown = answer(EvalLoading(source, whole, 6), Request(np.arange(6)))
    assert "a tile's bytes do not have the checksum" in str(shown.error)  # the window in the middle touches it
    found = verify(tmp_path / "packed" / "train", workers=0).damaged
    assert {damage.kind for damage in found} == {"shard", "checksum"}


def test_a_forged_table_is_a_damaged_sample_and_nothing_worse():
    grid = Grid(16, 40, 50, 3, "uint8", is_raw=True)
    data = bytes(range(256)) * 400
    tiles, offset = [], 0
    for row, column in grid.touched((0, 0, 40, 50)):
        size = int(np.prod(grid.shape(row, column)))
        tiles.append((offset, size, zlib.crc32(data[offset : offset + size])))
        offset += size

    def read(at, size, checksum):
        return data[at : at + size]

    table = encode_table(grid, tiles)
    assert TiledImage(table, len(data), read, "x").window((0, 0, 40, 50)).shape == (40, 50, 3)
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        forged = bytearray(table)
        forged[draw.integers(len(forged))] = draw.integers(256)
        try:
            image = TiledImage(bytes(forged[: draw.integers(len(forged) + 1)] if draw.random() < 0.2 else forged),
                               len(data), read, "x")  # fmt: skip
            height, width = image.shape[:2]
            image.window((0, 0, min(height, 64), min(width, 64)))
        except DamagedSampleError:
            refused += 1
    assert refused > 100


# ------------------------------------------------------------------------------------------------------------- packing


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_the_same_source_gives_the_same_bytes_with_any_number_of_processes(tmp_path):
    folder_of(tmp_path / "source", "tif", 4, "uint16")
    form = PixelFormat(4, "uint16")
    for name, workers in (("once", 0), ("twice", 0), ("processes", 2)):
        packed(tmp_path, name, tiles=64, form=form, workers=workers, samples_per_shard=2)
    once = files(tmp_path / "once" / "train")
    assert files(tmp_path / "twice" / "train") == once
    assert files(tmp_path / "processes" / "train") == once


def test_an_image_damaged_halfway_leaves_nothing_in_the_shard(tmp_path):
    folder_of(tmp_path / "source", "tif", 4, "uint16")
    bad = tmp_path / "source" / "a" / "0.tif"
    clean = tmp_path / "clean"
    shutil.copytree(tmp_path / "source", clean)
    (clean / "a" / "0.tif").unlink()
    data = bytearray(bad.read_bytes())
    data[-100:] = bytes(100)  # the last tile
    bad.write_bytes(data)
    form = PixelFormat(4, "uint16")
    with pytest.raises(DataError, match=r"0.tif: it is not a whole image: tile \d+ of \d+ of the TIFF is cut short"):
        packed(tmp_path, tiles=32, form=form)
    split = packed(tmp_path, tiles=32, form=form, skip_bad=True)
    assert [name_of(split, n) for n in range(3)] == ["2", "1", "3"]
    assert verify(tmp_path / "packed" / "train", workers=0).damaged == []
    other = packed(tmp_path, "other", "clean", tiles=32, form=form)
    assert split.index.shards[0].size == other.index.shards[0].size  # and not a byte of it is left


def test_images_of_other_pixels_are_refused_with_the_option_that_takes_them(tmp_path):
    folder_of(tmp_path / "source", "tif", 12, "uint16")
    for options in ({"tiles": 64}, {}):
        with pytest.raises(
            DataError, match=r"has 12 bands of uint16, and 3 bands of uint8 are read .*--pixels and --bands"
        ):
            packed(tmp_path, **options)
    split = packed(tmp_path, form=PixelFormat(12, "uint16"))  # whole: the files as they are
    assert split.read(0).image == (tmp_path / "source" / "a" / "0.tif").read_bytes()
    assert verify(tmp_path / "packed" / "train", workers=0).damaged == []


def test_more_pixels_than_the_limit_need_the_key_or_tiles(tmp_path):
    """Header first: nothing is decoded that says that it is too large."""
    folder_of(tmp_path / "source", "png", sizes=[(120, 100)] * 2)
    small = PixelFormat(max_pixels=11_999)
    for options in ({"tiles": 32}, {}):
        with pytest.raises(DataError, match="it claims 120 x 100 pixels, more than the 11999 that are decoded"):
            packed(tmp_path, form=small, **options)
    packed(tmp_path, "whole")
    packed(tmp_path, "tiled", tiles=32)
    request = Request(np.arange(2), np.zeros(2, np.int64), shape=(48, 48))

    def loaded(name, limit):
        config = config_of(tmp_path, name, max_pixels=limit)
        return answer(TrainLoading(open_source(config.root, "train", config), config, 0), request)

    assert "more than the 11999" in str(loaded("whole", 11_999).error)
    assert loaded("whole", 12_000).error is None
    assert loaded("tiled", 11_999).bad == []  # what is decoded is the window
    assert loaded("tiled", 2303).error is not None


def test_verify_allows_as_many_pixels_as_packing_did(tmp_path):
    folder_of(tmp_path / "source", "png", sizes=[(120, 100)] * 2)
    packed(tmp_path, form=PixelFormat(max_pixels=12_000))
    assert verify(tmp_path / "packed" / "train").damaged == []
    index = tmp_path / "packed" / "train" / "index.json"
    table = json.loads(index.read_text())
    assert table["options"]["max_pixels"] == 12_000
    table["options"]["max_pixels"] = 11_999
    index.write_text(json.dumps({**table, "fingerprint": fingerprint_of(table)}))
    damaged = verify(tmp_path / "packed" / "train").damaged
    assert ["more than the 11999" in damage.detail for damage in damaged] == [True, True]


def test_a_raised_limit_lets_pillow_read_and_no_bomb_through(tmp_path, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)  # PIL refuses twice as many
    monkeypatch.setattr("dataloaders.pixels.decode.MAX_PIXELS", 1000)
    folder_of(tmp_path, "png", sizes=[(60, 50)])
    data = next(tmp_path.rglob("*.png")).read_bytes()
    with pytest.raises(UndecodableError):
        decode(data, form=PixelFormat(max_pixels=1000))
    assert decode(data, form=PixelFormat(max_pixels=3000)).shape == (60, 50, 3)
    with pytest.raises(UndecodableError, match="60 x 50 pixels, more than the 2999"):
        decode(data, form=PixelFormat(max_pixels=2999))
    assert PIL.Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tiles": 40}, r"--tiles is a multiple of 16 up to 8192"),
        ({"tiles": 16384}, r"--tiles is a multiple of 16"),
        ({"tiles": 64, "max_side": 100}, r"--tiles keeps images in their size, and --max-side shrinks them"),
    ],
)
def test_options_that_contradict_tiles_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        PackOptions(**options)


def test_tiles_are_repacked_inspected_and_shown(tmp_path):
    pixels = folder_of(tmp_path / "source")
    split = packed(tmp_path, tiles=32)
    pack_image_folder(tmp_path / "packed" / "train", tmp_path / "again", PackOptions(tiles=64))
    again = open_split(tmp_path / "again")
    for sample in range(4):
        assert again.key(sample) == split.key(sample)
        assert np.array_equal(decode(again.read(sample).image), pixels[name_of(again, sample)])
    pack_image_folder(tmp_path / "packed" / "train", tmp_path / "plain", PackOptions())
    plain = open_split(tmp_path / "plain")
    assert np.array_equal(decode(plain.read(0).image), pixels[name_of(plain, 0)])
    found = inspect(split)
    assert found.formats == {"tiles": 4}
    assert found.image_bytes > sum(p.size for p in pixels.values()) / 20
    assert len(pictures(split, 4, 50)) == 4


def test_a_wide_image_in_tiles_is_checked_whole():
    """8,192 rows of it would be more pixels than are decoded at once."""
    grid = Grid(4096, 8192, 24_576, 1, "uint8", is_raw=True)
    table = encode_table(grid, [(0, 4096**2, 0)] * 12)
    read = []

    def tile(offset, size, crc32):
        read.append(size)
        return bytes(size)

    assert check(Stored(TiledImage(table, 4096**2, tile, "an image")), classes=1) == (8192, 24_576)
    assert len(read) == 12


def test_splits_share_no_image_and_no_tile(tmp_path):
    """Tiles of an image are one sample: what is split by samples is split by images, whatever the windows."""
    folder_of(tmp_path / "source", sizes=[(96, 96)] * 8)
    split = packed(tmp_path, tiles=16)
    assert split.num_samples == 8
    places = [
        {(int(row["offset"]), int(row["size"])) for row in split.read(sample).image._tiles} for sample in range(8)
    ]
    assert all(len(found) == 36 for found in places)
    assert not any(one & other for one, other in itertools.combinations(places, 2))
