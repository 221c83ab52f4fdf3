from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from chexfound.errors import ConfigError
from chexfound.recipe import check
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import ARCHS, Recipe

FRACTION = st.floats(0, 1)
RATE = st.floats(1e-300, 1e300)
RANGE = st.tuples(FRACTION, FRACTION).map(sorted)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
OVERRIDES: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {},
    optional={
        "name": TEXT,
        "seed": st.integers(0, 2**80),
        "image_px": st.integers(1, 64).map(lambda n: 16 * n),
        "phases": st.sampled_from([["pretrain"], ["adapt"], ["pretrain", "adapt"], ["adapt", "evaluate"]]),
        "split.train": st.floats(0.01, 0.8),
        "input.normalization": st.sampled_from(["zscore", "mean_std"]),
        "input.std": RATE,
        "student.arch": st.sampled_from(sorted(ARCHS)),
        "student.drop_path_rate": st.floats(0, 0.99),
        "dino.head_centered": st.booleans(),
        "ibot.mask_ratio_min_max": RANGE,
        "train.rounds": st.integers(1, 10**6),
        "teacher.momentum_teacher": FRACTION,
        "optim.lr": RATE,
        "crops.local_crops_number": st.integers(0, 20),
        "crops.global_crops_scale": RANGE,
        "adapt.findings": st.none() | st.lists(TEXT.filter(bool), unique=True, min_size=1, max_size=4),
        "adapt.glori_heads": st.sampled_from([1, 2, 3, 4, 6]),
    },
)


def test_there_are_presets_and_each_is_valid_and_named():
    assert {"demo", "laptop"} <= set(recipes.presets())
    for name in recipes.presets():
        recipe = recipes.load(name)
        assert recipe.name == name
        assert recipes.about(name)[0].isupper()
        assert check.validate(recipes.to_dict(recipe), "again") == recipe


@given(OVERRIDES)
def test_a_recipe_survives_json_and_yaml(overrides):
    recipe = recipes.load("demo", overrides)
    assert recipes.from_json(recipes.to_json(recipe)) == recipe
    assert check.validate(yaml.safe_load(recipes.to_yaml(recipe)), "yaml") == recipe
    values = recipes.to_dict(recipe)
    for key, value in overrides.items():
        place = values
        for part in key.split("."):
            place = place[part]
        assert place == (list(value) if isinstance(value, list | tuple) else value)


def test_a_yaml_file_and_overrides_come_together(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntrain: {rounds: 7}\noptim: {lr: 1e-3}\n")  # YAML reads 1e-3 as text
    recipe = recipes.load(path, recipes.parse_overrides(["train.local_steps=3", " seed = 5", "adapt.findings=[Mass]"]))
    assert (recipe.name, recipe.train.rounds, recipe.train.local_steps, recipe.seed) == ("mine", 7, 3, 5)
    assert recipe.optim.lr == 1e-3
    assert recipe.adapt.findings == ("Mass",)
    path.write_text("# all of it is left as it is\n")
    assert recipes.load(path) == Recipe()


def test_json_does_not_depend_on_the_order_of_keys_nor_on_defaults_being_written():
    text = recipes.to_json(Recipe())
    turned = json.dumps(dict(reversed(json.loads(text).items())))
    assert recipes.to_json(recipes.from_json(turned)) == text
    assert recipes.to_json(recipes.from_json("{}")) == text
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert recipes.to_json(recipes.load("demo", {"train.rounds": 6})) != text


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("trian", r"unknown key 'trian'; did you mean 'train'\?"),
        ("train.rouns", r"unknown key 'train\.rouns'; did you mean 'train\.rounds'\?"),
        ("adapt.glori_dims", r"unknown key 'adapt\.glori_dims'; did you mean 'adapt\.glori_dim'\?"),
        ("qqqq", r"unknown key 'qqqq'$"),
        ("dino.qqqq", r"unknown key 'dino\.qqqq'$"),
        ("", r"unknown key ''$"),
    ],
)
def test_an_unknown_key_is_named_with_a_suggestion(key, message):
    with pytest.raises(ConfigError, match=message):
        recipes.load("demo", {key: 1})


def test_every_key_is_suggested_for_its_own_misspelling():
    for section in dataclasses.fields(Recipe):
        names = [section.name]
        if dataclasses.is_dataclass(section.default):
            names += [f"{section.name}.{field.name}" for field in dataclasses.fields(section.default)]
        for name in names:
            with pytest.raises(ConfigError, match=f"unknown key '{name}_'; did you mean '{name}'"):
                recipes.load("demo", {f"{name}_": 1})


