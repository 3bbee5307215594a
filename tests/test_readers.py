"""Files of any values and channels: what the model is given of them, and what is refused."""

import os
import pickle
import struct
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from mae.data import DataError, Reading, read_image, to_tensor
from mae.data.levels import FEW_LEVELS, OWN_RANGE, PLAIN, to_8_bits

RAMP = np.linspace(0.2, 1, 16)[:, None] * np.linspace(0, 1, 32)  # [16, 32], from 0 to 1
COLOURS = np.stack([RAMP, RAMP[::-1], RAMP[:, ::-1]])  # [3, 16, 32]
BANDS = np.stack([RAMP * (i + 4) / 16 for i in range(13)])  # [13, 16, 32]


def pixels(file: Path, channels: int = 3, **options) -> np.ndarray:
    return to_tensor(read_image(file, Reading(channels, **options))).numpy()


def refusal(file: Path, channels: int = 3, **options) -> str:
    with pytest.raises(DataError) as error:
        read_image(file, Reading(channels, **options))
    assert str(error.value).startswith(f"cannot read {file}: ")
    return str(error.value).removeprefix(f"cannot read {file}: ")


def assert_close(ours: np.ndarray, expected: np.ndarray, levels: int = 1) -> None:
    """Within so many levels of 255 of what is expected between 0 and 1."""
    assert ours.dtype == np.uint8
    assert np.abs(ours - 255 * np.broadcast_to(expected, ours.shape)).max() <= levels


# Values.


def test_16_bits():
    for highest, note in ((65535, PLAIN), (4095, OWN_RANGE), (3000, OWN_RANGE)):  # 12 bits in 16, reflectances
        ours, told = to_8_bits((RAMP * highest).round().astype(np.uint16)[None])
        assert_close(ours, RAMP)
        assert told == note


def test_other_numbers():
    for values, note in (
        (RAMP.astype(np.float32), PLAIN),
        (RAMP.astype(np.float16), PLAIN),
        (RAMP / 20, OWN_RANGE),
        (RAMP * 25 - 25, OWN_RANGE),  # decibels
        ((RAMP * 3000 - 1000).astype(np.int32), OWN_RANGE),
        ((RAMP * 3000 - 1000).astype(np.int16), OWN_RANGE),
        ((RAMP * 4e9).astype(np.uint32), OWN_RANGE),
        ((RAMP * 1e18).astype(np.int64), OWN_RANGE),
        ((RAMP - 0.5) * np.finfo(np.float64).max * 1.9, OWN_RANGE),  # whose range is no float
    ):
        ours, told = to_8_bits(values[None])
        assert_close(ours, RAMP)
        assert told == note


