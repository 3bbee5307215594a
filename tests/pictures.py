"""Folders of real pictures, good and bad, as people have them."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs(count: int) -> list[Image.Image]:
    """Crops of the two colour photographs that ship with scikit-learn, 120x160 pixels."""
    scenes = [Image.fromarray(scene) for scene in load_sample_images().images]  # [427, 640, 3]
    crops = []
    for i in range(count):
        left, top = 37 * i % 480, 53 * i % 300
        crops.append(scenes[i % 2].crop((left, top, left + 160, top + 120)))
    return crops


def good_folder(folder: Path, count: int = 12) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(photographs(count)):
        picture.save(folder / f"photo_{i:02}.{('jpg', 'png', 'webp')[i % 3]}")
    return folder


def readable_oddities(folder: Path) -> dict[str, Path]:
    """Unusual files that hold a picture all the same."""
    folder.mkdir(parents=True, exist_ok=True)
    photo = photographs(1)[0]
    files = {name: folder / name for name in ("one.png", "deep.png", "print.jpg", "palette.png", "moving.gif")}
    photo.resize((1, 1)).save(files["one.png"])
    grey = np.asarray(photo.convert("L"), dtype=np.uint16)
    Image.fromarray(grey * 257).save(files["deep.png"])  # 16 bits
    photo.convert("CMYK").save(files["print.jpg"])
    palette = photo.quantize(16)
    palette.save(files["palette.png"], transparency=0)
    frames = [photo.convert("L"), photo.convert("L").rotate(90)]
    frames[0].save(files["moving.gif"], save_all=True, append_images=frames[1:])
    return files


def unreadable_files(folder: Path) -> dict[str, Path]:
    """Files with the name of a picture that hold none, or only the beginning of one."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / name for name in ("truncated.jpg", "text.jpg", "empty.png", "huge.png")}
    whole = folder / "whole.jpg"
    photographs(1)[0].save(whole)
    files["truncated.jpg"].write_bytes(whole.read_bytes()[:1500])
    whole.unlink()
    files["text.jpg"].write_text("this is not a picture")
    files["empty.png"].touch()
    # A header that promises 60000 x 60000 pixels: reading it would take 10 GB.
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    files["huge.png"].write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + b"\0" * 16)
    return files
