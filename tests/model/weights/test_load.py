"""`chexfound.load_backbone` and `load_head`: the reference's values, from files as they are and from every folder."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import chexfound
from chexfound.commands.main import main
from chexfound.errors import CheckpointError, ConfigError
from chexfound.model import checkpoint
from chexfound.model.checkpoint import add_prefix
from chexfound.model.weights import load

BACKBONE_TOLERANCE, HEAD_TOLERANCE, BCE_TOLERANCE = 3e-5, 1e-5, 1e-4  # the reference's README
FROM = ["file", "imported", "released"]


def off(result: Tensor, expected: Tensor) -> float:
    assert result.shape == expected.shape
    return (result.detach() - expected).abs().max().item()


def arrays(path: Path) -> dict[str, Tensor]:
    with np.load(path) as loaded:
        return {name: torch.from_numpy(loaded[name]) for name in loaded.files}


@pytest.fixture(scope="module")
def places(reference: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The reference's backbone and head in one folder, imported and then released."""
    folder = tmp_path_factory.mktemp("places")
    files = [str(reference / name) for name in ("teacher_checkpoint.pth", "glori_v1.pth")]
    assert main(["weights", "import", *files, "--heads", "4", "--out", str(folder / "imported")]) == 0
    assert main(["weights", "export", str(folder / "imported"), "--out", str(folder / "released")]) == 0
    return {name: folder / name for name in ("imported", "released")}


@pytest.fixture(params=["vit_tiny.safetensors", "teacher_checkpoint.pth", "imported", "released"])
def backbone(request: pytest.FixtureRequest, reference: Path, places: dict[str, Path]) -> torch.nn.Module:
    path = places.get(request.param, reference / request.param)
    return chexfound.load_backbone(path, heads=None if request.param in places else 4)


def test_features_are_the_reference_s(backbone, reference):
    io = arrays(reference / "vit_tiny_io.npz")
    for tag in ("64", "rect"):
        for end, masks in (("", None), ("_masked", io[f"mask_{tag}"])):
            result = backbone.forward_features(io[f"x_{tag}"], masks)
            assert set(result) == {"x_norm_clstoken", "x_norm_regtokens", "x_norm_patchtokens", "x_prenorm"}
            for name, tensor in result.items():
                assert off(tensor, io[f"{name}_{tag}{end}"]) < BACKBONE_TOLERANCE, (name, tag, end)
        for norm, end in ((True, ""), (False, "_nonorm")):
            if f"inter0_cls_{tag}{end}" not in io:
                continue
            layers = backbone.get_intermediate_layers(io[f"x_{tag}"], 4, return_class_token=True, norm=norm)
            for number, (patches, cls) in enumerate(layers):
                assert off(patches, io[f"inter{number}_patch_{tag}{end}"]) < BACKBONE_TOLERANCE
                assert off(cls, io[f"inter{number}_cls_{tag}{end}"]) < BACKBONE_TOLERANCE


@pytest.fixture(params=["glori_v1.pth", "imported", "released"])
def head(request: pytest.FixtureRequest, reference: Path, places: dict[str, Path]) -> torch.nn.Module:
    return chexfound.load_head(places.get(request.param, reference / request.param))


def test_logits_attention_loss_and_gradients_are_the_reference_s(head, reference):
    io = arrays(reference / "glori_io.npz")
    patches, cls = [io[f"rnd_patch{n}"] for n in range(4)], [io[f"rnd_cls{n}"] for n in range(4)]
    logits, attention = head(patches, cls, return_attention=True)
    assert off(logits, io["rnd_logits_catcls0"]) < HEAD_TOLERANCE
    assert off(attention, io["rnd_attn_catcls0"]) < HEAD_TOLERANCE
    labels = io["labels"]
    loss = F.binary_cross_entropy_with_logits(logits, labels.clamp_min(0).float(), reduction="none")[labels >= 0].sum()
    assert off(loss, io["bce_sum_catcls0"]) < BCE_TOLERANCE
    loss.backward()
    parameters = dict(head.named_parameters())
    gradients = [name for name in io if name.startswith("grad_")]
    assert len(gradients) == 5
    for name in gradients:
        gradient = parameters[name.split("decoder.", 1)[1]].grad
        assert off(gradient.reshape(io[name].shape), io[name]) < HEAD_TOLERANCE, name
    assert (head.n_blocks, head.dim, head.findings) == (4, 64, ())


def test_without_heads_they_are_width_over_64(reference):
    module = chexfound.load_backbone(reference / "vit_tiny.safetensors")
    result = module.forward_features(torch.zeros(1, 3, 64, 64))
    assert torch.isfinite(result["x_prenorm"]).all()
    assert module.blocks[0].attn.heads == 1


# --- without the reference


def test_the_signatures_from_the_top_are_those_beneath():
    for name in ("load_backbone", "load_head"):
        assert inspect.signature(getattr(chexfound, name)) == inspect.signature(getattr(load, name)) or str(
            inspect.signature(getattr(chexfound, name)).parameters.keys()
        ) == str(inspect.signature(getattr(load, name)).parameters.keys())


