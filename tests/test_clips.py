"""Clips, volumes and sound: which frames the model is given, in which order, and what is refused."""

import math

import av
import numpy as np
import pytest
import soundfile
import tifffile
import torch
from PIL import Image
from scipy.io import wavfile

from mae.data import (
    DataError,
    ImageFiles,
    Reading,
    TrainingImages,
    Wanted,
    random_box,
    read_image,
    read_pictures,
    to_tensor,
)
from mae.data.randomness import uniform
from mae.data.sound import below_loudest, mono, row_of, spectrogram
from mae.report.figures import _flat
from mae_kernels import random_resized_crop

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (8, 20, 30), np.uint8)  # [T, H, W]
COLOURS = RNG.integers(0, 256, (8, 20, 30, 3), np.uint8)  # [T, H, W, C]
FIRST = Wanted(start=lambda places: 0)


def clip(file, channels: int = 1, frames: int = 4, wanted: Wanted = FIRST, **options) -> np.ndarray:
    """``[T, C, H, W]``."""
    planes = to_tensor(read_image(file, Reading(channels, image_size=(frames, 8, 8), **options), wanted))
    return planes.unflatten(0, (frames, channels)).numpy()


def refusal(file, channels: int = 1, frames: int = 4) -> str:
    with pytest.raises(DataError) as error:
        clip(file, channels, frames)
    return str(error.value).removeprefix(f"cannot read {file}: ")


def animation(file, frames: np.ndarray, **options):
    first, *others = map(Image.fromarray, frames)
    first.save(file, save_all=True, append_images=others, **options)
    return file


def video(file, frames: np.ndarray):
    """Frames ``[T, H, W]`` of even sides; every seventh is a key frame, and the file holds them in another order."""
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"crf": "0", "g": "7", "bf": "2"})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:], "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.stack([frame] * 3, -1), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return file


def test_which_frames_are_taken():
    def taken(count: int, stride: int, place) -> list[int]:
        return [*range(count)[Reading(image_size=(4, 8, 8), frame_stride=stride).clip(count, place)]]

    assert taken(9, 1, lambda places: 0) == [0, 1, 2, 3]
    assert taken(9, 1, lambda places: places - 1) == [5, 6, 7, 8]
    assert taken(9, 2, lambda places: places - 1) == [2, 4, 6, 8]
    assert taken(9, 3, Wanted().start) == [1, 3, 5, 7]  # 3 does not fit into 9
    assert taken(9, 1, Wanted().start) == [3, 4, 5, 6]
    assert taken(4, 5, lambda places: places - 1) == [0, 1, 2, 3]
    assert Reading().clip(9, lambda places: pytest.fail("one picture of a clip is its first")) == slice(0, 1)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif", "deep.tif", "series.tif", "npy", "npz", "mkv"])
def test_frames_keep_their_order(tmp_path, suffix):
    file, expected = tmp_path / f"x.{suffix}", FRAMES[1:8:2]
    if suffix == "mkv":
        video(file, FRAMES)
    elif suffix == "npy":
        np.save(file, FRAMES)
    elif suffix == "npz":
        np.savez_compressed(file, volume=FRAMES)
    elif suffix == "tif":
        tifffile.imwrite(file, FRAMES, photometric="minisblack")
    elif suffix == "deep.tif":
        tifffile.imwrite(file, FRAMES.astype(np.uint16) * 257, photometric="minisblack", compression="zlib")
    elif suffix == "series.tif":
        with tifffile.TiffWriter(file) as tiff:
            for frame in FRAMES:
                tiff.write(frame)
    else:
        animation(file, FRAMES, **({"lossless": True} if suffix == "webp" else {}))
    ours = clip(file, wanted=Wanted(start=lambda places: places - 1), frame_stride=2)[:, 0]
    assert np.abs(ours.astype(int) - expected).max() <= (3 if suffix == "mkv" else 0)
    colours = clip(file, channels=3, wanted=Wanted(start=lambda places: places - 1), frame_stride=2)
    assert np.abs(colours.astype(int) - ours[:, None]).max() <= (3 if suffix == "mkv" else 0)


@pytest.mark.parametrize("layout", ["TCHW npy", "CTHW npy", "THWC npy", "THWC tif", "TCHW tif", "png"])
def test_frames_in_colours(tmp_path, layout):
    file = tmp_path / f"x.{layout.split()[-1]}"
    if layout == "png":
        animation(file, COLOURS)
    elif layout == "THWC tif":
        tifffile.imwrite(file, COLOURS, photometric="rgb")
    elif layout == "TCHW tif":
        tifffile.imwrite(file, np.moveaxis(COLOURS, -1, 1), photometric="rgb", planarconfig="separate")
    else:
        np.save(file, {"C": np.moveaxis(COLOURS, -1, 0), "T": COLOURS}[layout[0]])
    assert np.array_equal(clip(file, 3), np.moveaxis(COLOURS[:4], -1, 1))