@pytest.mark.parametrize("nothing", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_in_no_range(nothing):
    values = 200 * RAMP
    values[3, 4:9] = nothing
    ours, told = to_8_bits(values[None])
    assert told == OWN_RANGE
    assert (ours[0, 3, 4:9] == 0).all()
    kept = np.isfinite(values)
    assert_close(ours[0][kept], RAMP[kept])


@pytest.mark.parametrize("lowest", [-9999, -32768, np.finfo(np.float32).min, np.finfo(np.float64).min])
def test_nodata_is_left_out_of_the_range(lowest):
    values = np.array(RAMP)
    values[:10], values[10, 0] = lowest, 1e20
    ours, told = to_8_bits(values[None])
    assert told == OWN_RANGE
    assert (ours[0, :10] == 0).all()
    assert ours[0, 10, 0] == 255
    assert_close(ours[0, 10:, 1:], RAMP[10:, 1:])


def test_large_whole_numbers_that_are_close():
    steps = (RAMP * 1000).astype(np.uint64)
    for values in (
        steps + np.uint64(2**63),
        steps.astype(np.int64) + 2**62,
        steps.astype(np.int64) + np.iinfo(np.int64).min,
    ):
        assert_close(to_8_bits(values[None])[0], RAMP)


def test_nodata_of_16_bits():
    values = (RAMP * 3000).astype(np.uint16)
    values[:4] = 65535
    ours, _ = to_8_bits(values[None])
    assert len(np.unique(ours)) > 150


def test_few_values_are_all_kept():
    for values, expected in (([7, 7, 7], [0] * 3), ([0, 1, 1], [0, 255, 255]), ([5, 6, 9], [0, 64, 255])):
        assert to_8_bits(np.array([[values]], np.int32))[0].ravel().tolist() == expected
    assert to_8_bits(np.full((1, 2, 2), 32896, np.uint16))[0].tolist() == [[[128] * 2] * 2]
    assert to_8_bits(np.array([[[False, True]]]))[0].tolist() == [[[0, 255]]]


def test_values_that_no_range_keeps_apart_are_refused():
    clusters = np.where(RAMP > 0.5, 1e9 + RAMP, RAMP)
    with pytest.raises(ValueError) as error:
        to_8_bits(clusters[None])
    assert str(error.value).startswith("no range of its ")
    assert str(error.value).endswith("leaves 32 levels of 256; give one with --value-range LOW HIGH")


def test_colours_share_a_range_and_other_channels_only_where_they_keep_their_levels():
    dark = np.array(COLOURS * 3000)
    dark[2] /= 500
    ours, _ = to_8_bits(dark.astype(np.uint16))
    assert ours[2].max() <= 1
    ours, _ = to_8_bits(BANDS)
    assert_close(ours, BANDS)
    for scale in (1, 3000):
        ours, told = to_8_bits(scale * np.stack([*BANDS, RAMP * 1e-4]))
        assert told == OWN_RANGE
        assert_close(ours, np.stack([*BANDS, RAMP]))


def test_a_given_range():
    for values in ((RAMP * 200).astype(np.uint8), (RAMP * 200).astype(np.uint16), RAMP * 200):
        ours, told = to_8_bits(values[None], (50, 150))
        expected = (values.astype(float) - 50) / 100
        assert_close(ours[0], expected.clip(0, 1))
        assert told == PLAIN
    ours, told = to_8_bits(RAMP[None], (0, 4095))
    assert told == FEW_LEVELS
    assert ours.max() == 0


def test_what_is_no_number_is_refused():
    for values, words in ((RAMP * 1j, "its values are of dtype complex128"), (RAMP * np.nan, "none of its values")):
        with pytest.raises(ValueError) as error:
            to_8_bits(values[None])
        assert str(error.value).startswith(words)


# Files.


def png_of_16_bits(file: Path, planes: np.ndarray, colour_type: int) -> None:
    rows = planes.transpose(1, 2, 0).astype(">u2")  # [H, W, C]

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", rows.shape[1], rows.shape[0], 16, colour_type, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))


@pytest.mark.parametrize("colour_type", [0, 2, 4, 6], ids=["grey", "colour", "grey and alpha", "colour and alpha"])
def test_pngs_of_12_bits_in_16(tmp_path, colour_type):
    planes = COLOURS if colour_type & 2 else RAMP[None]
    opaque = RAMP > 0.3
    deep = [*planes * 4095, opaque * 65535] if colour_type & 4 else planes * 4095
    png_of_16_bits(tmp_path / "x.png", np.stack(deep), colour_type)
    assert_close(pixels(tmp_path / "x.png"), np.where(opaque, planes, 1) if colour_type & 4 else planes)


def test_other_files_of_12_bits_in_16(tmp_path):
    deep = (COLOURS * 4095).astype(np.uint16)
    (tmp_path / "x.ppm").write_bytes(b"P6 32 16 65535\n" + deep.transpose(1, 2, 0).astype(">u2").tobytes())
    (tmp_path / "y.ppm").write_bytes(b"P6 32 16 4095\n" + deep.transpose(1, 2, 0).astype(">u2").tobytes())
    layouts = {
        "raw": {},
        "big": {"byteorder": ">"},
        "packed": {"compression": "zlib", "byteorder": ">"},
        "planes": {"planarconfig": "separate"},
    }
    for name, options in layouts.items():
        data = deep if name == "planes" else deep.transpose(1, 2, 0)
        tifffile.imwrite(tmp_path / f"{name}.tif", data, photometric="rgb", **options)
    for file in tmp_path.iterdir():
        assert_close(pixels(file), COLOURS)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64])
