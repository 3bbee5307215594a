"""Reading what people have in their folders."""

import multiprocessing
import os
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import good_folder, photographs, readable_oddities, unreadable_files
from PIL import Image

from mae.data import (
    Batch,
    Batches,
    Crops,
    DataError,
    DataWarning,
    ImageFiles,
    Order,
    Picture,
    Reading,
    TensorImages,
    TrainingImages,
    find_images,
    find_labelled_images,
    on_device,
    printable,
    random_box,
    read_image,
    read_pictures,
    resize_and_crop,
    to_tensor,
)
from mae.data.randomness import derived_seed, permutation, uniform
from mae.data.readers import suffixes
from mae.data.workers import ignore_signals
from mae_kernels import random_crop_boxes, random_resized_crop, reference


def test_finds_images_below_a_folder(tmp_path):
    good_folder(tmp_path / "b", 3)
    good_folder(tmp_path / "a" / "deep", 2)
    (tmp_path / "a" / ".hidden.png").touch()
    good_folder(tmp_path / "a" / ".thumbs", 2)
    names = [str(f.relative_to(tmp_path)) for f in find_images(tmp_path)]
    assert names == [
        "a/deep/photo_00.jpg",
        "a/deep/photo_01.png",
        "b/photo_00.jpg",
        "b/photo_01.png",
        "b/photo_02.webp",
    ]


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path):
    good_folder(tmp_path / "elsewhere", 2)
    good_folder(tmp_path / "data" / "b", 1)
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "b" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "one.png").symlink_to(tmp_path / "elsewhere" / "photo_01.png")
    names = [str(f.relative_to(tmp_path / "data")) for f in find_images(tmp_path / "data")]
    assert names == ["a/photo_00.jpg", "a/photo_01.png", "b/photo_00.jpg", "one.png"]


def test_what_is_left_out_is_counted(tmp_path):
    good_folder(tmp_path, 1)
    for name in ("a.txt", "b.TXT", "c.exe", "README", "d.fits"):
        (tmp_path / name).touch()
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle.jpg").symlink_to(tmp_path / "circle.jpg")
    os.mkfifo(tmp_path / "x.jpg")
    with pytest.warns(DataWarning) as warned:
        assert [f.name for f in find_images(tmp_path)] == ["photo_00.jpg"]
    (message,) = (str(w.message) for w in warned)
    assert message == (
        f"{tmp_path}: left out 2 .txt files, 1 .exe file, 1 .fits file, 2 broken links, 1 file without a suffix and 1 "
        "special file (a FIFO, socket or device)"
    )
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mpg").touch()
    with pytest.raises(DataError, match=r"other suffixes; left out 1 \.mpg file$"):
        find_images(tmp_path / "films")


def test_packages_that_files_wait_for_are_named(tmp_path, monkeypatch):
    for name in ("a.mp4", "b.mkv", "c.flac"):
        (tmp_path / name).touch()
    monkeypatch.setattr("mae.data.readers.video.av", None)
    monkeypatch.setattr("mae.data.readers.sound.soundfile", None)
    suffixes.cache_clear()
    try:
        with pytest.raises(DataError) as error:
            find_images(tmp_path)
    finally:
        suffixes.cache_clear()
    assert str(error.value).endswith(
        "; left out 1 .flac file, 1 .mkv file and 1 .mp4 file; some need the package av: pip install "
        "'mae_kernels[video]'; some need the package soundfile: pip install 'mae_kernels[audio]'"
    )


def test_suffixes_are_those_that_can_be_read():
    assert {".jpg", ".jfif", ".avif", ".jp2", ".tif", ".tiff", ".npy", ".npz", ".wav", ".webp", ".png"} <= suffixes()
    assert not {".mpg", ".h5", ".grib", ".fits", ".wmf", ".txt", ""} & suffixes()


def test_names_are_printed_in_visible_characters():
    assert printable("Straße 7.jpg") == "Straße 7.jpg"
    assert printable("\x1b[2J\n\u202egpj.exe") == "\\x1b[2J\\n\\u202egpj.exe"
    assert printable(os.fsdecode(b"caf\xe9.jpg")) == "caf\\xe9.jpg"