@pytest.fixture
def published(make_backbone, make_projection, as_published, tmp_path) -> Callable[..., Path]:
    """`published(ffn="mlp", …)`: a teacher_checkpoint.pth of random numbers."""

    def make(chunks: int = 2, dtype: torch.dtype = torch.float32, **values: object) -> Path:
        backbone, head = make_backbone(**values)[1], make_projection()[1]
        teacher = add_prefix(as_published(backbone, chunks), "backbone.") | add_prefix(head, "dino_head.")
        path = tmp_path / "teacher_checkpoint.pth"
        torch.save({"teacher": {name: tensor.to(dtype) for name, tensor in teacher.items()}}, path)
        return path

    return make


IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32), dtype=np.uint8))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("layerscale", [False, True])
def test_a_backbone_gives_the_same_from_file_import_and_release(published, tmp_path, ffn, registers, layerscale):
    path = published(ffn=ffn, registers=registers, layerscale=layerscale)
    imported, released = str(tmp_path / "imported"), str(tmp_path / "released")
    assert main(["weights", "import", str(path), "--heads", "4", "--out", imported]) == 0
    assert main(["weights", "export", imported, "--out", released]) == 0
    expected = chexfound.load_backbone(path, heads=4).forward_features(IMAGES)
    for folder in (imported, released):
        for name, tensor in chexfound.load_backbone(folder).forward_features(IMAGES).items():
            assert torch.equal(tensor, expected[name]), (folder, name)


def test_uint8_is_normalised_as_imagenet_or_as_told(published):
    path = published()
    x = IMAGES[:, None].float() / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    module = chexfound.load_backbone(path, 4)
    assert off(module.normalize(IMAGES), (x - mean) / std) < 1e-5
    other = chexfound.load_backbone(path, 4, mean=0.5, std=0.25)
    assert off(other.normalize(IMAGES), ((x - 0.5) / 0.25).expand(-1, 3, -1, -1)) < 1e-5
    with pytest.raises(ConfigError, match="both --mean and --std"):
        chexfound.load_backbone(path, 4, mean=0.5)
    with pytest.raises(ConfigError, match="deviations above 0"):
        chexfound.load_backbone(path, 4, mean=0.5, std=0.0)


def test_one_channel_takes_the_mean_of_imagenet_s(published):
    path = published(in_chans=1)
    assert off(chexfound.load_backbone(path, 4).normalize(IMAGES), (IMAGES[:, None] / 255 - 0.449) / 0.226) < 1e-5
    with pytest.raises(ConfigError, match="takes one channel"):
        chexfound.load_backbone(path, 4, mean=(0.1, 0.2, 0.3), std=0.5)


