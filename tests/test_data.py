"""Reading what people have in their folders."""

import multiprocessing
import os
import signal
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from pictures import good_folder, photographs, readable_oddities, unreadable_files
from PIL import Image

from mae.data import (
    Batches,
    Crops,
    DataError,
    TrainingImages,
    _collate,
    find_images,
    find_labelled_images,
    on_device,
    random_box,
    read_image,
    resize_and_crop,
    to_tensor,
)
from mae_kernels import random_crop_boxes, random_resized_crop, reference


def test_finds_images_below_a_folder(tmp_path):
    good_folder(tmp_path / "b", 3)
    good_folder(tmp_path / "a" / "deep", 2)
    (tmp_path / "a" / ".hidden.png").touch()
    (tmp_path / "notes.txt").write_text("no picture")
    names = [str(f.relative_to(tmp_path)) for f in find_images(tmp_path)]
    assert names == [
        "a/deep/photo_00.jpg",
        "a/deep/photo_01.png",
        "b/photo_00.jpg",
        "b/photo_01.png",
        "b/photo_02.webp",
    ]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(DataError) as error:
        find_images(tmp_path)
    assert str(error.value) == (
        f"found no image below {tmp_path}; looked for .bmp, .gif, .jpeg, .jpg, .png, .ppm, .tif, .tiff, .webp"
    )
    with pytest.raises(DataError) as error:
        find_images(tmp_path / "missing")
    assert str(error.value) == f"there is no folder {tmp_path / 'missing'}"
    with pytest.raises(DataError) as error:
        find_labelled_images(tmp_path)
    assert str(error.value) == f"{tmp_path} must hold one sub-folder of images per class, found 0"


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


@pytest.mark.parametrize("channels", [1, 3])
def test_oddities_show_the_photograph(tmp_path, channels):
    photo = np.asarray(photographs(1)[0].convert("L" if channels == 1 else "RGB"), dtype=float)
    for name, file in readable_oddities(tmp_path).items():
        image = read_image(file, channels)
        assert image.mode == ("L" if channels == 1 else "RGB")
        pixels = np.asarray(image, dtype=float)
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
    assert read_image(tmp_path / "phone.png", 3).size == (photo.height, photo.width)


def test_unreadable_files_name_themselves(tmp_path):
    for name, file in unreadable_files(tmp_path).items():
        with pytest.raises(DataError) as error:
            read_image(file, 3)
        assert str(error.value).startswith(f"cannot read {file}: "), name


def test_tensors_hold_the_pixels():
    photo = photographs(1)[0]
    tensor = to_tensor(photo)
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    assert tuple(tensor[:, 5, 7].tolist()) == photo.getpixel((7, 5))
    assert to_tensor(photo.convert("L")).shape == (1, 120, 160)


def test_the_central_crop():
    photo = photographs(1)[0]
    centre = photo.resize((60, 60), Image.Resampling.BICUBIC, box=(20, 0, 140, 120))
    assert resize_and_crop(photo, (60, 60)).tobytes() == centre.tobytes()


@pytest.mark.parametrize("size", [(120, 160), (160, 120), (1, 1), (8, 400), (400, 9), (3000, 2000)])
def test_boxes_of_single_images_are_those_of_the_batched_op(size):
    for seed in range(50):
        torch.manual_seed(seed)
        (expected,) = random_crop_boxes(torch.tensor([size])).tolist()
        torch.manual_seed(seed)
        # Sides are rounded to pixels, and the op draws in float32.
        assert random_box(*size) == pytest.approx(expected, abs=int(size == (3000, 2000)))


def test_pictures_are_cut_to_their_boxes(tmp_path):
    photo = photographs(1)[0]
    photo.save(tmp_path / "photo.png")
    images = TrainingImages([tmp_path / "photo.png"], (32, 48), 3)
    flipped = 0
    for seed in range(40):
        torch.manual_seed(seed)
        top, left, height, width = random_box(120, 160)
        torch.manual_seed(seed)
        pixels, flip, problems = images[0]
        assert torch.equal(pixels, to_tensor(photo)[:, top : top + height, left : left + width])
        assert problems == []
        flipped += flip
    assert 10 < flipped < 30