def test_all_problems_are_told_at_once():
    values = {
        "seed": -1,
        "image_px": 200_000,
        "train": {"rounds": 0, "rouns": 3},
        "student": {"arch": "vit_lagre"},
        "optim": 5,
    }
    with pytest.raises(ConfigError) as error:
        check.validate(values, "mine.yaml")
    text = str(error.value)
    assert text.startswith("mine.yaml: 6 problems:\n")
    for part in (
        "seed: input should be greater than or equal to 0 (got -1)",
        "image_px: input should be less than or equal to 4096 (got 200000)",
        "train.rounds: input should be greater than 0 (got 0)",
        "unknown key 'train.rouns'; did you mean 'train.rounds'?",
        "(got 'vit_lagre')",
        "optim: input should be a dictionary",
    ):
        assert part in text


def test_all_contradictions_are_told_at_once():
    overrides = {
        "train.batch_size": 8,
        "adapt.pooled_batch_size": None,
        "crops.global_crops_scale": [0.9, 0.1],
        "image_px": 100,
        "student.patch_size": 8,
        "split.train": 0.9,
        "split.val": 0.1,
        "phases": [],
        "adapt.glori_dim": 97,
        "adapt.findings": ["Mass", "Mass"],
        "adapt.n_last_blocks": 5,
    }
    with pytest.raises(ConfigError) as error:
        recipes.load("demo", overrides)
    text = str(error.value)
    for part in (
        "train: give either batch_size",
        "adapt: give either batch_size",
        "crops.global_crops_scale: the first number must not be above the second (got [0.9, 0.1])",
        "image_px: must be a multiple of student.patch_size 8 (got 100)",
        "student.patch_size: the conv stem halves four times",
        "split: train + val must leave patients for the test",
        "phases: name at least one",
        "adapt.glori_dim: must be a multiple of adapt.glori_heads (got 97 and 4)",
        "adapt.findings: a finding is named twice",
        "adapt.n_last_blocks: vit_demo has 4 blocks (got 5)",
    ):
        assert part in text
    assert "10 problems" in text


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", None, [], "fast", 0, -1e-3])
def test_a_rate_is_a_finite_positive_number(value):
    with pytest.raises(ConfigError, match=r"optim\.lr: .*got"):
        recipes.load("demo", {"optim.lr": value})


def test_a_section_cannot_be_set_below_a_value():
    with pytest.raises(ConfigError, match=r"--set seed\.x: 'seed' holds a value, not a section"):
        recipes.load("demo", {"seed": 1, "seed.x": 2})


@pytest.mark.parametrize("pair", ["train.rounds", "=3", ""])
def test_an_override_without_key_or_value_is_explained(pair):
    with pytest.raises(ConfigError, match="write KEY=VALUE"):
        recipes.parse_overrides([pair])


@pytest.mark.parametrize("value", ["[", "2024-13-45", "{" * 3000])
def test_a_value_that_is_no_yaml_is_a_config_error(value, tmp_path):
    with pytest.raises(ConfigError, match="not valid YAML"):
        recipes.parse_overrides([f"name={value}"])
    (tmp_path / "mine.yaml").write_text(f"name: {value}")
    with pytest.raises(ConfigError, match=r"mine\.yaml: not valid YAML"):
        recipes.load(tmp_path / "mine.yaml")


