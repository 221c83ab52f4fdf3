"""A release: timm and the card's snippets load it and give our features; what timm lacks is said, not faked."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

import chexfound
from chexfound.errors import CheckpointError, ConfigError
from chexfound.model.checkpoint import add_prefix
from chexfound.model.weights.export import export
from chexfound.model.weights.in_parts import ImportOptions, of_file
from chexfound.model.weights.release import folder as folders
from chexfound.model.weights.release import timm_format
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Input

LINEAR = {"student.stem": "linear", "input.normalization": "mean_std"}
TOLERANCE = 2e-5
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8))


def imported(folder: Path, tensors: dict[str, Tensor], heads: int | None = None) -> Path:
    """A published checkpoint, imported."""
    torch.save({"teacher": add_prefix(tensors, "backbone.")}, folder / "teacher_checkpoint.pth")
    weights = of_file(folder / "teacher_checkpoint.pth", ImportOptions(heads=heads))
    (folder / "imported").mkdir()
    folders.write_parts(folder / "imported", weights)
    folders.write_config(folder / "imported", weights, "imported")
    return folder / "imported"


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


READS_FOLDERS = numbers(timm.__version__) >= numbers(timm_format.LOCAL_DIR)


def by_timm(release: Path) -> list[torch.nn.Module]:
    """timm's model by the arguments with the weights' path and, where this timm can, by its folder."""
    config = json.loads((release / "config.json").read_text())
    path = release / "model.safetensors"
    models = [timm.create_model(config["architecture"], **config["model_args"], checkpoint_path=path)]
    if READS_FOLDERS:
        models.append(timm.create_model(f"local-dir:{release}", pretrained=True))
    return [model.eval() for model in models]


@torch.inference_mode()
def compare(release: Path, px: int) -> None:
    """timm's tokens are ours, at the size that the release is for."""
    ours = chexfound.load_backbone(release)
    x = ours.normalize(torch.nn.functional.interpolate(IMAGES[:, None].float(), (px, px)).to(torch.uint8))
    expected = ours.forward_features(x)
    tokens = torch.cat([expected["x_norm_clstoken"][:, None], expected["x_norm_regtokens"]], 1)
    tokens = torch.cat([tokens, expected["x_norm_patchtokens"]], 1)
    for model in by_timm(release):
        assert (model.forward_features(x) - tokens).abs().max() < TOLERANCE
        assert (model(x) - expected["x_norm_clstoken"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("layerscale", [False, True])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_timm_gives_our_features(make_backbone, as_published, tmp_path, ffn, registers, layerscale, in_chans):
    config, tensors = make_backbone(ffn=ffn, registers=registers, layerscale=layerscale, in_chans=in_chans)
    source = imported(tmp_path, as_published(tensors, chunks=2), heads=4)
    _, why_not, files = export(source, tmp_path / "release", ImportOptions())
    assert why_not is None
    assert "model.safetensors" in files
    compare(tmp_path / "release", 32)


@pytest.mark.parametrize(("dim", "heads"), [(72, 6), (96, 4), (144, 3), (384, 6)])
def test_timm_gives_our_features_at_other_widths(make_backbone, as_published, tmp_path, dim, heads):
    """SwiGLU's hidden width is not a round multiple of the width."""
    _, tensors = make_backbone(dim=dim, heads=heads, depth=2)
    export(imported(tmp_path, as_published(tensors), heads), tmp_path / "release", ImportOptions())
    compare(tmp_path / "release", 32)


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_timm_comes_to_the_hidden_width(ffn):
    """A ratio of floating point, and timm cuts what comes of it to a whole number."""
    for dim in range(8, 2400, 8):
        config = timm_format.Backbone(
            **dict(dim=dim, depth=1, heads=1, patch_size=8, in_chans=3, registers=0, ffn=ffn, layerscale=True, grid=2)
        )
        args = timm_format.config(config, Input(), 16)["model_args"]
        assert int(dim * args["mlp_ratio"]) == config.ffn_dim * (2 if ffn == "swiglu" else 1)


@pytest.mark.skipif(not READS_FOLDERS, reason=f"timm {timm.__version__} does not read this folder")
def test_timm_s_own_transform_gives_our_pixels(make_backbone, as_published, tmp_path):
    from PIL import Image

    export(imported(tmp_path, as_published(make_backbone()[1]), 4), tmp_path / "release", ImportOptions())
    model = by_timm(tmp_path / "release")[-1]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    pixels = transform(Image.fromarray(IMAGES[0].numpy()).convert("RGB"))
    ours = chexfound.load_backbone(tmp_path / "release").normalize(IMAGES[:1])[0]
    assert (pixels - ours).abs().max() < 1e-5
    preprocessor = json.loads((tmp_path / "release" / "preprocessor_config.json").read_text())
    assert preprocessor["image_processor_type"] == "BitImageProcessor"
    assert preprocessor["crop_size"] == {"height": 32, "width": 32}
    x = IMAGES[0].float() * preprocessor["rescale_factor"]
    for channel, (mean, std) in enumerate(zip(preprocessor["image_mean"], preprocessor["image_std"], strict=True)):
        assert ((x - mean) / std - ours[channel]).abs().max() < 1e-5


def test_positions_are_made_for_the_run_s_images(make_run):
    """The run was pretrained at 32 px and is used at 48: timm's file has positions for 48, by our rule."""
    out = make_run({**LINEAR, "image_px": 48})
    export(out, out.parent / "release", ImportOptions())
    assert load_file(out.parent / "release" / "model.safetensors")["pos_embed"].shape == (1, 9, 24)
    assert load_file(out.parent / "release" / folders.COMPATIBLE)["pos_embed"].shape == (1, 1 + 4, 24)
    compare(out.parent / "release", 48)


# --- of a run


@pytest.mark.parametrize("where", [".", "work/seed-0/federated"])
@pytest.mark.parametrize("teacher", ["average", "local"])
def test_a_run_is_released_with_its_heads(make_run, where, teacher):
    out = make_run({**LINEAR, "teacher.policy": teacher})
    release = out.parent / "release"
    weights, why_not, files = export(out / where, release, ImportOptions())
    assert why_not is None
    assert (
        {path.name for path in release.iterdir()}
        == set(files)
        == {
            "model.safetensors",
            "backbone_compatible.safetensors",
            "dino_head.safetensors",
            "ibot_head.safetensors",
            "head.safetensors",
            "preprocessor_config.json",
            "recipe.yaml",
            "training_summary.json",
            "README.md",
            "config.json",
        }
    )
    compare(release, 32)
    rounds = load_file(next(out.rglob("pretrain-*.safetensors")))
    whose = "teacher" if teacher == "average" else "student"
    assert weights.source["whose"] == whose
    for name in ("dino_head", "ibot_head"):
        saved = load_file(release / f"{name}.safetensors")
        assert len(saved) == 8
        assert all(torch.equal(tensor, rounds[f"{whose}.{name}.{key}"]) for key, tensor in saved.items())
    assert recipes.load(str(release / "recipe.yaml")) == weights.recipe
    summary = json.loads((release / "training_summary.json").read_text())
    assert summary["arm"] == "federated"
    assert summary["sites"][0] == {"site": "north", "images": 9, "patients": 5, "train": 6, "val": 1, "test": 2}
    assert summary["pretrain"]["loss_by_round"] == [2.5]
    assert summary["pretrain"]["bytes"] == {"down": 10, "up": 20}
    assert summary["results"][0]["auroc"] == 0.75
    assert "| north | Mass | 9 | 3 | 0.750 |" in (release / "README.md").read_text()


def test_a_run_leaves_its_model_as_a_release(make_run, tmp_path):
    """With what a release of the run has, wherever it is taken; timm and transformers load it as it is."""
    out = make_run(LINEAR)
    export(out, tmp_path / "release", ImportOptions())
    alone = tmp_path / "elsewhere" / "mine"
    alone.parent.mkdir()
    (out / "model").rename(alone)
    assert {path.name: path.read_bytes() for path in alone.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "release").iterdir()
    }
    compare(alone, 32)
    with pytest.raises(ConfigError, match="is a release already"):
        export(alone, tmp_path / "again", ImportOptions())


def test_ssl_heads_of_another_model_are_not_taken(make_run, tmp_path):
    out = make_run(LINEAR)
    path = next(out.rglob("pretrain-*.safetensors"))
    tensors = load_file(path)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, path)
    with pytest.raises(CheckpointError, match="is not what the journal says it should be"):
        export(out, tmp_path / "release", ImportOptions())
    assert not (tmp_path / "release").exists()
    path.unlink()
    weights, _, files = export(out, tmp_path / "release", ImportOptions())
    assert weights.left_out["dino_head"] == "the last round's weights, rounds/pretrain-000001.safetensors, are gone"


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({}, "no vision transformer with this convolutional stem"),
        ({"student.stem": "linear"}, "normalised by its own mean and deviation"),
    ],
)
def test_what_timm_lacks_is_said_and_no_file_misleads(make_run, overrides, why):
    out = make_run(overrides)
    release = out.parent / "release"
    _, why_not, files = export(out, release, ImportOptions())
    assert why in str(why_not)
    assert "model.safetensors" not in files
    assert set(json.loads((release / "config.json").read_text())) == {"chexfound"}
    card = (release / "README.md").read_text()
    assert "timm cannot load this backbone" in card
    assert why in card
    assert "library_name" not in card
    preprocessor = json.loads((release / "preprocessor_config.json").read_text())
    assert preprocessor["image_processor_type"] is None
    assert preprocessor["normalization"] == "zscore"
    assert (release / "backbone_compatible.safetensors").exists() == (why_not and "stem" not in why_not)
    expected = chexfound.load_backbone(out).forward_features(IMAGES)
    for name, tensor in chexfound.load_backbone(release).forward_features(IMAGES).items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("overrides", [LINEAR, {}, {**LINEAR, "adapt.head": "linear"}])
