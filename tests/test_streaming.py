"""Parquet files that are read row group by row group: their order, and that all is as with rows at any place."""

import io
import json
import os
import pickle
import re
from typing import ClassVar

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from PIL import Image
from runs import SMALL, assert_equal
from test_hugging_face import IMAGE, alone, refusal  # noqa: F401 (a fixture)

from mae.__main__ import main
from mae.data import (
    Batches,
    DataError,
    Part,
    Reading,
    TrainingImages,
    Unreachable,
    held_out,
    open_source,
    read_pictures,
    to_tensor,
)
from mae.data.order import Blocks, StreamOrder
from mae.data.streaming import Stream, read_footers

GROUP = 5  # rows of a row group
READING = Reading(1, image_size=(8, 8))


def numbered(folder, files: int = 3, rows: int = 17, broken: tuple[int, ...] = ()) -> str:
    """Images whose every pixel is their number."""
    (folder / "data").mkdir(parents=True)
    for i in range(files):
        held = []
        for number in range(i * rows, (i + 1) * rows):
            Image.new("L", (12, 12), number).save(stream := io.BytesIO(), "PNG")
            content = b"nothing" if number in broken else stream.getvalue()
            held.append({"bytes": content, "path": f"{number}.png"})
        table = datasets.Dataset.from_dict({"image": held}, features=IMAGE)
        table.to_parquet(folder / "data" / f"train-{i:05}-of-{files:05}.parquet", batch_size=GROUP)
    return f"hf:{folder}:streaming"


def numbers(images: TrainingImages, steps: range, batch_size: int = 6, **options) -> list[list[int]]:
    batches = Batches(images, batch_size, steps, **options)
    return [batch.to("cpu").images[:, 0, 4, 4].tolist() for batch in batches]


def opened(order: StreamOrder, ends: np.ndarray, steps: range, rows: slice = slice(None)) -> list[int]:
    """How many blocks a process opens in each step, of which it keeps those of the step before."""
    before, counts = set(), []
    for step in steps:
        blocks = {*np.searchsorted(ends, [index for _, index in order.keys(step, rows)], side="right").tolist()}
        counts.append(len(blocks - before))
        before = blocks
    return counts


@pytest.mark.parametrize("memory", [0, 1 << 28, 1 << 40])
@pytest.mark.parametrize("sizes", [[7] * 12, [1, 0, 30, 2, 9], [3]])
@pytest.mark.parametrize("batch_size", [8, 5])
def test_each_epoch_holds_every_picture_once(sizes, memory, batch_size):
    count, blocks = sum(sizes), Blocks(np.array(sizes), np.full(len(sizes), memory))
    order = StreamOrder(blocks, batch_size, seed=1)
    keys = [key for step in range(2 * count) for key in order.keys(step)]
    assert keys[: 2 * count] != sorted(keys[: 2 * count]) or count < 4
    for epoch in range(batch_size):
        assert sorted(keys[epoch * count : (epoch + 1) * count]) == [(epoch, index) for index in range(count)]
    assert batch_size % order.open_at_once == 0
    if count > 9:
        assert [index for _, index in keys[:count]] != [index for _, index in keys[count : 2 * count]]
        assert StreamOrder(blocks, batch_size, seed=2).keys(0) != order.keys(0)