def test_a_file_that_is_no_mapping_or_no_text_is_a_config_error(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("- a\n")
    with pytest.raises(ConfigError, match="a mapping of keys, not list"):
        recipes.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        recipes.load(path)


BOMB = "\n".join(
    [
        "a: &a [lol, lol, lol]",
        *(f"{n}: &{n} [{','.join(9 * ['*' + p])}]" for p, n in zip("abcdefgh", "bcdefghi", strict=True)),
    ]
)


@pytest.mark.parametrize("text", [f"{BOMB}\nseed: *i", "train: &w {rounds: 2}\nadapt: *w", "seed: &a [*a]"])
def test_aliases_are_refused(text, tmp_path):
    """A bomb unfolds to gigabytes in its message; of two sections in one, changing one changed both."""
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.yaml: not valid YAML: aliases \(\*name\) are not taken"):
        recipes.load(tmp_path / "mine.yaml", {"train.rounds": 9})


@pytest.mark.parametrize(
    "text", ["seed: 1\nseed: 2", "train: {rounds: 1, rounds: 1}", "train: {}\n'train': {rounds: 2}"]
)
def test_a_key_given_twice_is_refused(text, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"the key '(seed|rounds|train)' is given twice\n.* line [12]"):
        recipes.load(tmp_path / "mine.yaml")


def test_an_override_takes_no_alias_nor_a_key_twice():
    with pytest.raises(ConfigError, match="aliases"):
        recipes.parse_overrides(["train=&a {rounds: *a}"])
    with pytest.raises(ConfigError, match="'rounds' is given twice"):
        recipes.parse_overrides(["train={rounds: 1, rounds: 2}"])


@pytest.mark.parametrize(
    "value",
    ["x" * 10**5, ["x"] * 10**5, {"x" * 999: 1}, 16**5000, [[[[[[[[[1]]]]]]]]] * 99],
    ids=lambda v: type(v).__name__,
)
def test_what_a_message_quotes_is_cut(value):
    for key in ("seed", "optim.lr", "student.arch", "name", "x" * 10**5):
        with pytest.raises(ConfigError) as error:
            recipes.load("demo", {key: value})
        assert all(len(line) < 400 for line in str(error.value).splitlines())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("threads", 100_000),
        ("optim.adamw_beta1", 1.0),
        ("optim.adamw_beta2", 1.0),
        ("student.num_register_tokens", 10**11),
        ("dino.head_n_prototypes", 10**15),
        ("ibot.head_n_prototypes", 10**15),
        ("dino.head_hidden_dim", 10**9),
        ("adapt.glori_dim", 4 * 10**9),
        ("adapt.glori_grid", 10**6),
        ("adapt.views", 10**9),
        ("crops.rotation_deg", 1e308),
        ("crops.jitter", 1e308),
        ("optim.warmup_epochs", 1e308),
        ("evaluate.bootstrap_samples", 10**12),
        ("federation.wait_s", 1e300),
        ("seed", 16**5000),
        ("phases", ["evaluate"]),
        ("phases", ["pretrain", "evaluate"]),
        ("adapt.findings", []),
        ("adapt.findings", [""]),
        ("name", "x" * 10**5),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 40 else type(value).__name__,
)
def test_what_would_crash_later_is_refused_now(key, value):
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        recipes.load("demo", {key: value})


def test_what_a_large_server_trains_passes():
    large = {
        "student.arch": "vit_large",
        "student.num_register_tokens": 16,
        "image_px": 1024,
        "threads": 256,
        "crops.global_crops_size": 512,
        "crops.local_crops_number": 10,
        "train.pooled_batch_size": 16_384,
        "train.rounds": 10**6,
        "evaluate.bootstrap_samples": 100_000,
        "adapt.glori_dim": 4096,
    }
    for head in ("dino", "ibot"):
        sizes = {"n_prototypes": 262_144, "bottleneck_dim": 512, "hidden_dim": 8192}
        large |= {f"{head}.head_{name}": size for name, size in sizes.items()}
    assert recipes.load("laptop", large).dino.head_n_prototypes == 262_144


def test_an_unknown_preset_is_named_with_a_suggestion():
    with pytest.raises(ConfigError, match=r"no recipe 'lapto': did you mean 'laptop'\?"):
        recipes.load("lapto")


@pytest.mark.parametrize("text", ["", "[1]", "null", "{", '{"seed": NaN}', '{"optim": {"lr": Infinity}}', "[" * 10**5])
def test_a_run_config_from_outside_is_checked(text):
    with pytest.raises(ConfigError, match="run-config 'recipe'"):
        recipes.from_json(text)


def test_a_name_that_is_no_path_is_a_config_error():
    with pytest.raises(ConfigError, match="cannot be read: File name too long"):
        recipes.load("x" * 5000)


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe().seed = 1  # type: ignore[misc]


def test_a_key_that_came_later_leaves_the_digest_of_earlier_runs():
    """That of 1592267, by which runs of that commit are gone on with."""
    assert recipes.digest(recipes.load("laptop")) == "f5cdb5329c02f078b25ef1ab825e3d8ba8133a57fe6167713398e220e65fa70e"
    dealt = recipes.load("laptop", {"adapt.deal": "by_size"})
    assert recipes.digest(dealt) != recipes.digest(recipes.load("laptop"))
    assert recipes.from_json(recipes.to_json(dealt)) == dealt


def test_global_steps_are_rounds_times_local_steps():
    recipe = recipes.load(
        "demo", {"train.rounds": 3, "train.local_steps": 4, "adapt.rounds": 5, "adapt.local_steps": 6}
    )
    assert (recipe.pretrain_steps, recipe.adapt.total_steps) == (12, 30)


@pytest.mark.parametrize("text", ["", "\n  \n"])
def test_an_empty_file_is_no_recipe(tmp_path: Path, text: str) -> None:
    """What a failed command left, say; with values of the command line it is one."""
    path = tmp_path / "planned.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match="the file is empty"):
        recipes.load(str(path))
    assert recipes.load(str(path), {"name": "planned"}).name == "planned"