def test_messages_hold_no_raw_names(tmp_path):
    folder = tmp_path / "\x1b[31m\n"
    for action in (lambda: find_images(folder), lambda: read_image(folder / "x\n.jpg", Reading())):
        with pytest.raises(DataError) as error:
            action()
        assert str(error.value).isprintable()


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(DataError) as error:
        find_images(tmp_path)
    assert str(error.value).startswith(f"found no image below {tmp_path}; looked for .jpg, .png, .webp, ")
    assert str(error.value).endswith(" other suffixes")
    with pytest.raises(DataError) as error:
        find_images(tmp_path / "missing")
    assert str(error.value) == f"there is no folder {tmp_path / 'missing'}"
    with pytest.raises(DataError) as error:
        find_labelled_images(tmp_path)
    assert str(error.value) == f"{tmp_path} must hold one sub-folder of images per class, and holds no sub-folder"


def test_labels_are_sub_folders(tmp_path):
    good_folder(tmp_path / "cat", 2)
    good_folder(tmp_path / "ant", 1)
    files, labels, classes = find_labelled_images(tmp_path)
    assert classes == ["ant", "cat"]
    assert [(f.parent.name, label) for f, label in zip(files, labels, strict=True)] == [
        ("ant", 0),
        ("cat", 1),
        ("cat", 1),
    ]


def test_classes_without_images_are_named(tmp_path):
    for name in ("ant", "bee", "cat"):
        good_folder(tmp_path / name, int(name == "ant"))
    good_folder(tmp_path / ".ipynb_checkpoints", 1)
    (tmp_path / "cat" / "x.txt").touch()
    with pytest.raises(DataError) as error:
        find_labelled_images(tmp_path)
    assert str(error.value).startswith(f"no image in these sub-folders of {tmp_path}: bee, cat; looked for ")


@pytest.mark.parametrize("channels", [1, 3])
def test_oddities_show_the_photograph(tmp_path, channels):
    photo = np.asarray(photographs(1)[0].convert("L" if channels == 1 else "RGB"), dtype=float)
    for name, file in readable_oddities(tmp_path).items():
        pixels = to_tensor(read_image(file, Reading(channels))).double().numpy()
        assert len(pixels) == channels
        pixels = pixels[0] if channels == 1 else pixels.transpose(1, 2, 0)
        if name == "one.png":
            assert abs(pixels - photo.mean((0, 1))).max() < 20
        elif name == "palette.png":
            transparent = np.asarray(Image.open(file)) == 0
            assert (pixels[transparent] == 255).all()
            assert abs(pixels[~transparent] - photo[~transparent]).mean() < 20
        else:
            grey = channels == 3 and name in ("deep.png", "moving.gif")
            expected = np.asarray(photographs(1)[0].convert("L"), dtype=float)[..., None] if grey else photo
            assert abs(pixels - expected).mean() < 6, name