def test_half_precision_is_taken_in(published):
    module = chexfound.load_backbone(published(dtype=torch.float16), 4)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_a_run_s_folder_its_model_and_its_arm_give_the_same(make_run):
    out = make_run()
    arm = out / "work" / "seed-0" / "federated"
    expected, expected_head = chexfound.load_backbone(arm), chexfound.load_head(arm)
    assert torch.equal(expected.cls_token, load_file(arm / "model.safetensors")["backbone.cls_token"])
    for path in (out, out / "model"):
        module, head = chexfound.load_backbone(path), chexfound.load_head(str(path))
        layers = module.get_intermediate_layers(IMAGES, head.n_blocks, return_class_token=True)
        theirs = expected.get_intermediate_layers(IMAGES, head.n_blocks, return_class_token=True)
        for one, other in zip(layers, theirs, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        given = [patches for patches, _ in layers], [cls for _, cls in layers]
        assert torch.equal(head(*given), expected_head(*given))
        assert head.findings == expected_head.findings == ("Effusion", "Mass")


def test_a_file_of_a_run_is_refused_since_what_it_needs_lies_beside_it(make_run):
    out = make_run()
    for path in (next(out.rglob("federated/model.safetensors")), next(out.rglob("pretrain-*.safetensors"))):
        for call in (chexfound.load_backbone, chexfound.load_head):
            with pytest.raises(CheckpointError, match="written by a run of federated CheXFound.*give the run's folder"):
                call(path)


def test_a_part_that_is_not_there_is_told(published, tmp_path):
    path = published()
    with pytest.raises(CheckpointError, match="holds no head of findings"):
        chexfound.load_head(path)
    save_file({"linear.weight": torch.zeros(1, 8), "linear.bias": torch.zeros(1)}, tmp_path / "linear.safetensors")
    assert chexfound.load_head(tmp_path / "linear.safetensors").dim == 2
    with pytest.raises(CheckpointError, match="holds no backbone"):
        chexfound.load_backbone(tmp_path / "linear.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty: no weights that are known; give a published checkpoint"):
        chexfound.load_backbone(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="cannot be read"):
        chexfound.load_backbone(tmp_path / "none")


def test_another_architecture_and_a_changed_shape_are_refused(tmp_path, make_backbone, as_published):
    torch.save({"model": {"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}}, tmp_path / "resnet.pth")
    with pytest.raises(CheckpointError, match=r"resnet\.pth: weights of another architecture: 2 of 2 tensors"):
        chexfound.load_backbone(tmp_path / "resnet.pth")
    tensors = as_published(make_backbone()[1])
    for change, message in (
        ({"blocks.2.norm1.weight": torch.zeros(9)}, r"blocks\.2\.norm1\.weight is torch\.float32 \(9,\)"),
        ({"blocks.2.attn.qkv.bias": None}, r"1 missing \['blocks\.2\.attn\.qkv\.bias'\]"),
        ({"head.weight": torch.zeros(2)}, "another architecture|1 unexpected|written by a run"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, tmp_path / "a.safetensors")
        with pytest.raises(CheckpointError, match=message):
            chexfound.load_backbone(tmp_path / "a.safetensors", 4)


@pytest.fixture
def folder(published, tmp_path) -> Path:
    """A backbone and a linear head, imported."""
    save_file({"linear.weight": torch.randn(2, 256), "linear.bias": torch.zeros(2)}, tmp_path / "linear.safetensors")
    files = [str(published()), str(tmp_path / "linear.safetensors")]
    arguments = ["--heads", "4", "--findings", "Effusion,Mass", "--out", str(tmp_path / "folder")]
    assert main(["weights", "import", *files, *arguments]) == 0
    return tmp_path / "folder"


def test_what_a_folder_says_can_be_overruled_but_not_of_a_head(folder):
    assert chexfound.load_backbone(folder).blocks[0].attn.heads == 4
    assert chexfound.load_backbone(folder, 2, mean=0.5, std=0.25).blocks[0].attn.heads == 2
    with pytest.raises(ConfigError, match="heads 3: must divide the width 64"):
        chexfound.load_backbone(folder, 3)
    for values in ({"heads": 2}, {"classifier": "x"}, {"n_last_blocks": 2}, {"avgpool": False}):
        with pytest.raises(ConfigError, match="a folder says itself what its head is"):
            chexfound.load_head(folder, **values)
    assert chexfound.load_head(folder).findings == ("Effusion", "Mass")


def edit(folder: Path, change: Callable[[dict], object]) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values["chexfound"])
    (folder / "config.json").write_text(json.dumps(values))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


BACKBONE = "backbone_compatible.safetensors"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / BACKBONE), "is not the file that config.json was written for"),
        (lambda f: (f / BACKBONE).unlink(), "backbone_compatible.safetensors: cannot be read"),
        (lambda f: (f / BACKBONE).write_bytes(b""), "changed or damaged"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[]"), "holds no JSON object"),
        (lambda f: (f / "config.json").write_text('{"chexfound": 3}'), "weights of format None"),
        (lambda f: edit(f, lambda c: c.update(format=9)), "weights of format 9; this release reads 1"),
        (lambda f: edit(f, lambda c: c["files"].pop(BACKBONE)), "states no SHA-256"),
        (lambda f: edit(f, lambda c: c.update(files=3)), "files: Input should be a valid dict"),
        (lambda f: edit(f, lambda c: c.update(backbone=3)), "backbone: Input should be a dict"),
        (lambda f: edit(f, lambda c: c["backbone"].update(heads=5)), "5 attention heads do not divide the width 64"),
        (lambda f: edit(f, lambda c: c["backbone"].update(dim=10**12)), "backbone: dim: Input should be less"),
        (lambda f: edit(f, lambda c: c["backbone"].update(depth=3)), "weights do not fit: 0 missing"),
        (lambda f: edit(f, lambda c: c["backbone"].update(code="x")), "backbone: code: Unexpected keyword"),
        (lambda f: edit(f, lambda c: c["input"].update(std=0)), "input: std"),
    ],
)
def test_a_damaged_folder_is_a_checkpoint_error(folder, damage, message):
    chexfound.load_backbone(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        chexfound.load_backbone(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "head.safetensors"), "is not the file that config.json was written for"),
        (lambda f: edit(f, lambda c: c["head"].update(kind="forest")), "head: Input tag 'forest' found"),
        (lambda f: edit(f, lambda c: c.update(findings=["a"])), "1 findings for a head of 2"),
        (lambda f: edit(f, lambda c: c.update(findings=[1, 2])), "findings: 0: Input should be a valid string"),
        (lambda f: edit(f, lambda c: c.update(head=None)), "holds no head of findings"),
    ],
)
def test_a_damaged_head_is_a_checkpoint_error(folder, damage, message):
    chexfound.load_head(folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        chexfound.load_head(folder)


def test_weights_of_another_digest_are_found_in_an_arm_s_folder(make_run):
    arm = make_run(model=False) / "work" / "seed-0" / "federated"
    assert chexfound.load_head(arm).findings == ("Effusion", "Mass")
    tensors = checkpoint.load(arm / "model.safetensors")
    checkpoint.save(arm / "model.safetensors", {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match="not the file that the journal tells of"):
        chexfound.load_backbone(arm)
