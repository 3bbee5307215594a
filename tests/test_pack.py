"""Folders packed into datasets: what others load, what training reads, and what is there when packing is stopped."""

import io
import multiprocessing
import os
import signal
import sys

import datasets
import numpy as np
import pytest
import torch
from pictures import good_folder, photographs, unreadable_files
from PIL import Image, ImageOps
from scipy.io import wavfile
from test_hugging_face import alone  # noqa: F401 (a fixture)
from test_readers import COLOURS, png_of_16_bits

from mae.__main__ import main
from mae.data import DataError, ImageFiles, Reading, find_images, open_source, read_image, to_tensor
from mae.data.pack import Packing, pack
from mae.data.readers import Stored


def packed(tmp_path, *options: str) -> datasets.Dataset:
    main(["pack", "--data", str(tmp_path / "files"), "--out", str(tmp_path / "out"), *options])
    return datasets.load_dataset(str(tmp_path / "out"), split="train")


def visible(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("workers", ["0", "2"])
def test_raw_images_are_the_pixels_of_the_folder(tmp_path, workers):
    files = find_images(good_folder(tmp_path / "files" / "deep", 7))
    table = packed(tmp_path, "--format", "raw", "--workers", workers)
    assert visible(tmp_path / "out") == ["data/train-00000-of-00001.parquet"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert table.features == datasets.Features({"image": datasets.Image(), "path": datasets.Value("string")})
    assert table["path"][:] == [f"deep/{file.name}" for file in files]
    source = open_source(f"hf:{tmp_path / 'out'}")
    for i, file in enumerate(files):
        whole = read_image(file, Reading())  # 120 x 160, never enlarged
        assert np.array_equal(np.asarray(table[i]["image"]), np.asarray(whole))
        assert torch.equal(to_tensor(source.read(i, Reading())), to_tensor(whole))


def test_images_are_resized_and_never_enlarged(tmp_path):
    photo, folder = photographs(1)[0], tmp_path / "files"
    folder.mkdir()
    photo.save(folder / "a.png")
    photo.resize((900, 1203)).save(folder / "b.png")
    photo.resize((50, 20)).save(folder / "c.png")
    table = packed(tmp_path, "--format", "raw", "--short-side", "60")
    assert [image.size for image in table["image"]] == [(80, 60), (60, 80), (50, 20)]
    assert np.array_equal(table[0]["image"], photo.resize((80, 60), Image.Resampling.BICUBIC))


def test_jpegs_are_of_the_quality_and_large_ones_are_shrunk_with_enough_to_resize(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    scene = photographs(2)[1].resize((1601, 1201), Image.Resampling.BICUBIC)
    scene.save(folder / "a.jpg", quality=97)
    table, expected = packed(tmp_path, "--short-side", "100"), scene.resize((133, 100), Image.Resampling.BICUBIC)
    image = table[0]["image"]
    assert image.format == "JPEG"
    assert image.size == (133, 100)
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).mean() < 3
    same = io.BytesIO()
    image.save(same, "JPEG", quality=92)
    assert Image.open(same).quantization == image.quantization
    worse = packed(tmp_path, "--short-side", "100", "--quality", "30", "--overwrite")[0]["image"]
    assert max(worse.quantization[0]) > 3 * max(image.quantization[0])
    shrunk = [Packing(100).wanted.shrink(*sides) for sides in ((1201, 1601), (399, 900), (400, 900), (90, 90))]
    assert shrunk == [6, 1, 2, 1]


def test_labels_are_sub_folders(tmp_path):
    good_folder(tmp_path / "files" / "cat", 2)
    good_folder(tmp_path / "files" / "ant", 1)
    table = packed(tmp_path, "--labels")
    assert table.features["label"].names == ["ant", "cat"]
    assert table["label"][:] == [0, 1, 1]
    assert table["path"][:] == ["ant/photo_00.jpg", "cat/photo_00.jpg", "cat/photo_01.png"]
    with pytest.raises(SystemExit) as stop:
        main(["pack", "--data", str(tmp_path / "files" / "cat"), "--out", str(tmp_path / "other"), "--labels"])
    assert stop.value.code.endswith("cat must hold one sub-folder of images per class, and holds no sub-folder")


def test_labels_stay_with_their_images_where_files_are_passed_over(tmp_path, capsys):
    for i, name in enumerate(("a", "b", "c")):
        bad = unreadable_files(tmp_path / "files" / name)
        Image.new("L", (4, 4), i).save(tmp_path / "files" / name / "x.png")
    table = packed(tmp_path, "--labels", "--format", "raw", "--in-chans", "1")
    assert [(np.asarray(row["image"]).max(), row["label"], row["path"]) for row in table] == [
        (0, 0, "a/x.png"), (1, 1, "b/x.png"), (2, 2, "c/x.png"),
    ]  # fmt: skip
    output = capsys.readouterr()
    assert f"{3 * len(bad)} of {3 * len(bad) + 3} files cannot be read; first: cannot read {tmp_path}" in output.err
    assert f"Packed 3 images, 3 classes into 1 file of 0.0 MB in all, in {tmp_path / 'out'}." in output.out


def test_deep_and_turned_pictures_are_packed_as_they_are_read(tmp_path, capsys):
    (tmp_path / "files").mkdir()
    png_of_16_bits(tmp_path / "files" / "a.png", (COLOURS * 4095).astype(np.uint16), 2)
    exif = Image.Exif()
    exif[0x0112] = 6
    photographs(1)[0].save(tmp_path / "files" / "b.png", exif=exif)
    table = packed(tmp_path, "--format", "raw")
    for i, file in enumerate(find_images(tmp_path / "files")):
        assert np.array_equal(table[i]["image"], np.asarray(read_image(file, Reading()))), file
    assert np.array_equal(table[1]["image"], ImageOps.exif_transpose(Image.open(tmp_path / "files" / "b.png")))
    assert "1 picture scaled each by its own range of values" in capsys.readouterr().err


def test_datasets_are_packed_too(tmp_path):
    files = find_images(good_folder(tmp_path / "files", 3))
    packed(tmp_path, "--format", "raw")
    main(["pack", "--data", f"hf:{tmp_path / 'out'}", "--out", str(tmp_path / "again"), "--format", "raw"])
    table = datasets.load_dataset(str(tmp_path / "again"), split="train")
    assert table["path"][0] == f"row 0 of hf:{tmp_path / 'out'}, photo_00.jpg"
    assert np.array_equal(table[1]["image"], np.asarray(read_image(files[1], Reading())))


def test_names_that_are_no_text(tmp_path):
    folder = good_folder(tmp_path / "files", 1)
    (folder / "photo_00.jpg").rename(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg"))
    assert packed(tmp_path)["path"][:] == ["caf\\xe9.jpg"]


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr("mae.data.pack._SHARD", 100_000)  # of which an image takes 57,654
    files = find_images(good_folder(tmp_path / "files", 5))
    table = packed(tmp_path, "--format", "raw")
    assert visible(tmp_path / "out") == [f"data/train-0000{i}-of-00003.parquet" for i in range(3)]
    assert table["path"][:] == [file.name for file in files]


class Stops:
    """A folder of which one file stops the process that reads it."""

    def __init__(self, files, at: int, stop):
        self.files, self.at, self.stop = ImageFiles(files), at, stop

    def __len__(self):
        return len(self.files)

    def name(self, index):
        return self.files.name(index)

    def read(self, index, reading, wanted=None):
        if index == self.at:
            self.stop()
        return self.files.read(index, reading, wanted)


def interrupt():
    raise KeyboardInterrupt


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_is_stopped_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("mae.data.pack._SHARD", 1)
    good_folder(tmp_path / "files", 20)
    files, out = find_images(tmp_path / "files"), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pack(Stops(files, 18, interrupt), out, Packing(), Reading())
    assert [path.name for path in tmp_path.iterdir()] == ["files"]
    process = multiprocessing.get_context("fork").Process(
        target=pack, args=(Stops(files, 18, kill), out, Packing(), Reading())
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert visible(tmp_path / ".out.packing")  # of the files that it had written by then
    assert not out.exists()
    with pytest.raises(DataError, match=r"^there is no file or folder "):
        open_source(f"hf:{out}")
    assert pack(ImageFiles(files), out, Packing(), Reading()).images == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["files", "out"]
    whole = visible(out)
    with pytest.raises(KeyboardInterrupt):
        pack(Stops(files, 18, interrupt), out, Packing(), Reading(), overwrite=True)
    assert visible(out) == whole
    with pytest.raises(DataError) as error:
        pack(Stops(files, 18, kill), out, Packing(), Reading(), overwrite=True, workers=1)
    assert str(error.value) == (
        "one of 1 worker process was killed, as the system does where memory runs out; take fewer --workers"
    )
    assert visible(out) == whole


def test_folders_that_hold_something_are_refused(tmp_path):
    good_folder(tmp_path / "files", 1)
    source, out = ImageFiles(find_images(tmp_path / "files")), tmp_path / "out"
    (out / "data").mkdir(parents=True)  # of an empty folder nothing is lost
    pack(source, out, Packing(), Reading())

    def refusal(**options) -> str:
        with pytest.raises(DataError) as error:
            pack(source, out, Packing(), Reading(), **options)
        return str(error.value)

    assert refusal() == f"{out} holds files already; choose another --out, or add --overwrite"
    pack(source, out, Packing(), Reading(), overwrite=True)
    (out / "thesis.txt").touch()
    assert refusal(overwrite=True) == (
        f"{out} holds other files than a packed dataset, such as {out / 'thesis.txt'}; choose another --out"
    )
    out = tmp_path / "files" / "photo_00.jpg"
    assert refusal() == f"{out} is a file, not a folder"


def test_two_processes_do_not_pack_into_one_folder(tmp_path):
    source, out = ImageFiles(find_images(good_folder(tmp_path / "files", 2))), tmp_path / "out"

    def second():
        with pytest.raises(DataError) as error:
            pack(source, out, Packing(), Reading())
        assert str(error.value) == f"another process packs into {out}"

    assert pack(Stops(source.files, 1, second), out, Packing(), Reading()).images == 2


def test_what_cannot_be_packed(tmp_path, monkeypatch):
    folder = tmp_path / "files"
    unreadable_files(folder)
    with pytest.raises(SystemExit) as stop:
        packed(tmp_path)
    assert stop.value.code.startswith("mae: none of the 4 files can be read; first: cannot read ")
    with pytest.raises(DataError) as error:
        pack(ImageFiles(find_images(folder)[:1]), tmp_path / "out", Packing(), Reading())
    assert str(error.value).startswith("no image can be read; first: cannot read ")
    Image.new("RGB", (70_000, 2)).save(folder / "long.png")
    with pytest.raises(DataError, match=r"^no image can be read; first: cannot pack .*long\.png: "):
        pack(ImageFiles([folder / "long.png"]), tmp_path / "out", Packing(), Reading())
    for option, words in (
        ("--short-side 8", "short_side must be a whole number of 16 to 4096, got 8"),
        ("--quality 101", "quality must be a whole number of 1 to 100, got 101"),
        ("--workers -1", "workers must be a whole number from 0 on, got -1"),
    ):
        with pytest.raises(SystemExit) as stop:
            packed(tmp_path, *option.split())
        assert stop.value.code == f"mae: {words}"
    good_folder(folder, 1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit) as stop:
        main(["pack", "--data", str(folder), "--out", str(tmp_path / "out")])
    assert stop.value.code == "mae: pack needs the package datasets: pip install 'mae_kernels[datasets]'"


def test_sound_is_no_picture(tmp_path):
    (tmp_path / "files").mkdir()
    noise = np.random.default_rng(0).normal(0, 3000, 40_000).astype(np.int16)
    wavfile.write(tmp_path / "files" / "x.wav", 16_000, noise)
    with pytest.raises(SystemExit) as stop:
        packed(tmp_path, "--in-chans", "1")
    assert stop.value.code == (
        f"mae: no image can be read; first: cannot pack {tmp_path / 'files' / 'x.wav'}: it is sound"
    )


def test_raw_keeps_every_value():
    pixels = np.random.default_rng(0).integers(0, 256, (33, 47, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    for channels in (1, 3):
        picture = read_image(Stored(stream.getvalue(), "x"), Reading(channels))
        again = read_image(Stored(Packing(format="raw").encoded(picture), "x"), Reading(channels))
        assert torch.equal(to_tensor(again), to_tensor(picture))