def test_thirteen_channels_of_a_volume_have_ranges_of_their_own(tmp_path):
    volume = np.stack([FRAMES.astype(np.float32) * 10.0**i - 5 for i in range(13)])  # [C, T, H, W]
    np.save(tmp_path / "x.npy", volume)
    used = FRAMES[:4].astype(int)
    expected = ((used - used.min()) / (used.max() - used.min()) * 255).round()
    assert np.abs(clip(tmp_path / "x.npy", 13) - expected[:, None]).max() <= 1


def test_frames_of_a_clip_share_their_range(tmp_path):
    np.save(tmp_path / "x.npy", np.linspace(-1000, 3000, 4 * 20 * 30).reshape(4, 20, 30).astype(np.int16))
    expected = np.linspace(0, 255, 4 * 20 * 30).reshape(4, 20, 30)
    assert np.abs(clip(tmp_path / "x.npy")[:, 0] - expected).max() < 1


def test_hidden_frames_of_transparent_animations(tmp_path):
    """An APNG's default image is none of its frames, and transparency is white in every frame."""
    alpha = np.full((8, 20, 30, 1), 255, np.uint8)
    alpha[:, :5] = 0
    shown = np.concatenate([COLOURS, alpha], -1)
    animation(tmp_path / "x.png", shown, default_image=True)
    ours = clip(tmp_path / "x.png", 3)
    assert (ours[:, :, :5] == 255).all()
    assert np.array_equal(ours[:, :, 5:], np.moveaxis(COLOURS[1:5, 5:], -1, 1))


def test_videos_that_are_held_sideways(tmp_path):
    file = video(tmp_path / "x.mp4", FRAMES)
    data = bytearray(file.read_bytes())
    matrix = data.index(np.array([65536, 0, 0, 0, 65536], ">i4").tobytes(), data.index(b"tkhd"))
    data[matrix : matrix + 20] = np.array([0, 65536, 0, -65536, 0], ">i4").tobytes()  # to the right, as phones write it
    file.write_bytes(data)
    assert np.abs(clip(file)[:, 0].astype(int) - np.rot90(FRAMES[:4], -1, (1, 2))).max() <= 3


def test_a_model_of_one_frame_gets_the_first(tmp_path):
    for file in (animation(tmp_path / "x.gif", FRAMES), video(tmp_path / "x.mkv", FRAMES)):
        picture = to_tensor(read_image(file, 1, Wanted(start=lambda places: places - 1))).numpy()
        assert np.abs(picture[0].astype(int) - FRAMES[0]).max() <= 3


@pytest.mark.parametrize("suffix", ["gif", "npy"])
def test_frames_of_a_sample_are_cut_flipped_and_resized_alike(tmp_path, suffix):
    file = tmp_path / f"x.{suffix}"
    np.save(file, FRAMES) if suffix == "npy" else animation(file, FRAMES)
    images, starts, flips = TrainingImages(ImageFiles([file]), Reading(1, image_size=(4, 12, 10))), set(), set()
    for seed in range(48):
        start, *box, flip = uniform("sample", 0, (seed, 0), 24)
        start, flip = int(5 * start), flip < 0.5
        top, left, height, width = random_box(20, 30, box)
        sample = images[seed, 0]
        expected = torch.from_numpy(FRAMES[start : start + 4, top : top + height, left : left + width])
        assert torch.equal(sample.pixels, expected)
        assert sample.flip == flip
        starts.add(start)
        flips.add(flip)
    assert starts == {0, 1, 2, 3, 4}
    assert flips == {False, True}


@pytest.mark.parametrize("resize", [False, True], ids=["on the device", "in the workers"])
def test_batches_of_clips_are_their_frames_one_by_one(tmp_path, resize):
    np.save(tmp_path / "x.npy", COLOURS)
    images = TrainingImages(ImageFiles([tmp_path / "x.npy"]), Reading(3, image_size=(4, 12, 10)))
    samples = [images[epoch, 0] for epoch in range(3)]
    batch = images.collate(samples, resize=resize).images.to("cpu")
    assert batch.shape == (3, 3, 4, 12, 10)
    for n, sample in enumerate(samples):
        box = torch.tensor([[0, 0, *sample.pixels.shape[1:]]])
        for t, frame in enumerate(sample.pixels.split(3)):
            alone = random_resized_crop([frame.contiguous()], box, torch.tensor([sample.flip]), (12, 10))
            assert torch.equal(batch[n, :, t], alone[0])


