"""The data's way through the ops, as one picture: ``python docs/data_flow.py`` writes docs/data_flow.svg.

Its three pictures are the first ones of docs/demo.png, which ``make demo`` makes: four of sixteen patches are visible.
"""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent
OURS, OTHERS, HIDDEN, LINE = "#cfe2f3", "#eeeeee", "#808080", "#444444"
SIDE, CELLS = 104, 4  # of a picture, and patches along it
MIDDLE = 137  # of the main row


def panels() -> dict[str, Image.Image]:
    """The first masked picture, reconstruction and original of docs/demo.png, 28 x 28."""
    sheet = np.asarray(Image.open(FOLDER / "demo.png").convert("L"))
    blank = sheet == 255
    rows = np.flatnonzero(~blank[:, 6:150].all(1))
    top = rows[np.flatnonzero(np.diff(rows) > 9)[0] + 1]  # below the titles
    bottom = top + np.flatnonzero(blank[top:, 6:150].all(1))[0]
    columns = np.flatnonzero(np.diff(np.r_[1, blank[top:bottom].all(0), 1].astype(int)))
    found = {}
    for name, left, right in zip(("masked", "predicted", "original"), columns[::2], columns[1::2], strict=False):
        ys, xs = (np.linspace(low, high, 57)[1::2].astype(int) for low, high in ((top, bottom), (left, right)))
        found[name] = Image.fromarray(sheet[np.ix_(ys, xs)])
    return found


def visible(masked: Image.Image) -> np.ndarray:
    """[4, 4], of each patch: whether it is more than the grey that stands for hidden ones."""
    patches = np.asarray(masked).reshape(CELLS, 7, CELLS, 7)
    return patches.max((1, 3)) - patches.min((1, 3)) > 8 | (abs(patches.mean((1, 3)) - 128) > 8)


class Drawing:
    def __init__(self, width: int, height: int):
        self.width, self.height, self.parts = width, height, []

    def text(self, x: float, y: float, *lines: str, **style) -> None:
        style = {"size": 13, "weight": "normal", "fill": "#222222"} | style
        for i, line in enumerate(lines):
            place = f'x="{x}" y="{y + 16 * i}" font-size="{style["size"]}" font-weight="{style["weight"]}"'
            self.parts.append(f'<text {place} fill="{style["fill"]}" text-anchor="middle">{line}</text>')

    def box(self, x: float, y: float, width: float, height: float, fill: str, stroke: str = LINE) -> None:
        shape = f'x="{x}" y="{y}" width="{width}" height="{height}" rx="5"'
        self.parts.append(f'<rect {shape} fill="{fill}" stroke="{stroke}"/>')

    def named(self, x: float, name: str, *lines: str, fill: str = OURS, y: float = MIDDLE) -> tuple[float, float]:
        """A box of the main row, whose middle is x: its left and right ends."""
        half = 3.8 * max(map(len, (name, *lines))) + 9
        self.box(x - half, y - 33, 2 * half, 66, fill)
        self.text(x, y + 5 - 9 * len(lines), name, weight="bold")
        self.text(x, y + 23 - 9 * len(lines), *lines, size=12)
        return x - half, x + half

    def arrow(self, *points: tuple[float, float], dashed: bool = False) -> None:
        path, dash = " ".join(f"{x},{y}" for x, y in points), ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{LINE}" marker-end="url(#tip)"{dash}/>')

    def picture(self, x: float, y: float, image: Image.Image) -> None:
        file = io.BytesIO()
        image.save(file, "png")
        place = f'x="{x}" y="{y}" width="{SIDE}" height="{SIDE}" style="image-rendering:pixelated"'
        data = base64.b64encode(file.getvalue()).decode()
        self.parts.append(f'<image {place} href="data:image/png;base64,{data}"/>')

    def tokens(self, x: float, y: float, shown: np.ndarray, columns: int) -> None:
        """A class token above patch tokens, in rows of so many; those that are not shown are mask tokens."""
        self.box(x, y - 17, 13, 13, "#ffd966")
        for i, is_shown in enumerate(shown):
            self.box(x + 16 * (i % columns), y + 16 * (i // columns), 13, 13, "#6fa8dc" if is_shown else HIDDEN)

    def svg(self) -> str:
        tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="Helvetica, Arial, sans-serif">'
        defined = f'<defs>{tip}<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>'
        ground = f'<rect width="{self.width}" height="{self.height}" fill="white"/>'
        return "\n".join([head, defined, ground, *self.parts, "</svg>"]) + "\n"


def data_flow() -> str:
    pictures, to = panels(), Drawing(1220, 362)
    shown = visible(pictures["masked"]).ravel()
    to.picture(36, MIDDLE - SIDE / 2, pictures["original"])
    to.text(36 + SIDE / 2, 207, "images", "[N, 3, 224, 224], uint8")
    embed, encoder = (
        to.named(248, "patch_embed", "normalise, project", "the visible patches"),
        to.named(440, "encoder", fill=OTHERS),
    )
    scatter = to.named(588, "scatter_mask_tokens", "mask tokens, positions,", "all rows in place")
    decoder = to.named(838, "decoder", fill=OTHERS)
    loss = to.named(984, "linear_masked_mse", "head, targets and loss", "of the hidden patches")
    to.tokens(358, MIDDLE - 23, shown[shown], 1)
    to.text(364, 207, "[N, 1 + 49, 768]")
    to.tokens(714, MIDDLE - 23, shown, CELLS)
    to.text(745, 207, "[N, 1 + 196, 512]")
    to.text(1120, MIDDLE + 5, "loss", weight="bold")
    ends = [(144, embed[0]), (embed[1], 354), (375, encoder[0]), (encoder[1], scatter[0]), (scatter[1], 710)]
    for left, right in (*ends, (780, decoder[0]), (decoder[1], loss[0]), (loss[1], 1100)):
        to.arrow((left, MIDDLE), (right, MIDDLE))
    to.arrow((88, 82), (88, 34), (984, 34), (984, MIDDLE - 35))
    to.text(536, 24, "pixels of the hidden patches are read once, and no target is kept")
    to.picture(36, 238, pictures["masked"])
    to.picture(1082, 238, pictures["predicted"])
    to.text(1134, 230, "predicted")
    to.arrow((1056, MIDDLE + 33), (1056, 290), (1080, 290))
    to.text(
        560, 350, "drawn with 16 patches; shapes of ViT-B/16 at 224 x 224 pixels, 75 % hidden", size=12, fill="#666666"
    )
    masking = to.named(248, "random_masking", "or any mask of yours", y=290)
    to.arrow((masking[0], 290), (144, 290))
    to.arrow((248, 255), (248, MIDDLE + 36), dashed=True)
    for x in (588, 984):
        to.arrow((masking[1], 290), (x, 290), (x, MIDDLE + 36), dashed=True)
    for x, name in ((248, "ids_keep"), (588, "ids_restore"), (984, "ids_mask")):
        to.text(x + 40, 244, name, size=12)
    for x, fill, words in (
        (430, OURS, "an op of mae_kernels"),
        (640, OTHERS, "blocks of the transformer, as they are"),
    ):
        to.box(x, 320, 16, 16, fill)
        to.text(x + 28 + 3.3 * len(words), 332, words, size=12)
    return to.svg()


if __name__ == "__main__":
    (FOLDER / "data_flow.svg").write_text(data_flow(), encoding="utf-8")
