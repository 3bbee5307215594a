"""Datasets of Hugging Face, made here: their rows are read as the files that they were made of."""

import pickle
import socket
import sys

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import tifffile
import torch
from pictures import good_folder, readable_oddities, unreadable_files
from PIL import Image
from test_clips import FRAMES, video
from test_readers import BANDS, COLOURS, RAMP, png_of_16_bits

from mae import MAEConfig, MaskedAutoencoder, save_checkpoint
from mae.commands.reconstruct import ReconstructConfig, reconstruct
from mae.data import (
    Batches,
    DataError,
    ImageFiles,
    Joined,
    Reading,
    TrainingImages,
    find_images,
    open_source,
    read_image,
    to_tensor,
)
from mae.data.readers import Stored

IMAGE = datasets.Features({"image": datasets.Image()})


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """A cache of its own, and no network."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()

    def connect(self, address, plain=socket.socket.connect):
        assert self.family == socket.AF_UNIX, "a test that reaches for the network"  # the other is that of workers
        return plain(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)


def table_of(files, features=IMAGE, name="image") -> datasets.Dataset:
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    return datasets.Dataset.from_dict({name: rows}, features=features)


def refusal(data: str) -> str:
    with pytest.raises(DataError) as error:
        open_source(data)
    return str(error.value)


def everything(folder):
    """Files of many kinds, broken ones among them."""
    good_folder(folder, 3)
    readable_oddities(folder)
    unreadable_files(folder)
    png_of_16_bits(folder / "deep colours.png", (COLOURS * 4095).astype(np.uint16), 2)
    np.save(folder / "x.npy", COLOURS)
    np.savez(folder / "x.npz", COLOURS)
    tifffile.imwrite(folder / "x.tif", (COLOURS * 65535).astype(np.uint16), photometric="minisblack")
    tifffile.imwrite(folder / "bands.tif", (BANDS * 255).astype(np.uint8), photometric="minisblack")
    deep = (COLOURS * 65535).astype(">u2").transpose(1, 2, 0).tobytes()
    (folder / "x.ppm").write_bytes(b"P6 32 16 65535\n" + deep)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((RAMP * 255).astype(np.uint8)).save(folder / "phone.jpg", exif=exif)
    return find_images(folder)


def what_is_read(source, index, reading):
    try:
        return to_tensor(source.read(index, reading)).tolist()
    except DataError as error:
        return str(error).rsplit(": ", 1)[1]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", ["parquet", "saved", "splits", "arrow"])
def test_rows_are_read_as_their_files_are(tmp_path, layout, channels):
    files = everything(tmp_path / "files")
    table, place = table_of(files), tmp_path / "set"
    if layout == "parquet":
        (place / "data").mkdir(parents=True)
        table.to_parquet(place / "data" / "train-00000-of-00001.parquet")
    elif layout == "arrow":
        table.save_to_disk(tmp_path / "saved")
        place = next((tmp_path / "saved").glob("*.arrow"))
    else:
        (datasets.DatasetDict(train=table) if layout == "splits" else table).save_to_disk(place)
    ours, theirs, reading = open_source(f"hf:{place}"), ImageFiles(files), Reading(channels)
    assert len(ours) == len(theirs) == 19
    read = [what_is_read(ours, i, reading) for i in range(len(files))]
    assert read == [what_is_read(theirs, i, reading) for i in range(len(files))]
    assert sum(isinstance(x, str) for x in read) == 5  # of bands.tif and the four broken ones
    again = pickle.loads(pickle.dumps(ours))
    assert what_is_read(again, 3, reading) == read[3]
    assert ours.name(3) == f"row 3 of hf:{place}, {files[3].name}"


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp4", "gif", "npy"])
def test_bytes_are_read_as_their_files_are(tmp_path, suffix):
    file, reading = tmp_path / f"x.{suffix}", Reading(1, image_size=(4, 16, 16))
    if suffix in ("wav", "flac"):
        soundfile.write(file, np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
        reading = Reading(1, image_size=(16, 32))
    elif suffix == "mp4":
        video(file, FRAMES)
    elif suffix == "gif":
        frames = [Image.fromarray(frame) for frame in FRAMES]
        frames[0].save(file, save_all=True, append_images=frames[1:])
    else:
        np.save(file, FRAMES)
    ours = read_image(Stored(file.read_bytes(), "x"), reading)
    assert torch.equal(to_tensor(ours), to_tensor(read_image(file, reading)))


def test_what_cannot_be_read_names_its_row(tmp_path):
    broken, elsewhere = {"bytes": b"nothing", "path": "a/b\n.jpg"}, {"bytes": None, "path": str(tmp_path / "c.png")}
    pq.write_table(pa.table({"image": pa.array([None, broken, elsewhere])}), tmp_path / "x.parquet")
    source, said = open_source(f"hf:{tmp_path / 'x.parquet'}"), []
    for index in range(3):
        with pytest.raises(DataError) as error:
            source.read(index, Reading())
        said.append(str(error.value).replace(str(tmp_path), "T"))
    assert said == [
        "cannot read row 0 of hf:T/x.parquet: it holds no file",
        "cannot read row 1 of hf:T/x.parquet, a/b\\n.jpg: it is not in a format that Pillow reads",
        "cannot read row 2 of hf:T/x.parquet, T/c.png: No such file or directory",
    ]
    assert source.name(0) == f"row 0 of hf:{tmp_path / 'x.parquet'}"
    good_folder(tmp_path, 2)
    Image.open(tmp_path / "photo_01.png").save(tmp_path / "c.png")  # a row may say where its file lies
    assert torch.equal(
        to_tensor(source.read(2, Reading())), to_tensor(read_image(tmp_path / "photo_01.png", Reading()))
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_a_dataset_are_those_of_its_folder(tmp_path, workers):
    good_folder(tmp_path / "files", 7)
    bad = unreadable_files(tmp_path / "files")
    files = find_images(tmp_path / "files")
    table_of(files).to_parquet(tmp_path / "x.parquet")

    def run(source):
        batches = Batches(TrainingImages(source, Reading(image_size=(16, 16))), 4, range(4), workers=workers)
        return torch.stack([batch.to("cpu").images for batch in batches]), batches.unreadable

    (ours, problems), (theirs, expected) = run(open_source(f"hf:{tmp_path / 'x.parquet'}")), run(ImageFiles(files))
    assert torch.equal(ours, theirs)
    assert len(problems) == len(expected) == len(bad)


def test_columns(tmp_path):
    file = good_folder(tmp_path / "files", 1) / "photo_00.jpg"
    pixels = to_tensor(read_image(file, Reading()))
    data, held = file.read_bytes(), {"bytes": file.read_bytes(), "path": None}
    two = datasets.Features({"image": datasets.Image(), "mask": datasets.Image(), "n": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"image": [held], "mask": [held], "n": [1]}, features=two)
    table.to_parquet(tmp_path / "2.parquet")
    where = f"hf:{tmp_path / '2.parquet'}"
    assert refusal(where) == f"{where} has several columns of files: image, mask; choose one with {where}:column=image"
    assert refusal(f"{where}:column=n") == f"column n of {where}:column=n holds no files"
    assert refusal(f"{where}:column=x") == f"{where}:column=x has no column x, but image, mask, n"
    assert refusal(f"{where}:train:rows=3") == f"{where}:train:rows=3: rows= is neither split= nor column= nor config="
    for column in ("image", "mask"):
        assert torch.equal(to_tensor(open_source(f"{where}:column={column}").read(0, Reading())), pixels)
    plain = {
        "bytes": pa.table({"anything": pa.array([data], pa.large_binary()), "n": [1]}),
        "struct": pa.table({"img": pa.array([{"bytes": data, "path": None}]), "n": [1]}),
        "none": pa.table({"n": [1], "name": ["a"]}),
    }
    for name, table in plain.items():
        pq.write_table(table, tmp_path / f"{name}.parquet")
    for name in ("bytes", "struct"):
        assert torch.equal(to_tensor(open_source(f"hf:{tmp_path / name}.parquet").read(0, Reading())), pixels)
    where = f"hf:{tmp_path / 'none.parquet'}"
    assert refusal(where) == f"{where} has no column of images, but n, name"


def test_sounds_and_videos_are_columns_where_there_are_no_images(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.random.default_rng(0).normal(0, 0.1, 16_000), 16_000)
    rows = pa.table({"sound": pa.array([{"bytes": (tmp_path / "x.wav").read_bytes(), "path": "x.wav"}])})
    table = datasets.Dataset(rows, datasets.DatasetInfo(features=datasets.Features({"sound": datasets.Audio()})))
    table.save_to_disk(tmp_path / "set")
    source, reading = open_source(f"hf:{tmp_path / 'set'}"), Reading(1, image_size=(16, 32))
    assert torch.equal(to_tensor(source.read(0, reading)), to_tensor(read_image(tmp_path / "x.wav", reading)))


def test_splits(tmp_path):
    files = find_images(good_folder(tmp_path / "files", 5))
    splits = {"train": table_of(files), "test": table_of(files[:2])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    splits["train"].save_to_disk(tmp_path / "one")
    for name, table in splits.items():
        table.to_parquet(tmp_path / "parquet" / f"{name}.parquet")
    for spec, count in (
        ("dict", 5), ("dict:test", 2), ("dict:split=test", 2), ("one", 5), ("parquet", 5), ("parquet:test", 2),
        ("parquet:train[1:3]", 2), ("parquet/test.parquet", 2), ("parquet/test.parquet:train[:1]", 1),
    ):  # fmt: skip
        assert len(open_source(f"hf:{tmp_path / spec}")) == count, spec
    assert open_source(f"hf:{tmp_path}/parquet:train[1:3]").name(0).endswith(", photo_01.png")
    where = f"hf:{tmp_path}/parquet:train[:0]"
    assert refusal(where) == f'cannot open {where}: Instruction "train[:0]" corresponds to no data!'
    assert refusal(f"hf:{tmp_path}/dict:valid") == f"{tmp_path}/dict holds no split valid, but train, test"
    assert refusal(f"hf:{tmp_path}/one:test") == f"{tmp_path}/one holds one dataset without splits, so none is test"
    assert refusal(f"hf:{tmp_path}/parquet:valid").startswith(
        f'cannot open hf:{tmp_path}/parquet:valid: Unknown split "valid".'
    )


def test_what_is_no_dataset_is_refused(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    for name in ("set.py", "other.py"):
        (tmp_path / "set" / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        assert refusal(f"hf:{tmp_path / 'set'}") == (
            f"cannot open hf:{tmp_path / 'set'}: it holds the script {name}, and scripts are never run"
        )
        (tmp_path / "set" / name).unlink()
    assert not (tmp_path / "ran").exists()
    assert refusal(f"hf:{tmp_path}/gone") == f"there is no file or folder {tmp_path}/gone"
    (tmp_path / "x.csv").touch()
    assert refusal(f"hf:{tmp_path}/x.csv") == f"{tmp_path}/x.csv is neither a folder nor a .parquet or .arrow file"
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    assert refusal(f"hf:{tmp_path}/x.parquet").startswith(f"cannot open hf:{tmp_path}/x.parquet: Parquet magic bytes ")
    assert refusal("hf:nobody/nothing").startswith("cannot open hf:nobody/nothing: Couldn't reach 'nobody/nothing' ")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    assert refusal("hf:nobody/nothing") == "datasets 3.6.0 may run scripts; only from 4 on there are none"
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal("hf:nobody/nothing") == (
        "hf:nobody/nothing needs the package datasets: pip install 'mae_kernels[datasets]'"
    )


def test_a_format_that_was_saved_with_the_rows_changes_nothing(tmp_path):
    files = find_images(good_folder(tmp_path / "files", 1))
    table = table_of(files).add_column("n", [1])
    table.with_format("numpy", columns=["n"]).save_to_disk(tmp_path / "set")
    ours = open_source(f"hf:{tmp_path / 'set'}").read(0, Reading())
    assert torch.equal(to_tensor(ours), to_tensor(read_image(files[0], Reading())))


def test_fingerprints(tmp_path):
    good_folder(tmp_path / "a", 3)
    good_folder(tmp_path / "b" / "deep", 3)
    (tmp_path / "b" / "deep").rename(tmp_path / "moved")
    prints = [open_source(tmp_path / name).fingerprint() for name in ("a", "moved", "b/../a")]
    assert prints == [prints[0]] * 3
    assert ImageFiles(find_images(tmp_path / "a"), tmp_path).fingerprint() != prints[0]
    files = find_images(tmp_path / "a")
    assert ImageFiles(files[::-1], tmp_path / "a").fingerprint() != prints[0]
    table_of(files).save_to_disk(tmp_path / "set")
    table_of(files).to_parquet(tmp_path / "x.parquet")
    table_of(files[::-1]).save_to_disk(tmp_path / "other")
    table_of([*files, files[0]]).save_to_disk(tmp_path / "more")
    rows = [open_source(f"hf:{tmp_path / name}").fingerprint() for name in ("set", "x.parquet", "other", "more")]
    assert rows[0] == rows[1]
    assert len(set(rows)) == 3
    contents = [b"%d" % i for i in range(130)]
    several = (contents, contents[:101] + contents[:1] + contents[102:], [b""] * 128, [b""] * 129)
    for i, column in enumerate(several):
        pq.write_table(pa.table({"bytes": column}), tmp_path / f"{i}.parquet")
    assert len({open_source(f"hf:{tmp_path}/{i}.parquet").fingerprint() for i in range(4)}) == 4
    part = open_source(tmp_path / "a")
    assert Joined([part]).fingerprint() != Joined([part, part]).fingerprint()


def test_sources_one_after_another(tmp_path):
    files = find_images(good_folder(tmp_path, 5))
    joined = Joined([ImageFiles(files[:2]), ImageFiles(files[2:])])
    assert [joined.name(i) for i in range(len(joined))] == [str(file) for file in files]
    assert torch.equal(to_tensor(joined.read(4, Reading())), to_tensor(read_image(files[4], Reading())))
    with pytest.raises(IndexError):
        joined.name(5)


def test_a_dataset_is_reconstructed(tmp_path):
    model = MaskedAutoencoder(MAEConfig(image_size=32, patch_size=16, embed_dim=24, depth=1, num_heads=2,
                                        decoder_embed_dim=24, decoder_depth=1, decoder_num_heads=2))  # fmt: skip
    save_checkpoint(model, tmp_path / "run")
    table_of(find_images(good_folder(tmp_path / "files", 3))).to_parquet(tmp_path / "x.parquet")
    for images, out in (
        ((f"hf:{tmp_path}/x.parquet",), "rows.png"),
        ((str(tmp_path / "files"),), "files.png"),
        ((f"hf:{tmp_path}/x.parquet:train[:1]", *map(str, find_images(tmp_path / "files")[1:])), "both.png"),
    ):
        reconstruct(ReconstructConfig(tmp_path / "run", images, tmp_path / out, device="cpu"))
    pictures = [(tmp_path / name).read_bytes() for name in ("rows.png", "files.png", "both.png")]
    assert pictures == [pictures[0]] * 3
