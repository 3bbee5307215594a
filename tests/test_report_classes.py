"""What evaluations leave, as a page shows it: by class, by confusion, by picture, whatever names classes have."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from pages import EVIL, Page, entry, png, written
from PIL import Image

from mae.report import figures
from mae.report.classes import read_predictions
from mae.report.figures import save_mistakes
from mae.report.page import write_report
from mae.report.style import STYLE

HEADER = "file,label,predicted,confidence,rank\r\n"


@pytest.fixture
def left(tmp_path):
    """A folder that an evaluation leaves: ``left(rows)`` of (label, predicted, rank), or of text as it stands."""

    def write(rows, command="finetune", end=""):
        quoted = (",".join('"' + str(x).replace('"', '""') + '"' for x in ("f", *row[:2], 0.5, row[2])) for row in rows)
        text = rows if isinstance(rows, str) else HEADER + "".join(f"{line}\r\n" for line in quoted)
        content = (text + end).encode(errors="surrogateescape")
        (tmp_path / f"predictions-{command}.csv").write_bytes(content)
        return tmp_path

    return write


def said(page: Page) -> list[str]:
    return page.texts["p"]


def tables(page: Page) -> list[ElementTree.Element]:
    """Every one has a caption, and every row and column a name with a scope."""
    found = [table for table in page.tree.iter("table") if table.find("caption") is not None]
    for table in found:
        columns = [x.get("scope") for x in table.find("thead").iter("th")]
        assert columns == ["col"] * len(columns)
        assert [x.get("scope") for x in table.find("tbody").iter("th")] == ["row"] * len(table.find("tbody"))
    return found


def test_numbers_are_those_of_a_count_by_hand(left):
    cats = [("cat", "cat", 0)] * 6 + [("cat", "dog", 1)] * 3 + [("cat", "eel", 7)]
    dogs = [("dog", "dog", 0)] * 1 + [("dog", "eel", 2)] * 2 + [("dog", "cat", 5)] * 2
    page = written(left(cats + dogs + [("cow 10", "cow 10", 0)] * 2 + [("cow 9", "cow 9", 0)]))
    assert "Top-1 55.6 %; pictures: 18; classes: 5." in said(page)  # 10 of 18
    assert page.texts["h2"][:3] == ["Evaluations", "Predictions of finetune", "Model"]
    accuracy, matrix = tables(page)
    assert [["".join(cell.itertext()) for cell in row] for row in accuracy.find("tbody")] == [
        ["dog", "5", "20.0 %", "cat (2 times)"],
        ["cat", "10", "60.0 %", "dog (3 times)"],
        ["cow 10", "2", "100.0 %", ""],
        ["cow 9", "1", "100.0 %", ""],
    ]
    widths = [x.get("style") for x in accuracy.iter("span") if x.get("style")]
    assert widths == ["width:20.0%", "width:60.0%", "width:100.0%", "width:100.0%"]
    names = ["cat", "cow 9", "cow 10", "dog", "eel"]
    assert [x.text for x in matrix.find("thead").iter("span")] == names
    rows = [[*row] for row in matrix.find("tbody")]
    assert {row[0].text: [int(cell.text) for cell in row[1:]] for row in rows} == {
        "cat": [6, 0, 0, 3, 1], "cow 9": [0, 1, 0, 0, 0], "cow 10": [0, 0, 2, 0, 0], "dog": [2, 0, 0, 1, 2],
        "eel": [0, 0, 0, 0, 0],
    }  # fmt: skip
    for i, row in enumerate(rows):
        counts = np.array([int(cell.text) for cell in row[1:]])
        heats = [float((cell.get("style") or "--heat:0").removeprefix("--heat:")) for cell in row[1:]]
        np.testing.assert_allclose(heats, np.sqrt(counts / max(1, counts.sum())), atol=0.006)
        for j, cell in enumerate(row[1:]):
            assert cell.get("class") == ("zero" if not counts[j] else "right" if i == j else "wrong")
    assert matrix.find("caption")[0].text.startswith(
        "Rows are what the pictures show, columns what they were taken for"
    )


def test_top_5_is_said_from_ten_classes_on(left):
    rows = [(f"c{i}", f"c{i}", 0) for i in range(8)]
    wrong = [("c8", "c0", 4), ("c8", "c0", 5)]
    assert "Top-1 80.0 %; pictures: 10; classes: 9." in said(written(left(rows + wrong)))
    page = written(left([*rows, *wrong, ("c9", "c9", 0)]))
    assert "Top-1 81.8 %, top-5 90.9 %; pictures: 11; classes: 10." in said(page)


def test_names_may_hold_anything(left):
    other = "new\nline, \udcff $x_1$ </table>"
    page = written(left([(EVIL, other, 3), (EVIL, EVIL, 0), (other, other, 0)], command="a <b>&"))
    shown = "new\\nline, \\xff $x_1$ </table>"
    assert "Predictions of a <b>&" in page.texts["h2"]
    assert [EVIL, "2", "50.0 %", f"{shown} (1 time)"] in page.rows
    (heads,) = ([x.text for x in table.find("thead").iter("span")] for table in tables(page)[1:])
    assert heads == ["a <script…t> \"&' b", "new\\nline…</table>"]
    many = [(f"{EVIL}{i}", f"{EVIL}{i + 1}", 1) for i in range(30)]
    page = written(left(many, command="a <b>&"))
    assert [f"{EVIL}0", f"{EVIL}1", "1", "100.0 %"] in page.rows


def test_a_thousand_classes_make_a_small_page(left):
    random = np.random.default_rng(0)
    labels, predicted = np.arange(100_000) % 1000, np.arange(100_000) % 1000
    is_wrong = random.random(100_000) < labels / 2000
    predicted = np.where(is_wrong, (labels + 1 + random.integers(0, 2, 100_000)) % 1000, labels)
    lines = (
        f"f{i}.png,n{x},n{y},0.5,{int(x != y)}\r\n" for i, (x, y) in enumerate(zip(labels, predicted, strict=True))
    )
    page = written(left(HEADER + "".join(lines)))
    assert len(page.source) < 300_000
    worst, others, confusions = tables(page)
    assert worst.find("caption").text == "The 20 worst of 1,000 classes."
    rows = [["".join(x.itertext()) for x in row] for table in (worst, others) for row in table.find("tbody")]
    assert len(worst.find("tbody")) == 20
    assert {row[0] for row in rows} == {f"n{i}" for i in range(1000)}
    shares = [float(row[2].removesuffix(" %")) for row in rows]
    assert shares == sorted(shares)
    for name, pictures, share, _ in rows[::97]:
        mine = labels == int(name[1:])
        assert (pictures, share) == (str(mine.sum()), f"{100 * (predicted == labels)[mine].mean():.1f} %")
    assert others in [x for details in page.tree.iter("details") for x in details.iter("table")]
    pairs, counts = np.unique(np.stack([labels, predicted])[:, is_wrong], axis=1, return_counts=True)
    listed = [[x.text for x in row] for row in confusions.find("tbody")]
    assert [int(row[2]) for row in listed] == sorted(counts.tolist(), reverse=True)[:20]
    by_pair = {(f"n{x}", f"n{y}"): count for (x, y), count in zip(pairs.T.tolist(), counts.tolist(), strict=True)}
    for label, other, count, share in listed:
        assert by_pair[label, other] == int(count)
        assert share == f"{int(count):.1f} %"  # each class has a hundred pictures
    assert confusions.find("caption").text.startswith(f"The 20 most frequent ones of {len(counts):,}.")


def test_a_page_has_at_most_a_thousand_rows_of_classes(left):
    page = written(left([(f"n{i}", f"n{i}", 0) for i in range(1200)]))
    worst, others = tables(page)
    assert (len(worst.find("tbody")), len(others.find("tbody"))) == (20, 980)
    assert others.find("caption").text == "The next ones, up to 1,000 classes, from the worst on."
    assert "No picture was taken for another class." in said(page)


def test_lines_that_cannot_be_read_are_counted_and_the_torn_one_is_named(left):
    bad = [
        "x",
        "f,a,a,0.5",
        "f,a,a,0.5,0,0",
        "f,a,a,high,0",
        "f,a,a,nan,0",
        "f,a,a,2,0",
        "f,a,a,0.5,-1",
        "f,a,a,0.5,1.5",
    ]
    lines = ["f,a,a,0.5,0", "", *bad, "f,a,b,0.5,1"]
    folder = left(HEADER + "\n".join(lines), end="\nf,b,b,0.25,1")
    page = written(folder)
    assert "Top-1 50.0 %; pictures: 2; classes: 2." in said(page)
    assert "Left out of predictions-finetune.csv: 8 lines that cannot be read." in said(page)
    assert "The last line of predictions-finetune.csv is cut off, as when a command is killed; it is left out." in said(
        page
    )
    page = written(left([("a", "a", 0), ("a", "b", 0), ("b", "b", 2)]))
    assert "Top-1 66.7 %; pictures: 3; classes: 2." in said(page)
    assert "In predictions-finetune.csv the rank contradicts the names in 2 lines; the names count." in said(page)
    # A quote that is never closed swallows lines, which are counted all the same.
    lost = read_predictions(
        left(HEADER + 'f,a,a,1,0\nf,"a,a,1,0\n' + "f,a,a,1,0\n" * 20_000) / "predictions-finetune.csv"
    )
    (words,) = lost.problems
    assert lost.counts.total() + int(re.search(r": (\d+) lines", words)[1]) == 20_002


@pytest.mark.parametrize("content", ["", "\0\0\udcff", HEADER[:-6], "a,b\r\n1,2\r\n", HEADER, "f,a,a,0.5,0\r\n"])
def test_a_file_of_nothing_is_said(left, content):
    page = written(left(content, command="knn"))
    words = "predictions-knn.csv does not begin with a line file,label,predicted,confidence,rank."
    assert (words in said(page)) == (content != HEADER)
    assert "predictions-knn.csv holds no predictions." in said(page)
    assert not tables(page)


def test_a_folder_of_an_evaluation_alone_and_one_of_no_predictions(left, tmp_path):
    folder = left([("a", "a", 0)], command="knn")
    left([("a", "b", 1)], command="linprobe")
    (folder / "results.json").write_text(json.dumps([{"command": "knn", "top1": 0.75}]))
    (folder / "predictions-folder.csv").mkdir()
    page = written(folder)
    assert page.texts["h2"] == ["Evaluations", "Predictions of knn", "Predictions of linprobe", "Model"]
    assert page.texts["title"] == [f"{folder.name}: an evaluation"]
    assert "metrics.jsonl" not in said(page)  # it is no run
    assert ["knn", "", "75.0 %", ""] in page.rows
    for file in folder.glob("predictions-*.csv"):
        file.rmdir() if file.is_dir() else file.unlink()
    assert written(folder).texts["h2"] == ["Evaluations", "Model"]
    (folder / "results.json").unlink()
    (folder / "report.html").unlink()
    with pytest.raises(ValueError):
        write_report(folder)


def test_pictures_of_mistakes_are_in_the_page_if_they_are_whole(left):
    folder = left([("a", "b", 1)])
    file = folder / "mistakes-finetune.png"
    assert written(folder).pictures == []
    file.write_bytes(png(7))
    page = written(folder)
    assert page.pictures == [png(7)]
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    file.write_bytes(png(7)[:-5])
    page = written(folder)
    assert page.pictures == []
    assert "mistakes-finetune.png left out: not a whole PNG file." in said(page)


@pytest.mark.parametrize(
    ("command", "unit"), [("finetune", "cross entropy"), ("linprobe", "cross entropy"), (None, "squared error")]
)
def test_curves_of_a_run_of_classes(tmp_path, command, unit):
    options = {"steps": 30} | ({"command": command} if command else {})
    (tmp_path / "recipe.json").write_text(json.dumps({"options": options}))
    lines = [entry(10), entry(20, val_loss=0.5, val_top1=0.25), entry(30, val_loss=0.25, val_top1=0.875)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(x)}\n" for x in lines))
    page = written(tmp_path)
    (svg,) = page.figures["Loss"].iter("svg")
    assert [x.text for x in svg.iter("text") if x.get("class") == "unit"] == [unit]
    np.testing.assert_allclose(page.values("Accuracy on held-out pictures"), [[20, 25], [30, 87.5]], atol=0.5)
    assert page.caption("Accuracy on held-out pictures") == "top-1: last 87.5, lowest 25, highest 87.5"
    np.testing.assert_allclose(page.values("Loss", 1), [[20, 0.5], [30, 0.25]], atol=0.05)
    assert ("There are no reconstructions to show." in said(page)) == (command is None)


def test_letters_on_the_strongest_colour_can_be_read():
    """4.5 times the luminance, as WCAG 2 asks for, on both colours of the matrix, in light and in dark."""

    def luminance(colour: np.ndarray) -> float:
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ (0.2126, 0.7152, 0.0722))

    def parts(colour: str) -> np.ndarray:
        digits = colour[1:] if len(colour) == 7 else "".join(2 * x for x in colour[1:])
        return np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])

    share = float(re.search(r"calc\(([\d.]+) \* var\(--heat", STYLE)[1])
    for part in STYLE.split("(prefers-color-scheme: dark)"):
        scheme = {name: parts(colour) for name, colour in re.findall(r"(--[\w-]+): (#\w+)", part)}
        for name in ("--one", "--two"):
            ground = share * scheme[name] + (1 - share) * scheme["--ground"]
            darker, lighter = sorted(map(luminance, (ground, scheme["--text"])))
            assert (lighter + 0.05) / (darker + 0.05) >= 4.5, name


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """``drawn(pictures, captions)`` saves mistakes; pictures as drawn and their captions come back, in that order."""
    kept = []
    kind = figures.Figure
    monkeypatch.setattr(figures, "Figure", lambda **how: kept.append(kind(**how)) or kept[-1])

    def draw(pictures, captions):
        save_mistakes(pictures, captions, tmp_path / "mistakes.png")
        with Image.open(tmp_path / "mistakes.png") as file:
            file.load()
            assert max(file.size) < 5000
        axes = [axis for axis in kept[-1].axes if axis.images]
        titles = [axis.title for axis in axes]
        assert not any(title.get_parse_math() for title in titles)
        return [axis.images[0].get_array() for axis in axes], [title.get_text() for title in titles], kept[-1]

    return draw


def test_the_most_confident_mistakes_are_drawn_first(drawn):
    pictures = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(30, 1, 4, 4) * 8
    shares = np.random.default_rng(0).permutation(30) / 30
    images, words, _ = drawn(pictures, [("Shirt", f"Coat {i}", share) for i, share in enumerate(shares.tolist())])
    order = np.argsort(-shares)[:24]
    assert words == [f"Shirt\ntaken for Coat {i}, {100 * shares[i]:.0f} %" for i in order]
    for image, i in zip(images, order, strict=True):
        np.testing.assert_allclose(image, 8 * i / 255, rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_names_of_mistakes_are_shown_as_they_are_and_shortened(drawn):
    captions = [("$x_$ $", "日本\n", 0.9), ("a name that is long at class 17", "a name that is long at class 18", 0.8)]
    images, words, _ = drawn(torch.full((2, 3, 8, 8), 255, dtype=torch.uint8), captions)
    assert words == [
        "$x_$ $\ntaken for 日本\\n, 90 %",
        "a name that is …ng at class 17\ntaken for a name …ass 18, 80 %",
    ]
    assert images[0].shape == (8, 8, 3)
    assert (np.asarray(images[0]) == 1).all()


def test_mistakes_of_any_shape_are_drawn(drawn):
    random = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 13, 6, 5), generator=random, dtype=torch.uint8)
    (first, _), _, figure = drawn(pictures, [("a", "b", 0.5)] * 2)
    np.testing.assert_allclose(first, pictures[0].float().mean(0) / 255, rtol=1e-5)
    assert figure.get_supxlabel() == "mean of 13 channels"
    clips = torch.randint(0, 256, (1, 1, 16, 6, 6), generator=random, dtype=torch.uint8)
    ((clip,), _, _) = drawn(clips, [("a", "b", 0.5)])
    assert clip.shape == (6, 8 * (6 + 2))
    np.testing.assert_allclose(clip[:, :6], clips[0, 0, 0] / 255, rtol=1e-6)
    for height, width in ((300, 2), (2, 300)):
        drawn(torch.zeros(1, 1, height, width, dtype=torch.uint8), [("a", "b", 0.5)])
    images, _, figure = drawn(torch.zeros(0, 3, 8, 8, dtype=torch.uint8), [])
    assert (images, [text.get_text() for text in figure.texts]) == ([], ["no mistakes"])