def test_tiffs_of_every_dtype(tmp_path, dtype):
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else (-25, 0)
    tifffile.imwrite(tmp_path / "x.tif", (low + RAMP * (float(high) - low)).clip(low, high).astype(dtype))
    assert_close(pixels(tmp_path / "x.tif"), RAMP)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64])
def test_tiffs_whose_white_is_zero(tmp_path, dtype):
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if np.issubdtype(dtype, np.integer) else (0, 1)
    values = (low + RAMP * (float(high) - low)).clip(low, high).astype(dtype)
    for pages in (values, np.stack([values] * 3)):
        tifffile.imwrite(tmp_path / "x.tif", pages, photometric="miniswhite")
        assert_close(pixels(tmp_path / "x.tif"), 1 - RAMP)
    opaque = np.full_like(values, high)
    options = {"photometric": "miniswhite", "extrasamples": ["unassalpha"], "planarconfig": "contig"}
    tifffile.imwrite(tmp_path / "x.tif", np.stack([values, opaque], -1), **options)
    assert_close(pixels(tmp_path / "x.tif"), 1 - RAMP)


def test_photometric_interpretations_that_are_not_known(tmp_path):
    deep, colours = (RAMP * 65535).astype(np.uint16), np.stack([np.arange(65536, dtype=np.uint16)] * 3)
    for name, values, options in (
        ("PALETTE", deep, {"colormap": colours}),
        ("PALETTE", (np.stack([RAMP] * 3) * 255).astype(np.uint8), {"colormap": colours[:, ::257]}),
        ("CIELAB", np.stack([deep] * 3, -1), {}),
        ("CFA", deep, {}),
    ):
        tifffile.imwrite(tmp_path / "x.tif", values, photometric=name, **options)
        assert refusal(tmp_path / "x.tif") == f"its photometric interpretation {name} is not known here"


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGBA"])
@pytest.mark.parametrize("orientation", [6, 7])
def test_raw_tiffs_on_their_side(tmp_path, mode, orientation):
    image = Image.fromarray((RAMP * (65535 if mode == "I;16" else 255)).astype(np.uint16 if ";" in mode else np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (image if mode in ("L", "I;16") else image.convert(mode)).save(tmp_path / "x.tif", exif=exif)
    expected = np.rot90(RAMP, -1) if orientation == 6 else RAMP[::-1, ::-1].T
    assert_close(pixels(tmp_path / "x.tif"), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiffs_of_tifffile_on_their_side(tmp_path, dtype):
    values = (COLOURS * (np.iinfo(dtype).max if np.issubdtype(dtype, np.integer) else 1)).astype(dtype)
    tifffile.imwrite(tmp_path / "x.tif", values, photometric="minisblack", extratags=[(274, "H", 1, 6, True)])
    assert_close(pixels(tmp_path / "x.tif"), np.rot90(COLOURS, -1, (1, 2)))
    tifffile.imwrite(
        tmp_path / "x.tif", np.moveaxis(values, 0, -1), photometric="rgb", extratags=[(274, "H", 1, 6, True)]
    )
    assert_close(pixels(tmp_path / "x.tif"), np.rot90(COLOURS, -1, (1, 2)))


def test_nodata_that_the_values_cannot_be(tmp_path):
    values = (RAMP * 65535).astype(np.uint16)
    for nodata in ("-9999", "nan", "65536", "1e400", "none"):
        tifffile.imwrite(tmp_path / "x.tif", values, extratags=[(42113, "s", 0, nodata, True)])
        assert_close(pixels(tmp_path / "x.tif"), RAMP)


def test_alpha_has_a_scale_of_its_own(tmp_path):
    options = {"photometric": "rgb", "extrasamples": ["unassalpha"]}
    for bits in (8, 12, 16):
        for opaque in (1, 255, 4095, 65535, 0):  # 0 everywhere is no alpha
            deep = np.stack([*COLOURS * (2**bits - 1), np.full_like(RAMP, opaque)], -1).astype(np.uint16)
            tifffile.imwrite(tmp_path / "x.tif", deep, **options)
            assert_close(pixels(tmp_path / "x.tif"), COLOURS)
            png_of_16_bits(tmp_path / "x.png", np.moveaxis(deep, -1, 0), 6)
            assert_close(pixels(tmp_path / "x.png"), COLOURS)


def test_alpha_that_hides_a_picture(tmp_path):
    for alpha, words in ((0, ""), (4, "laid on white by its alpha, it keeps 5 of its 192 levels")):
        picture = (np.stack([RAMP, RAMP, RAMP, np.full_like(RAMP, alpha / 255)], -1) * 255).round().astype(np.uint8)
        Image.fromarray(picture).save(tmp_path / "x.png")
        if words:
            assert refusal(tmp_path / "x.png") == words
        else:
            assert_close(pixels(tmp_path / "x.png"), RAMP)
    picture[:, :16, 3] = 255  # half of it is there
    Image.fromarray(picture).save(tmp_path / "x.png")
    assert_close(pixels(tmp_path / "x.png")[:, :, :16], RAMP[:, :16])


@pytest.mark.parametrize("compression", ["tiff_lzw", "jpeg"])
def test_pages_that_are_compressed(tmp_path, compression):
    pages = [Image.fromarray((RAMP * 255).astype(np.uint8))] * 2
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:], compression=compression)
    if find_spec("imagecodecs"):
        assert_close(pixels(tmp_path / "x.tif", 2), RAMP, levels=16)
    else:
        name = compression.removeprefix("tiff_").upper()
        assert refusal(tmp_path / "x.tif", 2) == (
            f"it has more than one page, and {name} needs the package imagecodecs: pip install 'mae_kernels[multiband]'"
        )


def test_one_nan_leaves_a_picture(tmp_path):
    values = RAMP.astype(np.float32)
    values[0, 0] = np.nan
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert_close(pixels(tmp_path / "x.tif"), RAMP)


def test_the_nodata_that_a_geotiff_names(tmp_path):
    values = (RAMP * 3000).astype(np.int16)
    values[:8] = -1
    for name, layers in (("one.tif", values), ("three.tif", np.stack([values] * 3))):
        tifffile.imwrite(tmp_path / name, layers, photometric="minisblack", extratags=[(42113, "s", 0, "-1", True)])
        ours = pixels(tmp_path / name)
        low, high = values[8:].min(), values[8:].max()
        assert (ours[:, :8] == 0).all()
        assert_close(ours[:, 8:], (values[8:] - low) / (high - low))


@pytest.mark.parametrize("layout", ["pages", "planes", "interleaved", "numpy CHW", "numpy HWC"])
def test_thirteen_bands(tmp_path, layout):
    file = tmp_path / ("x.npy" if "numpy" in layout else "x.tif")
    bands = (BANDS * 65535).astype(np.uint16)
    if layout == "numpy CHW":
        np.save(file, bands)
    elif layout == "numpy HWC":
        np.save(file, bands.transpose(1, 2, 0))
    elif layout == "interleaved":
        tifffile.imwrite(file, bands.transpose(1, 2, 0), photometric="minisblack", planarconfig="contig")
    else:
        options = {"planarconfig": "separate"} if layout == "planes" else {}
        tifffile.imwrite(file, bands, photometric="minisblack", **options)
    assert_close(pixels(file, 13), BANDS)
    for channels in (1, 3, 12):
        assert refusal(file, channels).endswith(f" channels, and the model takes {channels}")
        assert "13" in refusal(file, channels)


def test_no_channel_of_a_tiff_is_cut(tmp_path):
    four = np.stack([*COLOURS, RAMP])
    for extra in (1, 2):
        data = (np.stack([*COLOURS, *[RAMP] * extra]) * 255).astype(np.uint8).transpose(1, 2, 0)
        tifffile.imwrite(tmp_path / f"{extra}.tif", data, photometric="rgb", extrasamples=["unspecified"] * extra)
        assert refusal(tmp_path / f"{extra}.tif") == f"it has {3 + extra} channels, and the model takes 3"
    assert_close(pixels(tmp_path / "1.tif", 4), four)
    data = (four * 255).astype(np.uint8).transpose(1, 2, 0)
    tifffile.imwrite(tmp_path / "alpha.tif", data, photometric="rgb", extrasamples=["unassalpha"])
    assert_close(pixels(tmp_path / "alpha.tif"), 1 - (1 - COLOURS) * RAMP, levels=2)
    deep = (np.stack([RAMP, RAMP]) * 65535).astype(np.uint16).transpose(1, 2, 0)
    options = {"planarconfig": "contig", "extrasamples": ["unassalpha"]}
    tifffile.imwrite(tmp_path / "float.tif", data / 255, photometric="rgb", **options)
    tifffile.imwrite(tmp_path / "grey.tif", deep, photometric="minisblack", **options)
    assert_close(pixels(tmp_path / "float.tif"), 1 - (1 - COLOURS) * RAMP, levels=2)
    assert_close(pixels(tmp_path / "grey.tif"), 1 - (1 - RAMP) * RAMP, levels=2)
    tifffile.imwrite(tmp_path / "pages.tif", np.zeros((2, 16, 32, 3), np.uint8), photometric="rgb")
    assert refusal(tmp_path / "pages.tif") == "it has 6 channels, and the model takes 3"
    with tifffile.TiffWriter(tmp_path / "one by one.tif") as tiff:
        for band in (COLOURS * 65535).astype(np.uint16):
            tiff.write(band)
    assert_close(pixels(tmp_path / "one by one.tif"), COLOURS)
    with tifffile.TiffWriter(tmp_path / "dtypes.tif") as tiff:
        for dtype in (np.uint16, np.uint16, np.uint8):
            tiff.write(RAMP.astype(dtype))
    assert refusal(tmp_path / "dtypes.tif") == (
        "its pages are of different kinds: (16, 32) uint16 MINISBLACK NONE and (16, 32) uint8 MINISBLACK NONE"
    )
    with tifffile.TiffWriter(tmp_path / "sizes.tif") as tiff:
        tiff.write(np.zeros((16, 32), np.uint8))
        tiff.write(np.zeros((8, 16), np.uint8))
    assert refusal(tmp_path / "sizes.tif") == (
        "its pages are of different kinds: (16, 32) uint8 MINISBLACK NONE and (8, 16) uint8 MINISBLACK NONE"
    )


def test_overviews_of_a_tiff_are_no_channels(tmp_path):
    picture = (COLOURS * 255).astype(np.uint8).transpose(1, 2, 0)
    with tifffile.TiffWriter(tmp_path / "x.tif") as tiff:
        tiff.write(picture, photometric="rgb")
        tiff.write(picture[::2, ::2], photometric="rgb", subfiletype=1)
    assert_close(pixels(tmp_path / "x.tif"), COLOURS)


def test_without_tifffile_the_package_is_named(tmp_path, monkeypatch):
    tifffile.imwrite(tmp_path / "x.tif", (BANDS * 255).astype(np.uint8), photometric="minisblack")
    monkeypatch.setattr("mae.data.readers.tiff.tifffile", None)
    assert refusal(tmp_path / "x.tif", 13) == (
        "it has more than one page, which needs the package tifffile: pip install 'mae_kernels[multiband]'"
    )


def test_arrays_of_grey_and_colour(tmp_path):
    np.save(tmp_path / "grey.npy", RAMP)
    np.save(tmp_path / "colour.npy", (COLOURS * 255).astype(np.uint8))
    np.save(tmp_path / "last.npy", COLOURS.transpose(1, 2, 0).astype(np.float32))
    assert_close(pixels(tmp_path / "grey.npy"), RAMP)
    assert_close(pixels(tmp_path / "colour.npy"), COLOURS)
    assert_close(pixels(tmp_path / "last.npy"), COLOURS)
    assert_close(pixels(tmp_path / "last.npy", 1), np.tensordot([0.299, 0.587, 0.114], COLOURS, 1))


def test_arrays_that_are_no_pictures(tmp_path):
    for name, values, words in (
        ("either", np.zeros((3, 9, 3)), "its shape is (3, 9, 3): its first axis could be the channels"),
        ("axes", np.zeros((1, 3, 4, 4)), "its shape is (1, 3, 4, 4): it has 4 axes, not 2 or 3"),
        ("none", np.zeros((0, 4)), "it has no pixels: 0 x 4"),
        ("objects", np.array([[{}]]), "Array can't be memory-mapped: Python objects in dtype."),
    ):
        np.save(tmp_path / f"{name}.npy", values, allow_pickle=True)
        assert refusal(tmp_path / f"{name}.npy").startswith(words)


@pytest.mark.parametrize("suffix", ["avif", "jp2", "jfif", "webp", "tga"])
def test_formats_of_pillow(tmp_path, suffix):
    Image.fromarray((COLOURS * 255).astype(np.uint8).transpose(1, 2, 0)).save(tmp_path / f"x.{suffix}")
    assert np.abs(pixels(tmp_path / f"x.{suffix}") - 255 * COLOURS).mean() < 10


def test_too_many_pixels_are_refused_in_plain_words(tmp_path, recwarn, monkeypatch):
    Image.new("L", (30, 20), 7).save(tmp_path / "x.png")
    assert refusal(tmp_path / "x.png", max_pixels=599) == (
        "it has 600 pixels (30 x 20), more than the 599 of --max-pixels"
    )
    for theirs in (100, 400):  # Pillow refuses from twice its own limit on, and warns from once
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", theirs)
        assert (pixels(tmp_path / "x.png", max_pixels=600) == 7).all()
        assert vars(Image)["MAX_IMAGE_PIXELS"] == theirs
    assert not recwarn.list


def test_broken_files_print_nothing(tmp_path, capfd, recwarn):
    photo = Image.fromarray((COLOURS * 255).astype(np.uint8).transpose(1, 2, 0)).resize((64, 64))
    for compression in ("tiff_lzw", "jpeg", "tiff_adobe_deflate"):
        photo.save(tmp_path / f"{compression}.tif", compression=compression)
    photo.save(tmp_path / "x.jpg")
    photo.save(tmp_path / "x.png")
    for file in tmp_path.iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 3 : len(data) // 2] = b"\xff\x00\x17" * (len(data) // 18)
        file.write_bytes(data)
        try:
            read_image(file, Reading())
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017 (some are read all the same)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.jpg")
    assert refusal(tmp_path / "x.jpg") == "it is no regular file"


def test_readings_refuse_bad_options_and_travel_to_workers():
    for options, message in (
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"max_pixels": 0}, "max_pixels must be at least 1, got 0"),
        ({"value_range": (1, 1)}, "value_range must be two finite numbers in ascending order, got 1 and 1"),
        ({"value_range": (0, np.inf)}, "value_range must be two finite numbers in ascending order, got 0 and inf"),
    ):
        with pytest.raises(ValueError) as error:
            Reading(**options)
        assert str(error.value) == message
    reading = Reading(13, (0, 4095), 10)
    assert pickle.loads(pickle.dumps(reading)) == reading


def test_a_picture_is_an_array(tmp_path):
    pixels = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", 3)), pixels)
    assert np.asarray(read_image(tmp_path / "a.png", 1)).shape == (4, 6)