@pytest.mark.parametrize("resize", [False, True], ids=["on the device", "in the workers"])
def test_batches_are_resized_and_flipped(tmp_path, resize):
    images = TrainingImages(find_images(good_folder(tmp_path, 5)), (24, 32), 3)
    samples = [images[i] for i in range(5)]
    batch, problems = _collate((24, 32), samples, resize=resize)
    assert isinstance(batch, torch.Tensor if resize else Crops)
    assert len(batch) == 5
    assert problems == []
    pixels, flips, _ = zip(*samples, strict=True)
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
    (batch,) = Batches(TrainingImages(files, (24, 32), 3), steps=1, batch_size=5, workers=1, seed=0)
    assert all(x.is_pinned() for x in (*batch.images, batch.flips))
    off = batch.to("cuda", non_blocking=True).cpu().int() - batch.to("cpu").int()
    assert off.abs().max() <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_pass_over_broken_files_and_count_them(tmp_path, workers):
    good_folder(tmp_path, 5)
    bad = unreadable_files(tmp_path)
    readable_oddities(tmp_path)
    images = TrainingImages(find_images(tmp_path), (16, 16), 3)
    batches = Batches(images, steps=8, batch_size=7, workers=workers, seed=0)
    shapes = [batch.to("cpu").shape for batch in batches]
    assert shapes == [(7, 3, 16, 16)] * 8
    assert len(batches.unreadable) == len(bad)
    assert all(any(str(file) in problem for problem in batches.unreadable) for file in bad.values())


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_of_nothing_but_broken_files_is_refused(tmp_path, workers):
    unreadable_files(tmp_path)
    batches = Batches(
        TrainingImages(find_images(tmp_path), (16, 16), 3), steps=1, batch_size=2, workers=workers, seed=0
    )
    with pytest.raises(DataError, match=r"^none of the 4 files can be read; first: cannot read "):
        list(batches)


def test_control_c_does_not_end_the_workers(tmp_path):
    images = TrainingImages(find_images(good_folder(tmp_path, 3)), (16, 16), 3)
    batches = iter(Batches(images, steps=30, batch_size=2, workers=1, seed=0))
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(batches)) == 29


def test_the_seed_fixes_the_batches(tmp_path):
    files = find_images(good_folder(tmp_path))

    def run(seed: int, workers: int = 1) -> torch.Tensor:
        images = TrainingImages(files, (16, 16), 3)
        batches = Batches(images, steps=4, batch_size=5, workers=workers, seed=seed)
        return torch.stack([batch.to("cpu") for batch in batches])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))


def test_an_epoch_shows_every_image_once(tmp_path):
    files = find_images(good_folder(tmp_path, 6))
    seen: list[int] = []

    class Recorder(TrainingImages):
        def __getitem__(self, index):
            seen.append(index)
            return super().__getitem__(index)

    list(Batches(Recorder(files, (8, 8), 3), steps=4, batch_size=3, workers=0, seed=0))
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))


def test_on_a_cpu_batches_are_moved_one_by_one():
    seen = []
    batches = on_device((seen.append(i) or torch.full((2, 1, 4, 4), i) for i in range(3)), torch.device("cpu"))
    assert next(batches).max() == 0
    assert seen == [0]  # the next one is fetched when it is asked for, while the step on this one runs
    assert [batch.max().item() for batch in batches] == [1, 2]


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

    class Batch:
        def to(self, device, non_blocking=False):
            events.append(f"copy to {device}, {non_blocking=}")
            return self

        def record_stream(self, stream):
            events.append(f"kept for {stream.name}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copying"))
    monkeypatch.setattr(torch.cuda, "stream", on_stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("training"))
    assert len(list(on_device([Batch(), Batch()], torch.device("cuda", 0)))) == 2
    assert events == 2 * [
        "enter copying",
        "copy to cuda:0, non_blocking=True",
        "leave copying",
        "training waits for copying",
        "kept for training",
    ]


def test_the_central_crop_of_an_oblong_size():
    photo = photographs(1)[0]  # 120 x 160
    centre = photo.resize((80, 40), Image.Resampling.BICUBIC, box=(0, 20, 160, 100))
    assert resize_and_crop(photo, (40, 80)).tobytes() == centre.tobytes()
