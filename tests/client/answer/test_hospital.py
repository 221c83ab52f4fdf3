"""From a node's configuration to its images and its disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chexfound.data.store.split import Membership
from chexfound.errors import ConfigError, DataError, RefusedError
from chexfound.recipe.schema import Split
from client.answer import hospital as site_module
from client.answer.hospital import site_of
from client.home import secret


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({}, "site and data"),
        ({"site": "A"}, "data"),
        ({"data": "x"}, "site"),
        ({"site": 1, "data": ""}, "site and data"),
    ],
)
def test_what_is_missing_is_named(config: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks {what}; start it with --node-config"):
        site_of(config, 64, enrolling=True)


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\nb", "x" * 65])
def test_a_name_that_cannot_name_a_folder(name: str, tiny_images: Path) -> None:
    with pytest.raises(ConfigError, match="use 1 to 64 printable characters"):
        site_of({"site": name, "data": str(tiny_images)}, 64, enrolling=True)


def test_a_store_is_taken_as_it_is(tiny_store_path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path))
    site = site_of({"site": "A", "data": str(tiny_store_path)}, 64, enrolling=True)
    assert (site.name, len(site.view), site.view.store.path) == ("A", 77, tiny_store_path)
    assert site.home == tmp_path / "sites" / "A"
    assert not site.shuffle_labels
    assert site.view.store.key_id == ""  # whoever made it has named its patients; the split is the site's all the same
    assert site.split_key == secret.of_site(site.home).split


def test_a_folder_is_taken_in(make_images: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "home"))
    images = make_images(tmp_path / "images", {"alpha": 50})
    before = sorted(images.rglob("*"))
    site = site_of({"site": "A", "data": str(images)}, 64, enrolling=False)
    assert site.view.store.path.is_relative_to(tmp_path / "home" / "sites" / "A")
    assert len(site.view) == 60
    assert site.view.store.key_id == secret.of_site(site.home).naming.key_id
    assert sorted(images.rglob("*")) == before  # nothing is written among the hospital's images


def test_images_that_come_later_are_taken_in_at_enrolment_and_not_before(
    make_images: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """A run's images are the same in each of its rounds, though the site is opened anew for one."""
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path / "home"))
    config = {"site": "A", "data": str(make_images(tmp_path / "images", {"alpha": 50}))}
    assert len(site_of(config, 64, enrolling=True).view) == 60
    make_images(tmp_path / "more", {"alpha": 51})
    (tmp_path / "images").rename(tmp_path / "before")
    (tmp_path / "more").rename(tmp_path / "images")
    for enrolling, more in ((False, False), (True, True)):
        site_module.forget()
        assert (len(site_of(config, 64, enrolling=enrolling).view) > 60) == more


@pytest.mark.parametrize("line", ["min_images", "min_patients", "cells"])
def test_who_trains_is_enough_or_the_site_takes_no_part(
    tiny_store_path: Path, tmp_path: Path, monkeypatch: Any, line: str
) -> None:
    """Of the images those for training, of the patients each once."""
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path))
    config, few = {"site": "A", "data": str(tiny_store_path)}, {"min_images": 0, "min_patients": 0, "cells": 1}

    def demand(values: dict[str, int]) -> None:
        path = tmp_path / "sites" / "A" / "site.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**values, "cells": {"patients": values["cells"]}}))

    demand(few)
    site = site_of(config, 64, enrolling=True)
    ids = site.view.split(Membership(key=secret.of_site(site.home).split, fractions=Split()), "train")
    images, patients = len(ids), len(set(site.patients(ids)))
    assert len(site.view) > images > patients
    enough = images if line == "min_images" else patients
    demand(few | {line: enough})
    assert site_of(config, 64, enrolling=False).cells
    demand(few | {line: enough + 1})
    with pytest.raises(RefusedError) as refused:
        site_of(config, 64, enrolling=False)
    assert refused.value.code == "policy.patients"


def test_a_shard_is_its_patients(tiny_store_path: Path, tmp_path: Path) -> None:
    (tmp_path / "shard.json").write_text(json.dumps(["beta/b03", "alpha/a00"]))
    config = {
        "site": "S",
        "data": str(tiny_store_path),
        "home": str(tmp_path / "h"),
        "patients": str(tmp_path / "shard.json"),
    }
    site = site_of({**config, "shuffle-labels": True}, 64, enrolling=True)
    assert set(site.patients(site.view.ids)) == {"beta/b03", "alpha/a00"}
    assert site.home == tmp_path / "h"
    assert site.shuffle_labels
    (tmp_path / "shard.json").write_text(json.dumps(["beta/zz"]))
    with pytest.raises(DataError, match="1 patients are not in .*beta/zz"):
        site_of(config, 64, enrolling=True)


def test_a_site_stays_open_between_messages(tiny_store_path: Path, tmp_path: Path, monkeypatch: Any) -> None:
    config = {"site": "A", "data": str(tiny_store_path), "home": str(tmp_path)}
    told: list[Any] = []
    monkeypatch.setattr(site_module, "on_progress", lambda *what: told.append(what))
    site = site_of(config, 64, enrolling=True)
    assert site_of(config, 64, enrolling=False) is site
    assert site_of(config, 64, enrolling=True) is not site
    assert site.progress is not None
    site.progress("pretrain", 1, 2)
    assert told == [("A", "pretrain", 1, 2)]


def test_what_the_operator_changes_holds_from_the_next_message_on(
    tiny_store_path: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("CHEXFOUND_HOME", str(tmp_path))
    config = {"site": "A", "data": str(tiny_store_path)}
    first = site_of(config, 64, enrolling=True)
    assert first.cells == 10
    (tmp_path / "sites" / "A" / "site.yaml").write_text("cells: {patients: 12}")
    changed = site_of(config, 64, enrolling=False)
    assert changed.cells == 12
    assert site_of(config, 64, enrolling=False) is changed
    (tmp_path / "sites" / "A" / "site.yaml").write_text("cells: {patients: 15}")
    assert site_of(config, 64, enrolling=False).cells == 15
