"""What the network families draw from: sampled settings, text, pictures; and packages that are missing."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from networks import LANES, NETWORKS, SAMPLED, SMALL, draw, lane
from tables import generator
from torch.func import vmap

import l2o.fused
from l2o.rules import MLP
from l2o.tasks import CharRNN, CoordinateMLP, ImageMLP
from l2o.tasks.data import image_split
from l2o.tasks.pictures import PICTURES, pictures, pixel_split
from l2o.tasks.text import BLOCK, VOCABULARY, _load_topics, encode, text_split
from l2o.types import DataError
from l2o.unroll import expand_theta, sample_runs, unroll

NORMED = [name for name in NETWORKS if "sampled" in name]


@pytest.mark.parametrize("name", NORMED)
def test_the_rest_of_a_batch_has_no_part_in_the_loss(name: str) -> None:
    family = NETWORKS[name]
    params, buffers, data, batch = draw(family)
    for k in range(LANES):
        size = int(data["effective_batch"][k])
        assert 3 <= size <= 7
        assert torch.equal(batch["share"][k], (torch.arange(8) < size) / size)
        mine = lane([params, buffers, data, batch], k)
        cut = {key: t[:size] for key, t in mine.pop().items() if key != "share"}
        torch.testing.assert_close(vmap(family.loss)(params, buffers, data, batch)[0][k], family.loss(*mine, cut)[0])


def test_batches_are_of_all_sizes_of_their_range() -> None:
    sizes = ImageMLP(effective_batch=(3, 7)).sample(generator(), 2000)["effective_batch"]
    assert sizes.unique().tolist() == [3, 4, 5, 6, 7]
    # As of a logarithm that is uniform from that of 3 to that of 8, rounded down.
    assert (sizes == 3).double().mean() == pytest.approx(math.log(4 / 3) / math.log(8 / 3), abs=0.04)


def test_validation_batches_are_full() -> None:
    assert draw(ImageMLP(**SAMPLED), "valid")[3].keys() == {"x", "y"}


def test_nothing_is_sampled_by_default() -> None:
    _, buffers, data, batch = draw(ImageMLP())
    assert (buffers, data.keys(), batch.keys()) == ({}, {"lane"}, {"x", "y"})


def test_a_subset_is_the_lanes_own() -> None:
    family = ImageMLP(subset=(4, 40), batch_size=1000)
    _, _, data, batch = draw(family, lanes=20)
    seen = [{tuple(image) for image in images.tolist()} for images in batch["x"]]
    assert [len(images) for images in seen] == data["subset"].tolist()
    assert data["subset"].min() >= 4
    assert data["subset"].max() <= 40
    assert len(data["subset"].unique()) > 5
    assert not any(seen[i] == seen[j] for i in range(20) for j in range(i))


def test_a_subset_larger_than_the_set_is_the_set() -> None:
    train = image_split("digits", "meta_train", "train", "cpu")[0]
    assert draw(ImageMLP(subset=(5000, 9000)))[2]["subset"].tolist() == [len(train)] * LANES


def test_label_noise_is_a_fraction_for_good() -> None:
    family = ImageMLP(label_noise=(0.2, 0.4), batch_size=4000)
    images, labels = image_split("digits", "meta_train", "train", "cpu")
    true = {tuple(image): int(label) for image, label in zip(images.tolist(), labels, strict=True)}
    data = family.sample(generator(), LANES)
    wrong = []
    for fraction, x, y in zip(data["label_noise"], *family.batch(data, "train", generator()).values(), strict=True):
        assert 0.2 <= fraction <= 0.4
        given: dict[tuple[float, ...], int] = {}
        assert all(
            given.setdefault(tuple(image), int(label)) == label for image, label in zip(x.tolist(), y, strict=True)
        )
        wrong.append({image for image, label in given.items() if label != true[image]})
        assert len(wrong[-1]) / len(given) == pytest.approx(0.9 * fraction.item(), abs=0.05)  # a tenth hits by chance
    assert wrong[0] != wrong[1]
    valid = family.batch(data, "valid", generator())
    assert torch.equal(valid["y"], ImageMLP(batch_size=4000).batch(data, "valid", generator())["y"])


def test_scales_multiply() -> None:
    plain = ImageMLP(norm="layer")
    scaled = ImageMLP(norm="layer", init_scale=(2.0, 4.0), input_scale=(0.1, 0.3))
    data = scaled.sample(generator(), LANES)
    for name, low, high in (("init_scale", 2.0, 4.0), ("input_scale", 0.1, 0.3)):
        assert ((low <= data[name]) & (data[name] <= high)).all()
        assert len(data[name].unique()) == LANES
    one, two = plain.init({"lane": data["lane"]}, generator(1))[0], scaled.init(data, generator(1))[0]
    for k, p in one.items():
        factor = 1.0 if k in ("0.gain", "0.offset") else data["init_scale"].view(-1, *[1] * (p.ndim - 1))
        torch.testing.assert_close(two[k], factor * p)
    x = plain.batch({"lane": data["lane"]}, "train", generator(1))["x"]
    torch.testing.assert_close(scaled.batch(data, "train", generator(1))["x"], data["input_scale"].view(-1, 1, 1) * x)


@pytest.mark.parametrize("setting", SAMPLED)
def test_what_is_sampled_is_seen_whatever_computes_the_steps(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels know plain perceptrons on plain batches, and must not be asked for others."""
    family, rule = ImageMLP(width=4, **SMALL, **{setting: SAMPLED[setting]}), MLP()
    theta = expand_theta(rule.init_theta(generator()), LANES)
    found = []
    for _ in range(2):
        g = generator(1)
        with torch.no_grad():
            state = sample_runs(rule, theta, family, torch.full((LANES,), 9), g)
            found.append(unroll(rule, theta, family, state, 3, g)[1])
        for table in (l2o.fused.BATCHES, l2o.fused.GRADIENTS):
            monkeypatch.delitem(table, ImageMLP, raising=False)
    torch.testing.assert_close(*found)


