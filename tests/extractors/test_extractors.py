"""Every extractor with random weights: shapes, what it refuses, that it answers to the picture."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_evaluation import classifier_folder, clip_folder, inception_folder

from diffusers_ldmq.errors import EvaluationError
from diffusers_ldmq.extractors import EXTRACTORS, FeatureExtractor, load_extractor
from diffusers_ldmq.extractors.contract import leading_channels
from diffusers_ldmq.extractors.inception import resized

FOLDERS: dict[str, Callable[[Path], Path]] = {
    "classifier": classifier_folder,
    "clip": clip_folder,
    "inception": inception_folder,
}
SHAPES = {"classifier": (12, 49, 3), "clip": (8, 8, None), "inception": (2048, 7 * 17 * 17, 1008)}
"""Pooled and spatial values, classes."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name) / name) for name, make in FOLDERS.items()}


@pytest.fixture(scope="module")
def extractors(folders: dict[str, Path]) -> dict[str, FeatureExtractor]:
    return {name: load_extractor(folder) for name, folder in folders.items()}


def noise(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def test_every_extractor_is_tested() -> None:
    assert set(FOLDERS) == set(EXTRACTORS)


@pytest.mark.parametrize("kind", list(EXTRACTORS))
def test_features_have_the_promised_shapes_and_do_not_depend_on_the_batch(
    kind: str, extractors: dict[str, FeatureExtractor]
) -> None:
    extractor, pictures = extractors[kind], noise(3)
    found = extractor(pictures)
    pooled, spatial, classes = SHAPES[kind]
    assert found.pooled.shape == (3, pooled)
    assert found.spatial.shape == (3, spatial)
    assert spatial <= max(pooled, 49)
    assert (found.logits is None) == (classes is None)
    if found.logits is not None:
        assert found.logits.shape == (3, classes)
    assert {found.pooled.dtype, found.spatial.dtype} == {torch.float32}
    assert not torch.equal(found.pooled[0], found.pooled[1])
    torch.testing.assert_close(extractor(pictures[1:2]).pooled, found.pooled[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", list(EXTRACTORS))
def test_an_extractor_says_what_it_is(
    kind: str, folders: dict[str, Path], extractors: dict[str, FeatureExtractor]
) -> None:
    extractor = extractors[kind]
    assert kind in extractor.name
    assert load_extractor(folders[kind]).digest == extractor.digest
    assert extractor.to("cpu") is extractor


def test_the_classifiers_accuracy_is_in_its_name(extractors: dict[str, FeatureExtractor]) -> None:
    assert extractors["classifier"].name == "classifier, 50.00 %"


def test_other_weights_have_another_digest(tmp_path: Path, extractors: dict[str, FeatureExtractor]) -> None:
    assert load_extractor(classifier_folder(tmp_path / "other", seed=1)).digest != extractors["classifier"].digest


@pytest.mark.parametrize("kind", ["clip", "inception"])
def test_pictures_of_any_size_are_taken(kind: str, extractors: dict[str, FeatureExtractor]) -> None:
    assert extractors[kind](noise(1, size=40)).pooled.shape == (1, SHAPES[kind][0])


def test_the_classifier_refuses_other_sizes(extractors: dict[str, FeatureExtractor]) -> None:
    with pytest.raises(EvaluationError, match="32x32 pixels, these have 40x40"):
        extractors["classifier"](noise(1, size=40))


def test_resizing_interpolates_as_tensorflow_did() -> None:
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 4, 4)
    assert resized(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert torch.equal(resized(ramp, 4), ramp)


def test_as_many_leading_channels_as_fit() -> None:
    map_ = torch.arange(2 * 6 * 4.0).view(2, 6, 2, 2)
    assert torch.equal(leading_channels(map_, 11), map_[:, :2].flatten(1))
    assert leading_channels(map_, 1).shape == (2, 4)


def _changed(folder: Path, target: Path, **changes: object) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def _weights(folder: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    shutil.copytree(folder, target)
    state = {name: value.clone() for name, value in load_file(target / "model.safetensors").items()}
    change(state)
    save_file(state, target / "model.safetensors")
    return target


def _garbage(folder: Path, target: Path, name: str) -> Path:
    shutil.copytree(folder, target)
    (target / name).write_bytes(b"{not a file of ours")
    return target


BAD_FOLDERS: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "missing": (lambda good, new: new, "no such folder"),
    "empty": (lambda good, new: (new.mkdir(), new)[1], "config.json: no such file"),
    "no JSON": (lambda good, new: _garbage(good, new, "config.json"), "not valid JSON"),
    "another kind": (
        lambda good, new: _changed(good, new, architecture="resnet"),
        "architecture 'resnet'; known: classif",
    ),
    "another kind's weights": (
        lambda good, new: _changed(good, new, architecture="inception"),
        "1a_3x3.bn.bias is missing",
    ),
    "odd widths": (lambda good, new: _changed(good, new, widths=[4, "x", 3]), "expected three widths"),
    "other widths": (lambda good, new: _changed(good, new, widths=[4, 49, 13]), "has the shape"),
    "damaged weights": (lambda good, new: _garbage(good, new, "model.safetensors"), "as safetensors"),
    "a tensor missing": (lambda good, new: _weights(good, new, lambda s: s.pop("head.bias")), "head.bias is missing"),
    "NaN": (lambda good, new: _weights(good, new, lambda s: s["head.bias"].fill_(torch.nan)), "head.bias holds NaN"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_wrong_folder_is_refused_in_words(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    make, expected = BAD_FOLDERS[name]
    with pytest.raises(EvaluationError, match=expected):
        load_extractor(make(folders["classifier"], tmp_path / "bad"))


def test_clip_without_weights_is_refused_in_words(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="cannot be loaded as a CLIP model"):
        load_extractor(
            shutil.copytree(folders["clip"], tmp_path / "bad", ignore=shutil.ignore_patterns("*.safetensors"))
        )