def test_central_clips_of_evaluation(tmp_path):
    np.save(tmp_path / "x.npy", np.moveaxis(COLOURS, -1, 0))
    ((ours, index),) = read_pictures(ImageFiles([tmp_path / "x.npy"]), Reading(3, image_size=(4, 20, 30)))
    assert index == 0
    assert np.array_equal(ours.numpy(), np.moveaxis(COLOURS[2:6], -1, 0))


def test_what_is_no_clip_is_refused(tmp_path):
    Image.fromarray(FRAMES[0]).save(tmp_path / "still.png")
    Image.fromarray(FRAMES[0]).save(tmp_path / "still.tif")
    animation(tmp_path / "short.gif", FRAMES[:3])
    np.save(tmp_path / "short.npy", FRAMES[:3])
    np.save(tmp_path / "photo.npy", COLOURS[0])
    np.save(tmp_path / "axes.npy", COLOURS[None])
    np.savez(tmp_path / "two.npz", data=FRAMES, seg=FRAMES)
    tifffile.imwrite(tmp_path / "axes.tif", np.stack([FRAMES] * 2), imagej=True, metadata={"axes": "TZYX"})
    video(tmp_path / "short.mp4", FRAMES[:2])
    for name, words in {
        "still.png": "it has 1 frame, and the model takes 4",
        "still.tif": "it has 1 frame, and the model takes 4",
        "short.gif": "it has 3 frames, and the model takes 4",
        "short.npy": "it has 3 frames, and the model takes 4",
        "short.mp4": "it has 2 frames, and the model takes 4",
        "photo.npy": "its shape is (20, 30, 3): it is one picture in colours, not 4 frames",
        "axes.npy": "its shape is (1, 8, 20, 30, 3): it has 5 axes, not 3 or 4",
        "two.npz": "it holds 2 arrays, not one: data, seg",
        "axes.tif": "more than one of its axes 'TZYX' could be the frames",
    }.items():
        assert refusal(tmp_path / name) == words
    np.save(tmp_path / "x.npy", FRAMES[:, None].repeat(5, 1))
    assert refusal(tmp_path / "x.npy") == "its shape is (8, 5, 20, 30): it has 8 or 30 channels, and the model takes 1"


def test_packages_are_named_where_they_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr("mae.data.readers.video.av", None)
    monkeypatch.setattr("mae.data.readers.sound.soundfile", None)
    video(tmp_path / "x.mp4", FRAMES)
    soundfile.write(tmp_path / "x.flac", np.zeros(400), 8000)
    needs = "which needs the package"
    assert refusal(tmp_path / "x.mp4") == f"it is a video, {needs} av: pip install 'mae_kernels[video]'"
    assert refusal(tmp_path / "x.flac") == f"it is sound, {needs} soundfile: pip install 'mae_kernels[audio]'"


def test_how_clips_are_drawn():
    """Frames side by side, two pixels apart; or the middle frame, then rows and columns over time, from the top."""
    clips = torch.rand(2, 3, 12, 5, 7)
    frames = _flat(clips, "frames").unfold(3, 9, 9)[..., :7]  # [N, C, H, 8, W]
    shown = [0, 2, 3, 5, 6, 8, 9, 11]
    assert torch.equal(frames, clips[:, :, shown].movedim(2, 3))
    assert _flat(clips[:, :, :4], "frames").shape == (2, 3, 5, 36)
    slices = _flat(clips, "slices")
    assert torch.equal(slices[..., :5, :7], clips[:, :, 6])
    assert torch.equal(slices[..., 9:16], clips[:, :, :, 2])
    assert torch.equal(slices[..., 18:23], clips[..., 3])
    assert (slices[..., 5:, :7] == 1).all()
    assert slices.shape == (2, 3, 12, 25)


# Sound.


def heard(file, columns: int = 12, start: int = 0, **options) -> np.ndarray:
    reading = Reading(1, image_size=(32, columns), **options)
    return to_tensor(read_image(file, reading, Wanted(start=lambda places: start))).numpy()[0]


