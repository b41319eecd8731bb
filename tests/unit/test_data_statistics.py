"""`setformer data stats` against numpy's mean and standard deviation of the same pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from dataloaders.config import DataConfig
from dataloaders.opening import open_source
from dataloaders.packing.inspection import inspect
from dataloaders.packing.pack import PackOptions, pack_image_folder
from dataloaders.packing.statistics import band_statistics
from dataloaders.pixels.depth import PixelFormat
from launch.cli import main as cli
from setformer_dist.core.errors import DataError

MOST = 1 << 27


def folder_of(tmp_path: Path, dtype: str, bands: int) -> tuple[Path, np.ndarray]:
    """Write four images whose values lie far from zero and close together."""
    draws = np.random.default_rng(0)
    (tmp_path / "images" / "a").mkdir(parents=True)
    values = []
    for number in range(4):
        pixels = draws.normal(40_000 if dtype != "uint8" else 200, 9, (30 + number, 20, bands))
        pixels = np.clip(pixels, 0, 255 if dtype == "uint8" else 65535).astype(dtype)
        values.append(pixels.reshape(-1, bands))
        path = tmp_path / "images" / "a" / f"{number}.{'png' if dtype == 'uint8' else 'tif'}"
        if dtype == "uint8":
            Image.fromarray(pixels).save(path)
        else:
            tifffile.imwrite(path, pixels, planarconfig="contig")
    return tmp_path / "images", np.concatenate(values).astype(np.float64)


@pytest.mark.parametrize(
    ("dtype", "bands", "full", "tiles"),
    [("uint8", 3, 255, 0), ("uint16", 5, 65535, 0), ("float32", 2, 1, 0), ("uint16", 5, 65535, 16)],
)
def test_they_are_those_of_numpy(tmp_path: Path, dtype: str, bands: int, full: int, tiles: int) -> None:
    folder, values = folder_of(tmp_path, dtype, bands)
    where = folder
    if tiles:
        where = tmp_path / "packed"
        form = PixelFormat(bands, dtype)  # type: ignore[arg-type]
        pack_image_folder(folder, where, PackOptions(tiles=tiles, form=form))
    data = DataConfig(root=str(tmp_path), pixels=dtype, mean=(0.5,) * bands, std=(1.0,) * bands,  # type: ignore[arg-type]
                      cache=str(tmp_path / "cache"))  # fmt: skip
    source = open_source(str(tmp_path), where.name, data)
    if tiles:
        assert inspect(source).formats == {f"tiles ({bands} bands of {dtype})": 4}
    found = band_statistics(source, 100, MOST)
    assert (found.pixels, found.images, found.damaged) == (dtype, 4, 0)
    close = 1e-12 if not tiles else 0.1  # quarters of the images
    np.testing.assert_allclose(found.mean, values.mean(0) / full, rtol=close)
    np.testing.assert_allclose(found.std, values.std(0) / full, rtol=max(close, 1e-9))


def test_images_that_differ_are_told(tmp_path: Path) -> None:
    folder, _ = folder_of(tmp_path, "uint16", 5)
    tifffile.imwrite(
        folder / "a" / "9.tif", np.ones((8, 8, 4), np.uint16), planarconfig="contig", photometric="minisblack"
    )
    data = DataConfig(root=str(tmp_path), cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match=r"9\.tif\) has 4 bands of uint16, and images before it 5 of uint16"):
        band_statistics(open_source(str(tmp_path), "images", data), 100, MOST)


def test_they_are_printed_as_a_table_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, values = folder_of(tmp_path, "uint8", 3)
    (folder / "a" / "8.png").write_bytes((folder / "a" / "0.png").read_bytes()[:200])
    cli.app(["data", "stats", str(folder)], standalone_mode=False)
    printed = capsys.readouterr().out
    assert '[data]\npixels = "uint8"\nmean = [' in printed
    assert f"mean = [{values.mean(0)[0] / 255:.4g}, " in printed
    assert "# 4 images of 5 in" in printed
    assert "1 damaged ones left out" in printed
