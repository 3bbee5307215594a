"""What features are worth: predictions and their ranks, neighbours, probes, and whole pictures read in order."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Barrier, get_ident
from typing import Any

import numpy as np
import pytest
import torch
from pictures import good_folder, unreadable_files
from torch.nn import functional as F

from mae import MAEConfig
from mae.data import DataError, DataWarning, ImageFiles, Labelled, Reading, Unreadable, find_images, whole_batches
from mae.evaluation import probe
from mae.evaluation.features import features_of, labelled_features
from mae.evaluation.predictions import Evaluation, Predictions, measures
from mae.evaluation.probe import linear_probe, nearest_neighbours
from mae.model import Classifier, HeadConfig, VisionTransformer
from mae.training.parallel import Processes

TINY = MAEConfig(image_size=16, patch_size=8, embed_dim=8, depth=1, num_heads=2)
READING = Reading(image_size=(16, 16))


def of(probabilities, labels) -> Predictions:
    return Predictions.of(torch.tensor(probabilities), torch.tensor(labels), torch.arange(len(labels)))


@pytest.fixture
def pictures(tmp_path) -> Labelled:
    """Nine readable pictures of two classes, and four that are not, among those of the second."""
    for name, count in (("a", 4), ("b", 5)):
        good_folder(tmp_path / name, count)
    unreadable_files(tmp_path / "b")
    files = find_images(tmp_path)
    labels = np.array([int(file.parent.name == "b") for file in files])
    return Labelled(ImageFiles(files), labels, ("a", "b"), "folder")


def classifier(classes: int = 2) -> Classifier:
    model = Classifier(TINY, HeadConfig(tuple("abcdefghijkl"[:classes])))
    torch.nn.init.normal_(model.head.weight)
    return model


def test_ranks_and_ties():
    found = of([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.4, 0.4, 0.2], [0.2, 0.2, 0.6], [0.0, 1.0, 0.0]], [1, 0, 1, 1, 2])
    assert found.ranks.tolist() == [1, 0, 1, 2, 2]
    assert found.predicted.tolist() == [0, 0, 0, 2, 1]
    assert ((found.ranks == 0) == (found.predicted == found.labels)).all()
    assert (found.top(1), found.top(2), found.top(3)) == (0.2, 0.6, 1.0)
    assert found.losses[:4] == pytest.approx(-np.log([0.3, 0.4, 0.4, 0.2]), rel=1e-6)
    assert np.isfinite(found.losses[4])


def test_top_5_is_said_from_ten_classes_on():
    assert (measures(9), measures(10)) == ((1,), (1, 5))
    probabilities = np.linspace(0.05, 0.15, 10, dtype=np.float32)[None].repeat(10, 0)
    assert of(probabilities, [*range(10)]).top(5) == 0.5


def test_nan_is_no_right_prediction():
    found = of([[np.nan, np.nan], [np.nan, np.nan]], [0, 1])
    assert found.ranks.tolist() == [0, 1]  # as of equal probabilities
    assert np.isfinite(found.losses).all()


def test_mistakes_by_confidence():
    found = of([[0.4, 0.6], [0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.4, 0.6]], [0, 0, 0, 1, 0])
    assert found.mistakes().tolist() == [2, 0, 3, 4]
    assert len(of([[1.0, 0.0]], [0]).mistakes()) == 0


def test_joined_in_the_order_of_numbers():
    whole = of(torch.rand(7, 3).softmax(1).tolist(), [0, 1, 2, 0, 1, 2, 0])
    parts = [Predictions(*(x[places] for x in whole)) for places in ([4, 2], [6], [0, 5, 1, 3])]
    assert all(np.array_equal(x, y) for x, y in zip(Predictions.joined(parts), whole, strict=True))


def plain_neighbours(train, labels, test, k, temperature):
    """Loops in float64."""
    train, test = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (train, test))
    shares = np.zeros((len(test), labels.max() + 1))
    for i, x in enumerate(test):
        similarities = train @ x
        for j in np.argsort(-similarities)[:k]:
            shares[i, labels[j]] += np.exp(similarities[j] / temperature)
    return shares / shares.sum(1, keepdims=True)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 26])
def test_neighbours_are_those_of_plain_loops(monkeypatch, chunk):
    monkeypatch.setattr(probe, "_CHUNK", chunk)
    generator = np.random.default_rng(0)
    train, test, labels = generator.normal(size=(30, 5)), generator.normal(size=(11, 5)), generator.integers(0, 4, 30)
    train[:10] *= 1e-3  # the direction alone counts
    found = nearest_neighbours(*map(torch.from_numpy, (train, labels, test)), [1, 7, 1000], 0.2)
    assert [*found] == [1, 7, 1000]
    for k, shares in found.items():
        assert shares.shape == (11, 4)
        assert shares.numpy() == pytest.approx(plain_neighbours(train, labels, test, k, 0.2), abs=1e-4)


def test_pictures_without_features_have_all_neighbours_alike():
    train, labels = torch.eye(4), torch.tensor([0, 0, 0, 1])
    shares = nearest_neighbours(torch.cat([train, 0 * train]), labels.repeat(2), torch.zeros(1, 4), [8])[8]
    assert shares.tolist() == [[0.75, 0.25]]


def test_a_linear_probe_gives_probabilities_of_all_classes():
    generator = np.random.default_rng(0)
    centres, labels = np.array([[0, 0], [500, 0], [0, 0.5]]), np.arange(60) % 3  # one axis dwarfs the other
    train, test = (centres[labels] + generator.normal(size=(60, 2)) * [10, 0.01] for _ in range(2))
    shares = linear_probe(train.astype(np.float32), labels, test.astype(np.float32))
    assert shares.shape == (60, 3)
    assert shares.sum(1) == pytest.approx(1)
    assert (shares.argmax(1) == labels).all()


def counted_reads(monkeypatch) -> Counter:
    reads, read = Counter(), ImageFiles.read

    def counting(self, index, *arguments):
        reads[index] += 1
        return read(self, index, *arguments)

    monkeypatch.setattr(ImageFiles, "read", counting)
    return reads


def test_features_of_two_models_take_one_reading(pictures, monkeypatch):
    models = [VisionTransformer(TINY).train(), VisionTransformer(TINY)]
    reads = counted_reads(monkeypatch)
    with pytest.warns(DataWarning) as warned:
        found = labelled_features(models, pictures, READING, batch_size=4)
    assert [str(w.message).split(";")[0] for w in warned] == ["4 of 13 files cannot be read"]
    assert reads.total() == 14  # and one at first, to see whether any can be read
    assert found.labels.tolist() == [0] * 4 + [1] * 5
    assert pictures.labels[found.numbers].tolist() == found.labels.tolist()
    images = torch.cat([batch.images for batch in whole_batches(pictures.source, READING, 3, warn=False)])
    for model, features in zip(models, found.features, strict=True):
        assert features == pytest.approx(model.forward_features(images)[:, 1:].mean(1).detach().numpy(), abs=1e-5)


def test_a_class_that_cannot_be_read_is_refused(pictures):
    labels = np.array([0] * 5 + [1] * 8)
    labels[[i for i in range(13) if pictures.source.files[i].name == "empty.png"]] = 2
    broken = Labelled(pictures.source, labels, ("a", "b", "bro\nken"), "folder")
    with pytest.warns(DataWarning), pytest.raises(DataError) as error:
        labelled_features([VisionTransformer(TINY)], broken, READING)
    assert str(error.value) == "no picture of bro\\nken in folder can be read"


def test_features_that_are_not_finite_are_refused(pictures):
    model = VisionTransformer(TINY)
    model.norm.bias.data[0] = torch.nan
    with pytest.warns(DataWarning), pytest.raises(DataError) as error:
        labelled_features([VisionTransformer(TINY), model], pictures, READING)
    assert str(error.value) == "the encoder's features of folder are not all finite"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_whole_pictures_come_in_order(pictures, workers, batch_size):
    with pytest.warns(DataWarning, match="4 of 13 files cannot be read"):
        batches = [*whole_batches(pictures.source, READING, batch_size, workers=workers)]
    numbers = torch.cat([batch.numbers for batch in batches]).tolist()
    assert numbers == [i for i in range(13) if pictures.source.files[i].name.startswith("photo")]
    assert all(batch.images.shape == (len(batch.numbers), 3, 16, 16) for batch in batches)
    some = [*whole_batches(pictures.source, READING, 2, numbers=[8, 0, 5], workers=workers, warn=False)]
    assert torch.cat([batch.numbers for batch in some]).tolist() == [8, 0]  # 5 is broken
    assert torch.equal(torch.cat([batch.images for batch in batches])[0], torch.cat([x.images for x in some])[1])


def test_whole_pictures_of_broken_files_alone_are_refused_at_once(tmp_path):
    unreadable_files(tmp_path)
    with pytest.raises(Unreadable) as error:
        next(whole_batches(ImageFiles(find_images(tmp_path)), READING, 4))
    assert str(error.value).startswith("none of the 4 files can be read; first: cannot read ")


def plain_predictions(model, pictures) -> Predictions:
    parts = []
    with torch.no_grad():
        for image, number in ((x.images, x.numbers) for x in whole_batches(pictures.source, READING, 1, warn=False)):
            shares = F.softmax(model.eval()(image), 1)
            parts.append(Predictions.of(shares, torch.from_numpy(pictures.labels)[number], number))
    return Predictions(*map(np.concatenate, zip(*parts, strict=True)))


def assert_same(found: Predictions, expected: Predictions) -> None:
    for name, x, y in zip(Predictions._fields, found, expected, strict=True):
        assert x == pytest.approx(y, rel=1e-4), name


def test_an_evaluation_is_a_plain_loop_and_warns_once(pictures, recwarn):
    model = classifier()
    expected = plain_predictions(model, pictures)
    evaluation = Evaluation(pictures, READING, batch_size=4)
    for _ in range(2):
        assert_same(evaluation(model.train()), expected)
        assert model.training
    assert len(recwarn) == 1
    scalars = evaluation.scalars(model)
    assert scalars == pytest.approx({"val_loss": expected.losses.mean(), "val_top1": expected.top(1)}, rel=1e-5)


class Meeting:
    """Where processes, here threads, hand each other what they have."""

    def __init__(self, count: int):
        self.values, self.barrier = [None] * count, Barrier(count, timeout=20)

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.values[rank] = value
        self.barrier.wait()
        values = [*self.values]
        self.barrier.wait()
        return values


@dataclass(frozen=True)
class Thread(Processes):
    meeting: Meeting | None = None

    def gather(self, value):
        return self.meeting.exchange(self.rank, value)

    def most(self, value):
        return max(self.gather(value))


@pytest.mark.parametrize("count", [2, 4, 20])
def test_an_evaluation_in_uneven_shares_is_that_of_one_process(pictures, count, recwarn):
    """Some have broken files alone, or nothing: they take part in as many forward passes, with a blank."""
    model, passes, meeting = classifier().eval(), [], Meeting(count)
    expected = plain_predictions(model, pictures)
    model.register_forward_hook(lambda *_: passes.append(get_ident()))

    def evaluated(rank: int) -> Predictions:
        return Evaluation(pictures, READING, Thread(rank, count, meeting=meeting), batch_size=2)(model)

    with ThreadPoolExecutor(count) as pool:
        for found in pool.map(evaluated, range(count)):
            assert_same(found, expected)
    assert len({*Counter(passes).values()}) == 1
    assert len({*passes}) == count


def test_a_model_trains_on_where_its_test_pictures_cannot_be_had(pictures, monkeypatch):
    model = classifier().train()
    monkeypatch.setattr("mae.evaluation.predictions.whole_batches", lambda *_, **__: iter(lambda: 1 / 0, None))
    with pytest.raises(ZeroDivisionError):
        Evaluation(pictures, READING)(model)
    assert model.training


def test_features_of_a_classifier_are_what_its_head_sees():
    model, images = Classifier(TINY, HeadConfig(("a", "b"), fc_norm=True)).eval(), torch.rand(3, 3, 16, 16)
    torch.nn.init.normal_(model.fc_norm.weight)
    assert torch.equal(model.head(features_of(model, images)), model(images))
    assert not torch.equal(features_of(model, images, "token"), features_of(model, images))


def test_a_number_of_neighbours_that_is_asked_for_twice_counts_once():
    x, labels = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 0, 1])
    assert nearest_neighbours(x, labels, x, (3, 3))[3].shape == (6, 2)