def test_a_column_is_the_transform_of_its_window():
    """Sums by hand: one window, every frequency, every band."""
    samples, bands, points, column = RNG.normal(0, 0.1, 2000), 32, 512, 3
    power = []
    for k in range(points // 2 + 1):
        weights = [0.5 - 0.5 * math.cos(2 * math.pi * i / 400) for i in range(400)]
        terms = [w * x for w, x in zip(weights, samples[160 * column :], strict=False)]
        real = sum(x * math.cos(2 * math.pi * k * i / points) for i, x in enumerate(terms))
        imaginary = sum(x * math.sin(2 * math.pi * k * i / points) for i, x in enumerate(terms))
        power.append((real**2 + imaginary**2) / (sum(weights) / 2) ** 2)
    top = 2595 * math.log10(1 + 8000 / 700)
    borders = [700 * (10 ** (top * i / (bands + 1) / 2595) - 1) for i in range(bands + 2)]
    levels = []
    for low, peak, high in zip(borders, borders[1:], borders[2:], strict=False):
        hertz = [16000 * k / points for k in range(points // 2 + 1)]
        triangle = [max(0, min((f - low) / (peak - low), (high - f) / (high - peak))) for f in hertz]
        levels.append(10 * math.log10(sum(t * p for t, p in zip(triangle, power, strict=True)) / sum(triangle)))
    assert np.allclose(spectrogram(samples, bands, 8)[:, column], levels[::-1], atol=1e-9)


def test_a_tone_is_a_line_at_its_height():
    seconds = np.arange(16000) / 16000
    for hertz in (200, 1000, 5000):
        levels = spectrogram(np.sin(2 * np.pi * hertz * seconds), 128, 90)
        mel = 2595 * np.log10(1 + hertz / 700) / (2595 * np.log10(1 + 8000 / 700))
        assert (np.abs(128 - mel * 129 - levels.argmax(0)) < 1).all()
        assert row_of(hertz, 128) == pytest.approx(128 - mel * 129)
        assert (levels.max(0) > -6).all()
        assert levels.max() <= 0
    assert np.isfinite(spectrogram(seconds, 512, 2)).all()  # the lowest of so many bands are narrow


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.float32])
def test_samples_of_every_type_and_rate(tmp_path, dtype):
    seconds = np.arange(12000) / 48000
    wave = 0.5 * np.sin(2 * np.pi * 440 * seconds)
    stored = wave if dtype == np.float32 else wave * 2 ** (8 * np.dtype(dtype).itemsize - 1) + 128 * (dtype == np.uint8)
    wavfile.write(tmp_path / "x.wav", 48000, np.stack([stored, stored], 1).astype(dtype))
    _, samples = wavfile.read(tmp_path / "x.wav")
    ours = mono(samples, 48000)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(4000) / 16000)
    assert np.abs(ours - expected)[100:-100].max() < (0.01 if dtype == np.uint8 else 0.001)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_a_part_of_a_sound(tmp_path, suffix):
    wave = RNG.uniform(-0.5, 0.5, 16000).astype(np.float32)
    wave[:8000] /= 50
    soundfile.write(tmp_path / f"x.{suffix}", wave, 16000, subtype="PCM_16")
    levels = spectrogram(wave[160 * 45 :], 32, 12)
    expected = 255 * below_loudest(levels)
    assert np.abs(heard(tmp_path / f"x.{suffix}", start=45) - expected).max() <= 1
    absolute = heard(tmp_path / f"x.{suffix}", start=45, value_range=(-90.0, 0.0))
    assert np.abs(absolute - 255 * (levels + 90) / 90).max() <= 1
    places = []
    reading = Reading(1, image_size=(32, 12))
    read_image(tmp_path / f"x.{suffix}", reading, Wanted(start=lambda n: places.append(n) or 0))
    assert places == [(16000 - 400) // 160 + 1 - 12 + 1]


def test_silence_follows_a_short_sound(tmp_path):
    wavfile.write(tmp_path / "x.wav", 16000, RNG.uniform(-0.5, 0.5, 800).astype(np.float32))
    levels = heard(tmp_path / "x.wav")
    assert levels[:, :3].min() > 100
    assert levels[:, 6:].max() == 0


def test_sound_is_neither_stretched_nor_flipped(tmp_path):
    wavfile.write(tmp_path / "x.wav", 16000, RNG.uniform(-0.5, 0.5, 16000).astype(np.float32))
    images = TrainingImages(ImageFiles([tmp_path / "x.wav"]), Reading(1, image_size=(32, 12)))
    for seed in range(8):
        start = int(uniform("sample", 0, (seed, 0), 1)[0] * ((16000 - 400) // 160 + 1 - 12 + 1))
        sample = images[seed, 0]
        assert not sample.flip
        assert np.array_equal(sample.pixels[0], heard(tmp_path / "x.wav", start=start))


def test_sound_that_cannot_be_seen(tmp_path):
    wavfile.write(tmp_path / "x.wav", 16000, np.zeros(399, np.int16))
    assert refusal(tmp_path / "x.wav", frames=1) == "it has 399 samples, fewer than a window of 0.025 s"
    words = "it is sound, which takes a model of one channel and no frames"
    assert refusal(tmp_path / "x.wav", channels=3, frames=1) == refusal(tmp_path / "x.wav") == words