def test_pooled_images_are_means() -> None:
    full, pooled = (ImageMLP(pool=pool).images("train", torch.device("cpu"))[0] for pool in (1, 4))
    torch.testing.assert_close(pooled[:, 1], full.view(-1, 8, 8)[:, :4, 4:].mean((1, 2)))


def test_encode_knows_ascii_and_one_token_for_the_rest() -> None:
    assert len(set(encode("\n" + "".join(map(chr, range(32, 127)))).tolist())) == VOCABULARY - 1
    assert encode("“é\t").tolist() == [VOCABULARY - 1] * 3


PARTS = [(half, split) for half in ("meta_train", "meta_test") for split in ("train", "valid")]


def test_the_parts_of_a_text_are_disjoint_and_all_of_it() -> None:
    parts = [text_split("topics", *part, "cpu") for part in PARTS]
    blocks = {tuple(block) for part in parts for block in part.tolist()}
    tokens = encode(_load_topics())
    assert len(blocks) == sum(map(len, parts)) == len(tokens) // BLOCK
    assert blocks == {tuple(block) for block in tokens[: len(blocks) * BLOCK].view(-1, BLOCK).tolist()}
    assert len(parts[0]) > 3 * len(parts[1]) > 0


@pytest.mark.parametrize("split", ["train", "valid"])
def test_windows_lie_inside_the_blocks_of_their_part(split: str) -> None:
    family = CharRNN(length=BLOCK - 2, batch_size=40)
    windows = draw(family, split, lanes=1)[3]["tokens"][0]
    starts = {
        tuple(block[k : k + BLOCK - 1])
        for block in text_split("topics", family.half, split, "cpu").tolist()
        for k in (0, 1)
    }
    assert {tuple(window) for window in windows.tolist()} <= starts


def test_the_pictures_of_both_halves_differ_and_so_do_the_pixels_of_both_splits() -> None:
    assert not set(PICTURES["meta_train"]) & set(PICTURES["meta_test"])
    shown = torch.cat([pictures(half, torch.device("cpu")) for half in PICTURES])
    assert shown.shape == (12, 128, 128, 3)
    assert ((shown >= 0) & (shown <= 1)).all()
    assert len({round(picture.mean().item(), 6) for picture in shown}) == 12
    train, valid = pixel_split(8, "train", "cpu"), pixel_split(8, "valid", "cpu")
    assert torch.equal(torch.cat([train, valid]).sort().values, torch.arange(64))
    assert len(train) > 3 * len(valid) > 0


@pytest.mark.parametrize("split", ["train", "valid"])
def test_coordinates_go_with_their_colours(split: str) -> None:
    family = CoordinateMLP(side=8, batch_size=64)
    data = family.sample(generator(), 4)
    batch = family.batch(data, split, generator())
    shown = pictures("meta_train", torch.device("cpu"))
    for k in range(4):
        picture, top, left = (int(data[name][k]) for name in ("picture", "top", "left"))
        window = shown[picture, top : top + 8, left : left + 8]
        row, column = ((batch["x"][k] + 1) * 3.5).round().long().unbind(1)
        assert torch.equal(batch["y"][k], window[row, column])
        assert set((row * 8 + column).tolist()) <= set(pixel_split(8, split, "cpu").tolist())


def test_sirens_start_as_the_paper_has_it() -> None:
    params = draw(CoordinateMLP(width=16, frequency=10.0), lanes=50)[0]
    for name, bound in (("0.weight", 1 / 2), ("1.weight", (6 / 16) ** 0.5 / 10), ("2.weight", (6 / 16) ** 0.5 / 10)):
        assert 0.97 * bound < params[name].abs().max() <= bound * (1 + 1e-6)


@pytest.mark.parametrize(
    ("module", "text", "call"),
    [
        (
            "skimage",
            r"scikit-image: pip install 'l2o\[train\]'",
            lambda: pictures.__wrapped__("meta_test", torch.device("cpu")),
        ),
        ("pydoc_data.topics", "standard library, which this Python lacks", _load_topics),
    ],
)
def test_missing_packages_are_named(module: str, text: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=text):
        call()