def test_a_photograph_held_sideways_is_turned_upright(tmp_path):
    photo = photographs(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to the right
    photo.save(tmp_path / "phone.png", exif=exif)
    assert read_image(tmp_path / "phone.png", Reading()).images[0].size == (photo.height, photo.width)


def test_unreadable_files_name_themselves(tmp_path):
    for name, file in unreadable_files(tmp_path).items():
        with pytest.raises(DataError) as error:
            read_image(file, Reading())
        assert str(error.value).startswith(f"cannot read {file}: "), name


def test_tensors_hold_the_pixels():
    photo = photographs(1)[0]
    tensor = to_tensor(Picture((photo,)))
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    assert tuple(tensor[:, 5, 7].tolist()) == photo.getpixel((7, 5))
    assert to_tensor(Picture((photo.convert("L"),))).shape == (1, 120, 160)


def test_the_central_crop():
    photo = photographs(1)[0]
    centre = photo.resize((60, 60), Image.Resampling.BICUBIC, box=(20, 0, 140, 120))
    assert resize_and_crop(Picture((photo,)), (60, 60)).images[0].tobytes() == centre.tobytes()


@pytest.mark.parametrize("size", [(120, 160), (160, 120), (1, 1), (8, 400), (400, 9), (3000, 2000)])
def test_boxes_of_single_images_are_those_of_the_batched_op(size):
    for seed in range(50):
        torch.manual_seed(seed)
        (expected,) = random_crop_boxes(torch.tensor([size])).tolist()
        torch.manual_seed(seed)
        # Sides are rounded to pixels, and the op draws in float32.
        assert random_box(*size, torch.rand(22).tolist()) == pytest.approx(expected, abs=int(size == (3000, 2000)))


def test_pictures_are_cut_to_their_boxes(tmp_path):
    photo = photographs(1)[0]
    photo.save(tmp_path / "photo.png")
    images = TrainingImages(ImageFiles([tmp_path / "photo.png"]), Reading(image_size=(100, 100)))
    flipped = 0
    for seed in range(40):
        top, left, height, width = random_box(120, 160, uniform("sample", 0, (seed, 0), 24)[1:23])
        pixels, flip, problems, *_ = images[seed, 0]
        assert torch.equal(pixels, to_tensor(Picture((photo,)))[:, top : top + height, left : left + width])
        assert problems == []
        flipped += flip
    assert 10 < flipped < 30


@pytest.mark.parametrize("least", [0.08, 0.5, 1.0])
def test_boxes_have_the_area_that_is_asked_for(tmp_path, least):
    photographs(1)[0].save(tmp_path / "photo.png")
    options = {"least_area": least, "flips": False}
    images = TrainingImages(ImageFiles([tmp_path / "photo.png"]), Reading(image_size=(100, 100)), **options)
    areas = []
    for seed in range(500):
        *_, height, width = random_box(120, 160, uniform("sample", 0, (seed, 0), 24)[1:23], least)
        areas.append(height * width / 120 / 160)
        if seed < 40:
            sample = images[seed, 0]
            assert sample.pixels.shape[1:] == (height, width)
            assert not sample.flip
    assert least - 0.01 < min(areas) < least + 0.03
    assert max(areas) > 0.95


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_large_pictures_are_shrunk_before_they_travel(tmp_path, suffix):
    """As boxes of a picture that is shrunk to begin with, by a factor at which its file is decoded as a whole."""
    scene = photographs(2)[1].resize((1600, 1200), Image.Resampling.BICUBIC)
    scene.save(tmp_path / f"x.{suffix}", **({"quality": 95} if suffix == "jpg" else {}))
    images = TrainingImages(ImageFiles([tmp_path / f"x.{suffix}"]), Reading(image_size=(64, 64)))
    whole = to_tensor(read_image(tmp_path / f"x.{suffix}", Reading()))
    off = []
    for seed in range(10):
        box = random_box(1200, 1600, uniform("sample", 0, (seed, 0), 24)[1:23])
        sample = images[seed, 0]
        height, width = sample.pixels.shape[1:]
        assert 1.5 * 64 <= min(height, width) < 3.1 * 64
        assert max(height, width) < 4.2 * 64
        ours, theirs = (
            random_resized_crop([x], torch.tensor([b]), torch.tensor([False]), (64, 64))
            for x, b in ((sample.pixels, (0, 0, height, width)), (whole, box))
        )
        off.append((ours.int() - theirs.int()).abs().float().mean())
    assert max(off) < 3


@pytest.mark.parametrize("resize", [False, True], ids=["on the device", "in the workers"])
def test_batches_are_resized_and_flipped(tmp_path, resize):
    images = TrainingImages(ImageFiles(find_images(good_folder(tmp_path, 5))), Reading(image_size=(24, 32)))
    samples = [images[0, i] for i in range(5)]
    batch, numbers, problems, _ = images.collate(samples, resize=resize)
    assert numbers == [sample.index for sample in samples]
    assert isinstance(batch, torch.Tensor if resize else Crops)
    assert len(batch) == 5
    assert problems == []
    pixels, flips, *_ = zip(*samples, strict=True)
    assert len({x.shape for x in pixels}) == 5
    assert len(set(flips)) == 2
    boxes, flips = torch.tensor([[0, 0, *x.shape[1:]] for x in pixels]), torch.tensor(flips)
    ours = batch.to("cpu", non_blocking=True)
    assert torch.equal(ours, random_resized_crop(pixels, boxes, flips, (24, 32)))
    off = ours.int() - reference.random_resized_crop(pixels, boxes, flips, (24, 32)).int()
    assert off.abs().max() <= 1
    assert batch.to(torch.device("meta")).shape == (5, 3, 24, 32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_batches_travel_in_pinned_memory(tmp_path):
    files = find_images(good_folder(tmp_path, 5))
    (batch,) = Batches(TrainingImages(ImageFiles(files), Reading(image_size=(24, 32))), 5, range(1), workers=1)
    assert all(x.is_pinned() for x in (*batch.images.images, batch.images.flips))
    off = batch.to("cuda", non_blocking=True).images.cpu().int() - batch.to("cpu").images.int()
    assert off.abs().max() <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_pass_over_broken_files_and_count_them(tmp_path, workers):
    good_folder(tmp_path, 5)
    bad = unreadable_files(tmp_path)
    readable_oddities(tmp_path)
    images = TrainingImages(ImageFiles(find_images(tmp_path)), Reading(image_size=(16, 16)))
    batches = Batches(images, 7, range(8), workers=workers)
    shapes = [batch.to("cpu").images.shape for batch in batches]
    assert shapes == [(7, 3, 16, 16)] * 8
    assert len(batches.unreadable) == len(bad)
    assert all(any(str(file) in problem for problem in batches.unreadable) for file in bad.values())


def test_other_channels_are_refused_at_once(tmp_path):
    for i in range(150):
        np.save(tmp_path / f"{i}.npy", np.zeros((13, 4, 4), np.uint8))
    batches = Batches(
        TrainingImages(ImageFiles(find_images(tmp_path)), Reading(image_size=(16, 16))), 64, range(1), workers=0
    )
    with pytest.raises(DataError) as error:
        list(batches)
    assert str(error.value).startswith("none of 100 files, spread over all 150, can be read; first: cannot read ")
    assert str(error.value).endswith("it has 13 or 4 channels, and the model takes 3")


def test_thirteen_bands_become_batches(tmp_path):
    for i in range(4):
        np.save(tmp_path / f"{i}.npy", np.random.default_rng(i).integers(0, 256, (13, 40, 40), np.uint8))
    images = TrainingImages(ImageFiles(find_images(tmp_path)), Reading(13, image_size=(16, 16)))
    (batch,) = Batches(images, 4, range(1), workers=1)
    assert batch.to("cpu").images.shape == (4, 13, 16, 16)


def test_pictures_in_ranges_of_their_own_are_counted(tmp_path):
    good_folder(tmp_path, 2)
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", np.linspace(-25, i, 400).reshape(20, 20))
    batches = Batches(
        TrainingImages(ImageFiles(find_images(tmp_path)), Reading(image_size=(16, 16))), 2, range(5), workers=0
    )
    said = "scaled each by its own range of values, such as {}; --value-range LOW HIGH gives all the same scale"
    with pytest.warns(DataWarning) as warned:
        list(batches)
    (message,) = (str(w.message) for w in warned)
    assert message.startswith(("1 picture so far scaled", "2 pictures so far scaled"))
    with pytest.warns(DataWarning) as warned:
        batches.notes.warn()
    assert [str(w.message) for w in warned] == [f"3 pictures {said.format(tmp_path / '0.npy')}"]


def test_pictures_are_taken_from_everywhere(tmp_path):
    for name in "abcd":
        good_folder(tmp_path / name, 5)
    unreadable_files(tmp_path / "c")
    for file in (tmp_path / "b").iterdir():
        file.write_bytes(b"")
    files = find_images(tmp_path)

    def taken(most: int) -> str:
        with pytest.warns(DataWarning):
            pictures = list(read_pictures(ImageFiles(files), Reading(image_size=(8, 8)), most))
        return "".join(files[i].parent.name for _, i in pictures)

    assert taken(4) == "acda"  # nothing in b can be read
    assert sorted(taken(100)) == sorted("aaaaacccccddddd")
    assert [i for _, i in read_pictures(ImageFiles(files[:5]), Reading(image_size=(8, 8)), 2)] == [0, 2]


def test_replacements_for_broken_files_are_spread(tmp_path):
    for i in range(100):
        (tmp_path / f"{i:03}.png").touch() if i < 50 else Image.new("L", (4, 4), i).save(tmp_path / f"{i:03}.png")
    images = TrainingImages(ImageFiles(find_images(tmp_path)), Reading(image_size=(4, 4)))
    assert len({images[0, i].index for i in range(50)}) > 25


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_nothing_but_broken_files_is_refused(tmp_path, workers):
    unreadable_files(tmp_path)
    batches = Batches(
        TrainingImages(ImageFiles(find_images(tmp_path)), Reading(image_size=(16, 16))), 2, range(1), workers=workers
    )
    with pytest.raises(DataError, match=r"^none of the 4 files can be read; first: cannot read "):
        list(batches)


def test_control_c_does_not_end_the_workers(tmp_path):
    images = TrainingImages(ImageFiles(find_images(good_folder(tmp_path, 3))), Reading(image_size=(16, 16)))
    batches = iter(Batches(images, 2, range(30), workers=1))
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 29


def test_the_seed_fixes_the_batches(tmp_path):
    files = find_images(good_folder(tmp_path))

    def run(seed: int, workers: int = 1) -> torch.Tensor:
        images = TrainingImages(ImageFiles(files), Reading(image_size=(16, 16)), seed)
        batches = Batches(images, 5, range(4), workers=workers)
        return torch.stack([batch.to("cpu").images for batch in batches])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_an_epoch_shows_every_image_once(tmp_path):
    files = find_images(good_folder(tmp_path, 6))
    seen: list[tuple[int, int]] = []

    class Recorder(TrainingImages):
        def __getitem__(self, key):
            seen.append(key)
            return super().__getitem__(key)

    list(Batches(Recorder(ImageFiles(files), Reading(image_size=(8, 8))), 3, range(4), workers=0))
    assert sorted(seen) == [(epoch, index) for epoch in range(2) for index in range(6)]
    assert seen[:6] != [(0, index) for index in range(6)]


def test_on_a_cpu_batches_are_moved_one_by_one():
    seen = []
    images = (torch.full((2, 1, 4, 4), i) for i in range(3))
    batches = on_device(
        (seen.append(i) or Batch(x, torch.tensor([i, i])) for i, x in enumerate(images)), torch.device("cpu")
    )
    assert next(batches).images.max() == 0
    assert seen == [0]  # the next one is fetched when it is asked for, while the step on this one runs
    assert [(x.images.max().item(), x.numbers.tolist()) for x in batches] == [(1, [1, 1]), (2, [2, 2])]


def test_on_a_gpu_batches_are_copied_on_a_stream_of_their_own(monkeypatch):
    """CUDA's streams pretended: what is called, in which order."""
    events = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")

    @contextmanager
    def on_stream(stream):
        events.append(f"enter {stream.name}")
        yield
        events.append(f"leave {stream.name}")

    class Tensor:
        def to(self, device, non_blocking=False):
            events.append(f"copy to {device}, {non_blocking=}")
            return self

        def record_stream(self, stream):
            events.append(f"kept for {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("training"))
    assert len(list(on_device([Batch(Tensor(), Tensor())] * 2, torch.device("cuda", 0)))) == 2
    assert events == 2 * [
        "enter copying",
        "copy to cuda:0, non_blocking=True",
        "copy to cuda:0, non_blocking=True",
        "leave copying",
        "training waits for copying",
        "kept for training",
        "kept for training",
    ]


def test_the_central_crop_of_an_oblong_size():
    photo = photographs(1)[0]  # 120 x 160
    centre = photo.resize((80, 40), Image.Resampling.BICUBIC, box=(0, 20, 160, 100))
    assert resize_and_crop(Picture((photo,)), (40, 80)).images[0].tobytes() == centre.tobytes()


def test_random_numbers_never_change():
    """A run that is resumed in a year draws what it would have drawn: these are the numbers of the first release."""
    assert permutation("order", 7, (3, 0), 8).tolist() == [3, 5, 4, 0, 6, 7, 2, 1]
    assert uniform("sample", 7, (3, 5), 2).tolist() == [0.541016634529307, 0.03822679839937282]
    assert derived_seed("mask", 7, (3, 0)) == 7641074490653411507


def test_random_numbers_of_one_place_say_nothing_of_another():
    places = [
        (purpose, seed, (a, b)) for purpose in ("sample", "mask") for seed in (0, 1) for a in (0, 1) for b in (0, 1)
    ]
    draws = np.stack([uniform(*place, 2000) for place in places])
    off = np.corrcoef(draws) - np.eye(len(places))
    assert np.abs(off).max() < 0.1
    assert np.abs(draws.mean(1) - 0.5).max() < 0.03


def test_rows_of_processes_make_the_batch():
    order = Order(10, 4, seed=3)
    steps = [order.keys(step) for step in range(5)]
    assert sorted(key for keys in steps for key in keys) == [
        (epoch, index) for epoch in range(2) for index in range(10)
    ]
    assert [order.keys(1, slice(0, 2)) + order.keys(1, slice(2, 4))] == [steps[1]]
    assert Order(10, 4, seed=4).keys(0) != steps[0]
    indices = [index for keys in steps for _, index in keys]
    assert indices[:10] != indices[10:]


def test_batches_are_the_same_for_any_number_of_workers_and_wherever_they_begin(tmp_path):
    images = TrainingImages(ImageFiles(find_images(good_folder(tmp_path, 5))), Reading(image_size=(16, 16)), seed=2)

    def run(steps: range, workers: int, rows: slice = slice(None)) -> list[torch.Tensor]:
        return [batch.to("cpu").images for batch in Batches(images, 4, steps, workers=workers, rows=rows)]

    whole = torch.stack(run(range(5), 0))
    assert torch.equal(torch.stack(run(range(2, 5), 2)), whole[2:])
    assert torch.equal(torch.stack(run(range(5), 1, slice(1, 3))), whole[:, 1:3])


def test_tensors_in_memory_are_flipped_half_of_the_time():
    images = TensorImages(torch.arange(24).reshape(6, 1, 1, 4).byte(), seed=1)
    batches = torch.cat([batch.to("cpu").images for batch in Batches(images, 6, range(20))])
    flipped = batches[:, 0, 0, 0] > batches[:, 0, 0, 3]
    whole = torch.where(flipped[:, None, None, None], batches.flip(3), batches)
    assert sorted(whole[:6, 0, 0, 0].tolist()) == [0, 4, 8, 12, 16, 20]
    assert 40 < flipped.sum() < 80


def test_workers_leave_the_signals_of_the_program_as_they_are(tmp_path):
    images = TrainingImages(ImageFiles(find_images(good_folder(tmp_path, 3))), Reading(image_size=(16, 16)))
    heard = []
    before = signal.signal(signal.SIGCHLD, lambda *_: heard.append(1))
    try:
        list(Batches(images, 2, range(3), workers=1))
        handler = signal.getsignal(signal.SIGCHLD)
        handler()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert heard


def test_a_worker_ends_with_a_main_process_that_is_killed(tmp_path):
    """Even where half of a message is in its pipe, and the rest will never come."""
    reader, writer = os.pipe()
    main = os.fork()
    if main == 0:
        if os.fork() == 0:
            ignore_signals(0)
            os.write(writer, b"%d\n" % os.getpid())
            os.read(os.pipe()[0], 1)
        time.sleep(100)
    worker = int(os.read(reader, 20))
    os.kill(main, signal.SIGKILL)
    os.waitpid(main, 0)
    end = time.monotonic() + 10
    state = Path(f"/proc/{worker}/stat")
    while time.monotonic() < end and state.exists() and state.read_text().split()[2] != "Z":
        time.sleep(0.1)
    with suppress(ProcessLookupError):
        os.kill(worker, signal.SIGKILL)
    assert time.monotonic() < end


def test_a_killed_worker_is_a_sentence(tmp_path):
    images = TrainingImages(ImageFiles(find_images(good_folder(tmp_path, 3))), Reading(image_size=(16, 16)))
    batches = iter(Batches(images, 2, range(1000), workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"^one of 1 worker process was killed"):
        list(batches)