def test_the_card_s_snippets_run_as_they_stand(make_run, overrides):
    out = make_run(overrides)
    release = out.parent / "release"
    export(out, release, ImportOptions())
    text = (release / "README.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    if not READS_FOLDERS:
        snippets = [snippet for snippet in snippets if "local-dir:" not in snippet]
    assert len(snippets) == (3 + READS_FOLDERS if overrides else 2)
    names: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for snippet in snippets:
            exec(snippet.replace("this folder", str(release)), names)  # noqa: S102
    assert names["probabilities"].shape == (1, 2)  # type: ignore[attr-defined]
    if overrides:
        assert names["tokens"].shape == (1, 1 + 4 + 4, 24)  # type: ignore[attr-defined]
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "other"
    assert ("library_name" in front) == bool(overrides)
    assert not re.search(r"[{}]|None", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def test_every_file_has_its_sha_256_in_the_config(make_run):
    out = make_run(LINEAR)
    release = out.parent / "release"
    _, _, files = export(out, release, ImportOptions())
    stated = json.loads((release / "config.json").read_text())["chexfound"]["files"]
    assert set(stated) == set(files) - {"config.json"}
    for name, value in stated.items():
        assert hashlib.sha256((release / name).read_bytes()).hexdigest() == value
    assert str(out.parent) not in "".join(p.read_text() for p in release.iterdir() if p.suffix != ".safetensors")


def test_a_folder_that_is_not_new_is_refused_and_left_as_it_is(make_run):
    out = make_run(LINEAR)
    release = out.parent / "release"
    release.mkdir()
    export(out, release, ImportOptions())  # an empty one is as good as new
    before = {path: path.read_bytes() for path in release.iterdir()}
    with pytest.raises(ConfigError, match="release: the folder is not empty; give a new one, or empty it"):
        export(out, release, ImportOptions())
    assert {path: path.read_bytes() for path in release.iterdir()} == before
    with pytest.raises(ConfigError, match=r"recipe\.yaml: is a file; give a new folder"):
        export(out, release / "recipe.yaml", ImportOptions())
    with pytest.raises(ConfigError, match="release: is a release already; copy it as it is"):
        export(release, out.parent / "again", ImportOptions())
    assert {path.name for path in out.parent.iterdir()} == {"out", "release"}  # nothing half-written is left


def test_a_head_alone_is_released_without_a_backbone(tmp_path):
    path = tmp_path / "linear.safetensors"
    save_file({"linear.weight": torch.randn(2, 8), "linear.bias": torch.zeros(2)}, path)
    with pytest.raises(ConfigError, match=r"is a file; take it in first.* weights import \S+linear\.safetensors --out"):
        export(path, tmp_path / "release", ImportOptions())
    weights = of_file(path, ImportOptions())
    (tmp_path / "imported").mkdir()
    folders.write_parts(tmp_path / "imported", weights)
    folders.write_config(tmp_path / "imported", weights, "imported")
    _, why_not, files = export(tmp_path / "imported", tmp_path / "release", ImportOptions(findings=("A", "B")))
    assert why_not is None
    assert files == ["head.safetensors", "training_summary.json", "README.md", "config.json"]
    assert chexfound.load_head(tmp_path / "release").findings == ("A", "B")


def test_heads_of_another_width_are_refused(make_backbone, as_published, tmp_path):
    source = imported(tmp_path, as_published(make_backbone()[1]), 4)
    config = json.loads((source / "config.json").read_text())
    save_file({"weight": torch.zeros(2, 40), "bias": torch.zeros(2)}, source / "head.safetensors")
    config["chexfound"]["head"] = dict(kind="linear", n_findings=2, dim=20, n_blocks=2)
    config["chexfound"]["files"]["head.safetensors"] = hashlib.sha256(
        (source / "head.safetensors").read_bytes()
    ).hexdigest()
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="the head is made for a backbone of width 20, this one's is 64"):
        export(source, tmp_path / "release", ImportOptions())