@pytest.mark.parametrize("count", [128, 131])
def test_blocks_are_opened_once_and_not_together(count):
    sizes = np.full(count, 20)
    order = StreamOrder(Blocks(sizes, np.full(count, 64 << 20)), batch_size=32)
    assert order.open_at_once == 16
    steps, ends = range(count * 20 // 32), np.cumsum(sizes)
    one = opened(order, ends, steps)
    assert one[0] == 16
    assert max(one[1:]) <= 6  # 32 pictures are those of 1.6 blocks
    assert sum(one) <= count + 2 * 16
    shares = [sum(opened(order, ends, steps, slice(8 * i, 8 * i + 8))) for i in range(4)]
    assert sum(shares) <= count + 2 * 16 + 4
    assert max(shares) - min(shares) <= 6
    later = range(3 * len(steps), 4 * len(steps))  # in an epoch that begins within a batch
    assert sum(sum(opened(order, ends, later, slice(8 * i, 8 * i + 8))) for i in range(4)) <= count + 2 * 16 + 8 * 4


def test_pictures_of_a_block_are_mixed():
    order = StreamOrder(Blocks(np.full(8, 50), np.full(8, 1 << 40)), batch_size=10)
    assert order.open_at_once == 1
    epochs = [order.epoch(epoch).reshape(8, 50) for epoch in range(2)]
    assert sorted(epochs[0][0] % 50) == [*range(50)]
    assert (np.abs(np.diff(epochs[0][0])) == 1).sum() < 10
    blocks = [(epoch[:, 0] // 50).tolist() for epoch in epochs]
    assert blocks[0] != blocks[1]
    assert [*range(8)] not in blocks


def test_a_stream_holds_what_the_table_holds(tmp_path):
    where = numbered(tmp_path / "set")
    stream, table = open_source(where), open_source(where.removesuffix(":streaming"))
    assert isinstance(stream, Stream)
    assert len(stream) == len(table) == 51
    assert stream.blocks.sizes.tolist() == [5, 5, 5, 2] * 3
    for source in (stream, pickle.loads(pickle.dumps(stream))):
        assert [int(to_tensor(source.read(i, READING))[0, 0, 0]) for i in range(51)] == [*range(51)]
    assert stream.name(20) == f"row 20 of {where}, 20.png"
    one = open_source(f"hf:{tmp_path}/set/data/train-00001-of-00003.parquet:streaming")
    assert len(one) == 17
    assert one.name(3) == f"row 3 of {one.where}"
    one.read(3, READING)
    assert one.name(3) == f"row 3 of {one.where}, 20.png"


def test_nothing_is_copied_to_the_cache(tmp_path):
    images = TrainingImages(open_source(numbered(tmp_path / "set")), READING)
    assert len(numbers(images, range(2))) == 2
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.suffix == ".arrow"]


def test_batches_are_those_of_any_process_and_worker_and_of_any_step(tmp_path):
    images = TrainingImages(open_source(numbered(tmp_path / "set", broken=(3, 30))), READING, seed=2)
    straight = numbers(images, range(17))
    first, second = [x for batch in straight for x in batch][:51], [x for batch in straight for x in batch][51:]
    assert {*first} == {*second} == {*range(51)} - {3, 30}
    assert first != second
    assert numbers(images, range(5, 17), workers=2) == straight[5:]
    halves = [numbers(images, range(17), rows=rows, workers=1) for rows in (slice(0, 3), slice(3, 6))]
    assert [[*a, *b] for a, b in zip(*halves, strict=True)] == straight
    batches = Batches(images, 6, range(9), workers=1)
    assert len(list(batches)) == 9
    assert [x.split(",")[0] for x in sorted(batches.unreadable)] == [
        f"cannot read row {i} of {images.source.where}" for i in (3, 30)
    ]


def test_what_replaces_a_broken_picture_lies_beside_it(tmp_path, monkeypatch):
    source, read, block = open_source(numbered(tmp_path / "set", broken=(5, 6, 8))), [], Stream._block
    images = TrainingImages(source, READING)
    monkeypatch.setattr(Stream, "_block", lambda self, number: read.append(number) or block(self, number))
    samples = [images[(0, index)] for index in (5, 6, 8)]
    assert {sample.index for sample in samples} <= {7, 9}
    assert read == [1]
    values = [{"bytes": b"nothing", "path": f"{i}.png"} for i in range(9)]
    values[8]["bytes"] = source.value(17)["bytes"]
    pq.write_table(pa.table({"image": pa.array(values)}), tmp_path / "x.parquet", row_group_size=3)
    sample = TrainingImages(open_source(f"hf:{tmp_path}/x.parquet:streaming"), READING)[(0, 4)]
    assert sample.index == 8  # of another row group, where its own has none
    assert {x.split(" of ")[0] for x in sample.problems[:3]} == {f"cannot read row {i}" for i in (3, 4, 5)}


def test_rows_that_are_no_text_are_passed_over(tmp_path):
    Image.new("L", (12, 12), 7).save(good := io.BytesIO(), "PNG")
    paths = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a.png", b"caf\xe9.png"]).buffers())
    column = pa.StructArray.from_arrays([pa.array([good.getvalue()] * 2), paths], ["bytes", "path"])
    pq.write_table(pa.table({"image": column}), tmp_path / "x.parquet")
    images = TrainingImages(open_source(f"hf:{tmp_path}/x.parquet:streaming"), READING)
    batches = Batches(images, 2, range(2))
    assert [batch.to("cpu").images.unique().tolist() for batch in batches] == [[7], [7]]
    (problem,) = batches.unreadable
    assert problem.startswith(f"cannot read row 1 of hf:{tmp_path}/x.parquet:streaming: 'utf-8' codec can't decode")


def test_names_cost_no_reading(tmp_path, monkeypatch):
    source = open_source(numbered(tmp_path / "set"))
    monkeypatch.setattr(Stream, "_block", None)
    assert source.name(50) == f"row 50 of {source.where}"


def test_row_groups_are_read_once_an_epoch(tmp_path, monkeypatch):
    source, read, block = open_source(numbered(tmp_path / "set")), [], Stream._block
    monkeypatch.setattr(Stream, "_block", lambda self, number: read.append(number) or block(self, number))
    monkeypatch.setattr("mae.data.order._IN_MEMORY", source.blocks.memory.sum() // 5)
    images = TrainingImages(source, READING)
    assert images.order(6).open_at_once == 2
    assert len(numbers(images, range(8))) == 8
    assert {*read} == {*range(12)}
    assert len(read) <= 12 + 2 * 2


class Remote(AbstractFileSystem):
    """Files of this disk as those of a network, in a buffer of fsspec's."""

    protocol = "remote"
    fetched: ClassVar[list[int]] = []

    def info(self, path, **_):
        return {"name": path, "size": os.path.getsize(path), "type": "file"}

    def _open(self, path, mode="rb", **options):
        return RemoteFile(self, path, mode, **options)


class RemoteFile(AbstractBufferedFile):
    def _fetch_range(self, start, end):
        self.fs.fetched.append(end - start)
        with open(self.path, "rb") as file:
            file.seek(start)
            return file.read(end - start)


def test_no_more_than_a_row_group_is_fetched(tmp_path):
    fsspec.register_implementation("remote", Remote, clobber=True)
    numbered(tmp_path / "set", files=1, rows=200)
    file = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    stream = Stream(read_footers([f"remote://{file}"]), "image", "x")
    Remote.fetched.clear()
    assert int(to_tensor(stream.read(102, READING))[0, 0, 0]) == 102
    assert 0 < sum(Remote.fetched) <= 1.01 * stream.blocks.memory[20] + 100
    assert len(Remote.fetched) <= 2


def test_what_is_held_out_lies_in_few_row_groups_but_not_in_the_fewest(tmp_path, monkeypatch):
    source = open_source(numbered(tmp_path / "set"))
    train, held = held_out(source, 9, seed=0)
    assert (held.blocks.sizes > 0).sum() > 4
    assert held_out(source, 9, seed=0)[1].numbers == held.numbers != held_out(source, 9, seed=1)[1].numbers
    monkeypatch.setattr("mae.data.sources._LEAST_BLOCKS", 2)
    train, held = held_out(source, 9, seed=0)
    assert sorted([*train.numbers, *held.numbers]) == [*range(51)]
    assert (held.blocks.sizes > 0).sum() <= 3
    assert train.blocks.sizes.sum() == 42
    assert (train.blocks.memory == source.blocks.memory).all()
    seen = [x for batch in numbers(TrainingImages(train, READING), range(7), workers=1) for x in batch]
    assert sorted(seen) == train.numbers
    assert Part(source, [0, 7, 50]).blocks.sizes.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]


class _Keyless(TrainingImages):
    """Whose workers read for themselves, as in place of a broken picture."""

    def with_contents(self, steps):
        return steps


@pytest.mark.parametrize("workers", [0, 1])
def test_a_row_group_that_cannot_be_read_stops_the_stream(tmp_path, workers):
    where = numbered(tmp_path / "set")
    source, file = open_source(where), tmp_path / "set" / "data" / "train-00001-of-00003.parquet"
    images, held = TrainingImages(source, READING), file.read_bytes()
    file.unlink()
    with pytest.raises(Unreachable) as gone:
        numbers(images, range(9), workers=workers)
    assert str(gone.value).startswith("cannot read rows ")
    assert str(gone.value).endswith(f" of {where}, from {file}: No such file or directory")
    file.write_bytes(held[:4] + bytes(len(held) - 4))
    said = f"^cannot read rows [0-9]+ to [0-9]+ of {where}, from {file}: "
    with pytest.raises(Unreachable, match=said):
        numbers(images, range(9), workers=workers)
    with pytest.raises(Unreachable, match=said):
        list(read_pictures(source, READING))
    with pytest.raises(DataError, match=said):  # a worker that looks for another picture finds none
        list(Batches(_Keyless(source, READING), 51, range(1), workers=workers))


def test_what_cannot_be_streamed_is_refused(tmp_path):
    where = numbered(tmp_path / "set", 1)
    table = datasets.load_dataset("parquet", data_files=str(tmp_path / "set" / "data" / "*.parquet"), split="train")
    table.save_to_disk(tmp_path / "saved")
    arrow = "holds Arrow files, which are read where they lie; leave :streaming out"
    assert refusal(f"hf:{tmp_path}/saved:streaming") == f"{tmp_path}/saved {arrow}"
    file = next((tmp_path / "saved").glob("*.arrow"))
    assert refusal(f"hf:{file}:streaming") == f"{file} {arrow}"
    assert refusal(f"{where}:valid") == f"{tmp_path}/set holds no split valid, but train"
    assert refusal(f"{where}:train[:3]") == "a stream is of a whole split, and train[:3] is a part of one"
    assert refusal("hf::streaming") == "hf::streaming names no dataset"
    assert refusal(f"{where}:column=x") == f"{where}:column=x has no column x, but image"
    assert refusal(f"hf:{tmp_path}/gone:streaming") == f"there is no file or folder {tmp_path}/gone"
    (tmp_path / "pictures").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "pictures" / "x.png")
    assert refusal(f"hf:{tmp_path}/pictures:streaming") == (
        f"{tmp_path}/pictures holds {tmp_path}/pictures/x.png, and only Parquet is streamed"
    )
    datasets.Dataset.from_dict({"image": []}, features=IMAGE).to_parquet(tmp_path / "empty.parquet")
    assert refusal(f"hf:{tmp_path}/empty.parquet:streaming") == f"hf:{tmp_path}/empty.parquet:streaming holds no rows"
    other = tmp_path / "set" / "data" / "train-00001-of-00001.parquet"
    for columns, said in (
        ({"x": [1]}, f"{other} has 0 columns image"),
        ({"image": ["x"]}, f"column image of {other} holds no files, but string"),
        ({"image": [{"path": "x"}]}, f"column image of {other} holds no files, but struct<path: string>"),
    ):
        pq.write_table(pa.table(columns), other)
        assert refusal(where) == said
    other.unlink()
    (tmp_path / "a:b").mkdir()
    (tmp_path / "set").rename(tmp_path / "a:b" / "set")
    assert len(open_source(f"hf:{tmp_path}/a:b/set:streaming")) == 17
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    assert refusal(f"hf:{tmp_path}/x.parquet:streaming").startswith(f"cannot open {tmp_path}/x.parquet: ")
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--data", f"hf:{tmp_path}/x.parquet:streaming", "--out", str(tmp_path / "run")])
    assert str(stop.value.code).startswith(f"mae: cannot open {tmp_path}/x.parquet: ")


def test_a_run_whose_stream_breaks_off_goes_on_as_one_that_never_did(tmp_path, monkeypatch, capsys):
    where, straight, broken = numbered(tmp_path / "set"), tmp_path / "straight", tmp_path / "broken"
    command = [
        "pretrain",
        "--data",
        where,
        *SMALL,
        "--workers",
        "1",
        "--val-share",
        "0.2",
        "--steps",
        "9",
        "--log-every",
        "1",
    ]
    main([*command, "--out", str(straight)])
    assert "10 images held out. The stream mixes 4 of its 12 row groups at a time" in capsys.readouterr().out
    assert json.loads((straight / "recipe.json").read_text())["data"]["open_at_once"] == 4
    reads, block = [], Stream._block

    def lost(self, number):
        reads.append(number)
        if len(reads) > 8:
            raise Unreachable("the network is gone")
        return block(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(Stream, "_block", lost)
        with pytest.raises(SystemExit) as stop:
            main([*command, "--out", str(broken)])
    said = str(stop.value.code)
    assert re.match(r"mae: stopped after step [1-8] of 9: the network is gone\. The checkpoint is in ", said), said
    warned = re.findall(r"no (validation|picture) of step [1-8]: the network is gone", capsys.readouterr().err)
    assert warned == ["validation", "picture"]
    assert len(reads) < 16  # none is asked for again and again
    main([*command, "--out", str(broken), "--resume"])
    assert_equal(straight, broken)
    command[2] = where.removesuffix(":streaming")
    with pytest.raises(SystemExit) as stop:
        main([*command, "--out", str(broken), "--resume"])
    assert "was started on other images: fingerprint was" in str(stop.value.code)


def test_features_that_only_the_schema_tells(tmp_path):
    where = numbered(tmp_path / "set", 1)
    file = tmp_path / "set" / "data" / "train-00000-of-00001.parquet"
    plain = pq.read_table(file).replace_schema_metadata(None)
    pq.write_table(plain, tmp_path / "plain.parquet", row_group_size=4)
    stream = open_source(f"hf:{tmp_path}/plain.parquet:streaming")
    assert torch.equal(to_tensor(stream.read(9, READING)), to_tensor(open_source(where).read(9, READING)))
