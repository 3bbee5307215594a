"""JPEGs that simplejpeg decodes have the pixels that Pillow gives them, and Pillow has those that it cannot."""

import io
import pickle

import numpy as np
import pytest
import simplejpeg
from pictures import photographs
from PIL import Image, ImageOps
from sklearn.datasets import load_sample_image

from mae.data import DataError, Picture, Reading, Wanted, read_image, resize_and_crop, to_tensor
from mae.data.readers import Stored

FAST = "mae.data.readers.jpeg.simplejpeg"


@pytest.fixture
def calls(monkeypatch):
    """What simplejpeg has decoded."""
    shapes = []

    class Recorder:
        @staticmethod
        def decode_jpeg(data, colours):
            pixels = simplejpeg.decode_jpeg(data, colours)
            shapes.append(pixels.shape)
            return pixels

    monkeypatch.setattr(FAST, Recorder)
    return shapes


def encoded(image: Image.Image, **options) -> Stored:
    stream = io.BytesIO()
    image.save(stream, "JPEG", **options)
    return Stored(stream.getvalue(), "x.jpg")


def both(file: Stored, reading: Reading, monkeypatch, wanted: Wanted | None = None) -> tuple[Picture, Picture]:
    ours = read_image(file, reading, wanted)
    with monkeypatch.context() as without:
        without.setattr(FAST, None)
        return ours, read_image(file, reading, wanted)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(640, 427), (333, 201), (17, 9), (1, 1)])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pixels_are_equal(calls, monkeypatch, mode, size, channels):
    photo = Image.fromarray(load_sample_image("china.jpg")).resize(size).convert(mode)
    for options in (
        {"quality": 95, "subsampling": 0}, {"quality": 75, "subsampling": 1}, {"quality": 30, "subsampling": 2},
        {"progressive": True}, {"optimize": True, "restart_marker_rows": 1}, {"keep_rgb": True},
    ):  # fmt: skip
        file = encoded(photo, **options)
        ours, theirs = both(file, Reading(channels), monkeypatch)
        assert np.array_equal(to_tensor(ours), to_tensor(theirs)), options
        assert (ours.height, ours.width) == (theirs.height, theirs.width) == size[::-1]
    assert len(calls) == 6


def test_what_is_done_with_a_picture_does_not_depend_on_who_decoded_it(calls, monkeypatch):
    file, box = encoded(photographs(1)[0]), (13, 7, 120, 99)
    for channels in (1, 3):
        ours, theirs = both(file, Reading(channels), monkeypatch)
        for done in (
            lambda x: x.cut(box, 1),
            lambda x: x.cut(box, 2),
            lambda x: resize_and_crop(x, (40, 50)),
            lambda x: pickle.loads(pickle.dumps(x)),
        ):
            assert np.array_equal(to_tensor(done(ours)), to_tensor(done(theirs)))
            assert np.array_equal(np.asarray(done(ours)), np.asarray(done(theirs)))
        assert (ours.cut(box, 1).height, ours.cut(box, 1).width) == (92, 107)
    ours, theirs = both(file, Reading(value_range=(10, 200)), monkeypatch)
    assert np.array_equal(to_tensor(ours), to_tensor(theirs))
    assert len(calls) == 3


def test_pictures_that_are_left_to_pillow(calls, tmp_path):
    photo = photographs(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(tmp_path / "two.mpo", save_all=True, append_images=[photo.rotate(180)])
    cases = {
        "sideways": encoded(photo, exif=exif),
        "ink": encoded(photo.convert("CMYK")),
        "two": Stored((tmp_path / "two.mpo").read_bytes(), "x.mpo"),
    }
    for name, file in cases.items():
        ours = to_tensor(read_image(file, Reading()))
        with Image.open(file.open()) as image:
            theirs = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        assert np.array_equal(ours, theirs.transpose(2, 0, 1)), name
    assert to_tensor(read_image(cases["sideways"], Reading())).shape == (3, 160, 120)
    with pytest.raises(DataError, match=r"it has 1 frame, and the model takes 2$"):
        read_image(encoded(photo), Reading(image_size=(2, 8, 8)))
    with pytest.raises(DataError, match=r"it has 3 channels, and the model takes 4$"):
        read_image(encoded(photo), Reading(4))
    assert calls == [(120, 160, 3)]  # for the model of four channels


@pytest.mark.parametrize("part", [0.1, 0.3, 0.9])
def test_truncated_files_are_refused_as_they_were(monkeypatch, part):
    whole, said = encoded(photographs(1)[0]).held, []
    file = Stored(whole[: int(part * len(whole))], "x.jpg")
    for fast in (simplejpeg, None):
        monkeypatch.setattr(FAST, fast)
        with pytest.raises(DataError) as error:
            read_image(file, Reading())
        said.append(str(error.value))
    assert said[0] == said[1]
    assert said[0].startswith("cannot read x.jpg: ")


def test_damage_that_pillow_reads_over_is_read_over(monkeypatch):
    data = bytearray(encoded(photographs(1)[0], quality=90).held)
    data[-400:-380] = b"\xff\x00" * 10
    ours, theirs = both(Stored(bytes(data), "x.jpg"), Reading(), monkeypatch)
    assert np.array_equal(to_tensor(ours), to_tensor(theirs))


def test_too_many_pixels_are_refused_before_they_are_decoded(calls):
    with pytest.raises(DataError) as error:
        read_image(encoded(photographs(1)[0]), Reading(max_pixels=19_199))
    assert str(error.value) == (
        "cannot read x.jpg: it has 19,200 pixels (160 x 120), more than the 19,199 of --max-pixels"
    )
    assert calls == []


@pytest.mark.parametrize("size", [(160, 120), (161, 121), (500, 375)])
@pytest.mark.parametrize(("factor", "taken"), [(2, 2), (3, 2), (4, 4), (7, 4), (8, 8), (30, 8)])
def test_a_jpeg_that_may_be_shrunk_is_decoded_at_a_fraction(calls, monkeypatch, size, factor, taken):
    """Of any sides, odd ones too."""
    file = encoded(Image.fromarray(load_sample_image("flower.jpg")).resize(size))
    ours, theirs = both(file, Reading(), monkeypatch, Wanted(lambda height, width: factor))
    assert (ours.width, ours.height) == tuple(-(-side // taken) for side in size)
    assert np.array_equal(to_tensor(ours), to_tensor(theirs))
    assert calls == []


def test_tiny_pictures_that_may_be_shrunk():
    file = encoded(Image.new("RGB", (3, 1), "red"))
    assert read_image(file, Reading(), Wanted(lambda height, width: 8)).width in (1, 2, 3)
