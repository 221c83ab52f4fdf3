"""What deploy/ says, held against linters, schemas and our own rules: no engine is needed, and none runs it here."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import chexfound
import client.cli
import client.operator.options
import server.cli
from chexfound.host import systemd

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
KINDS = ("Deployment", "StatefulSet", "Pod")
HOME = "/var/lib/chexfound"


def documents() -> list[dict[str, Any]]:
    return [one for path in MANIFESTS for one in yaml.safe_load_all(path.read_text())]


def compose() -> dict[str, Any]:
    """As Compose reads it: each ${NAME:?…} filled in."""
    text = (DEPLOY / "compose.yaml").read_text()
    return yaml.safe_load(re.sub(r"\$\{(\w+):\?[^}]*\}", r"/images/\1", text))


def pods() -> dict[str, dict[str, Any]]:
    """Each pod's specification, by what it is of."""
    return {
        one["metadata"]["name"]: one["spec"] if one["kind"] == "Pod" else one["spec"]["template"]["spec"]
        for one in documents()
        if one["kind"] in KINDS
    }


def containers() -> list[tuple[str, dict[str, Any]]]:
    return [(name, one) for name, pod in pods().items() for one in [*pod.get("initContainers", []), *pod["containers"]]]


def stages() -> dict[str, list[list[str]]]:
    """The instructions of each stage of the Dockerfile, with those of the stages under it first."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    result: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("FROM "):
            _, base, _, name = line.split()
            current = result[name] = [*result.get(base, [["FROM", base]])]
        elif line.strip() and not line.startswith("#"):
            word, rest = line.split(maxsplit=1)
            current.append([word, rest])
    return result


def told(stage: str, word: str) -> list[str]:
    return [rest for name, rest in stages()[stage] if name == word]


# ---- what foreign tools say


def test_hadolint_has_nothing_to_say(require: Callable[[str], Path], tmp_path: Path) -> None:
    program = require("hadolint")
    done = subprocess.run([program, DEPLOY / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    (tmp_path / "Dockerfile").write_text("FROM python:latest\n")
    assert subprocess.run([program, tmp_path / "Dockerfile"], capture_output=True, check=False).returncode == 1


def test_compose_is_of_the_specification(require: Callable[[str], Path]) -> None:
    require("compose_spec")
    from compose_spec import PyCompose

    PyCompose.from_json(json.dumps(compose())).to_spec()
    wrong = compose()
    wrong["services"]["coordinator"]["read_olny"] = True
    with pytest.raises(ValueError, match="read_olny"):
        PyCompose.from_json(json.dumps(wrong))


def test_manifests_are_of_kubernetes_schema(require: Callable[[str], Path]) -> None:
    require("kubernetes_validate")
    import kubernetes_validate

    newest = kubernetes_validate.latest_version()
    for one in documents():
        kubernetes_validate.validate(one, newest, strict=True)
    wrong = next(one for one in documents() if one["kind"] == "StatefulSet")
    wrong["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="livenesProbe"):
        kubernetes_validate.validate(wrong, newest, strict=True)


# ---- images


def test_images_have_the_releases_version() -> None:
    images = [one["image"] for _, one in containers()] + [one["image"] for one in compose()["services"].values()]
    assert len(images) == 8
    for image in images:
        name, _, tag = image.rpartition(":")
        assert re.fullmatch(r"(registry\.example\.org/)?federated-chexfound-(server|client)", name)
        assert tag == chexfound.__version__
    for base in re.findall(r"^FROM (\S+)", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE):
        assert base in stages() or re.fullmatch(r"python:3\.\d+-slim-\w+", base)
    targets = {one["build"]["target"] for one in compose()["services"].values()}
    assert targets == {"server", "client"} <= set(stages())


def test_what_is_copied_is_there_and_not_ignored() -> None:
    rules = [
        line for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] not in ("#", "")
    ]
    assert rules[0] == "*"
    kept = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = {word for rest in told("build", "COPY") + told("server", "COPY") for word in rest.split()[:-1]}
    copied = {word for word in copied if not word.startswith(("--", "/opt/"))}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
    built = (ROOT / "pyproject.toml").read_text()
    wheel = built.split("[tool.hatch.build.targets.wheel.force-include]")[1].split("[", 1)[0]
    needed = [line.split(" = ")[0].strip('"') for line in wheel.split("\n") if " = " in line]
    assert len(needed) == 5
    assert {*needed, "chexfound", "README.md", "LICENSE"} <= copied


@pytest.mark.parametrize("stage", ["server", "client"])
def test_an_image_runs_as_nobody_special(stage: str) -> None:
    assert told(stage, "USER")[-1] == "10001:10001"
    assert "--uid 10001 --gid 10001" in told(stage, "RUN")[0]
    assert len(told(stage, "RUN")) == 1
    assert not re.search(r"apt-get|pip install|gcc|build-essential", " ".join(told(stage, "RUN")))
    assert len(told(stage, "HEALTHCHECK")) == 1


def test_a_sites_image_opens_no_port() -> None:
    assert told("client", "EXPOSE") == []
    assert told("server", "EXPOSE") == ["8443"]


# ---- how they are run


def test_containers_of_compose_may_do_little() -> None:
    for name, one in compose()["services"].items():
        assert one["read_only"] is True, name
        assert one["cap_drop"] == ["ALL"]
        assert one["security_opt"] == ["no-new-privileges:true"]
        assert one["tmpfs"]
        assert not {"privileged", "user", "pid", "ipc", "network_mode", "devices", "cap_add", "environment"} & set(one)


def test_only_the_guard_is_published() -> None:
    made = compose()
    assert len(made["services"]) == 4
    for name, one in made["services"].items():
        assert "expose" not in one
        if name == "coordinator":
            assert one["ports"] == ["8443:8443"]
        else:
            assert "ports" not in one
            assert one["networks"] == ["federation"]
    assert made["networks"]["federation"]["internal"] is True


def test_each_site_has_its_own_home_and_only_reads_its_images() -> None:
    homes = []
    for name, one in compose()["services"].items():
        (home, target), *images = (volume.split(":", 1) for volume in one["volumes"])
        assert target == HOME
        homes.append(home)
        if name != "coordinator":
            assert images == [[f"/images/{name.upper()}_IMAGES", "/pacs:ro"]]
    assert sorted(homes) == sorted(compose()["volumes"])


@pytest.mark.parametrize("name", sorted(pods()))
def test_pods_may_do_little(name: str) -> None:
    pod = pods()[name]
    assert pod["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    context = pod["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["fsGroup"]) == (True, 10001, 10001)
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not any("hostPath" in volume for volume in pod["volumes"])
    for one in [*pod.get("initContainers", []), *pod["containers"]]:
        assert one["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(one["resources"]["requests"])
        assert "memory" in one["resources"]["limits"]
        assert not any("hostPort" in port for port in one.get("ports", []))
        mounts = {mount["mountPath"]: mount for mount in one["volumeMounts"]}
        assert {HOME, "/tmp"} <= set(mounts)
        assert mounts.get("/pacs", {"readOnly": True})["readOnly"] is True


def test_each_that_serves_is_probed() -> None:
    for name in ("coordinator", "site"):
        (one,) = pods()[name]["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            how = dict(one[probe])
            if name == "coordinator":
                assert how["httpGet"] == {"path": "/health", "port": "guard", "scheme": "HTTPS"}
            else:
                assert how["exec"]["command"] == json.loads(told("client", "HEALTHCHECK")[0].split("CMD ")[1])


def test_a_site_is_alive_while_its_file_is_fresh(tmp_path: Path) -> None:
    """As client/ writes it: at least every 30 s."""
    *shell, line = json.loads(told("client", "HEALTHCHECK")[0].split("CMD ")[1])
    command = [*shell, line.replace(HOME, str(tmp_path))]
    assert command[-1] != line
    node = tmp_path / "sites" / "NORTH" / "node.json"

    def alive() -> bool:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert not alive()
    node.parent.mkdir(parents=True)
    node.write_text("{}")
    assert alive()
    before = time.time() - 300
    os.utime(node, (before, before))
    assert not alive()


def test_a_site_may_drain_before_it_is_killed() -> None:
    least = client.cli.parser().get_default("drain") + systemd.GOODBYE_S
    assert pods()["site"]["terminationGracePeriodSeconds"] >= least
    sites = [one for name, one in compose()["services"].items() if name != "coordinator"]
    assert [int(one["stop_grace_period"].removesuffix("s")) >= least for one in sites] == [True] * 3


def test_nothing_holds_a_secret() -> None:
    """Keys are files of volumes."""
    for _, one in containers():
        assert not {"env", "envFrom"} & set(one)
    assert not [one for one in documents() if one["kind"] in ("Secret", "ConfigMap")]
    assert "secrets" not in compose()


def test_a_site_listens_to_nobody() -> None:
    services = [one for one in documents() if one["kind"] in ("Service", "Ingress")]
    assert [one["spec"]["selector"]["app.kubernetes.io/name"] for one in services] == ["chexfound-coordinator"]
    for name in ("site", "site-setup"):
        assert not any("ports" in one for one in pods()[name]["containers"])


def test_the_network_lets_sites_out_to_the_coordinator_and_nothing_else() -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in documents() if one["kind"] == "NetworkPolicy"}
    assert policies.pop("default-deny") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    coordinator, site = policies["coordinator"], policies["site"]
    assert coordinator["ingress"] == [{"ports": [{"port": 8443, "protocol": "TCP"}]}]
    assert "egress" not in coordinator
    assert "ingress" not in site
    assert site["egress"][0]["to"] == [{"podSelector": coordinator["podSelector"]}]
    assert [[port["port"] for port in one["ports"]] for one in site["egress"]] == [[8443], [53, 53]]
    assert len(policies) == 2
    labels = {
        one["metadata"]["name"]: (one if one["kind"] == "Pod" else one["spec"]["template"])["metadata"]["labels"]
        for one in documents()
        if one["kind"] in KINDS
    }
    for policy, names in (("coordinator", {"coordinator"}), ("site", {"site", "site-setup"})):
        wanted = policies[policy]["podSelector"]["matchLabels"].items()
        assert {name for name, has in labels.items() if wanted <= has.items()} == names


def test_all_is_in_the_namespace() -> None:
    spaces = {one["metadata"].get("namespace") for one in documents() if one["kind"] != "Namespace"}
    assert spaces == {"chexfound"}


# ---- what is typed


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every chexfound-server and chexfound-client of deploy/, as (program, its words)."""
    for stage in ("server", "client"):
        (entry,) = json.loads(told(stage, "ENTRYPOINT")[-1])
        yield entry, json.loads(told(stage, "CMD")[-1])
    for name, one in compose()["services"].items():
        yield f"chexfound-{'server' if name == 'coordinator' else 'client'}", one["command"]
    for _, one in containers():
        if "command" not in one:
            yield f"chexfound-{one['image'].partition(':')[0].rpartition('-')[2]}", one["args"]
        elif one["command"][0] == "sh":
            yield from typed(one["args"][0])
    readme = (DEPLOY / "README.md").read_text().replace("\\\n", " ")
    for line in re.findall(r"^\$ (.*)$", readme, re.MULTILINE):
        yield from typed(line)


def typed(line: str) -> Iterator[tuple[str, list[str]]]:
    """Those of a line of a shell, also where a container's name stands for its program."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    parts: list[list[str]] = [[]]
    for word in lexer:
        if word in ("||", "&&", "|", ">", ";"):
            parts.append([])
        else:
            parts[-1].append(word)
    for words in parts:
        if words[:2] == ["docker", "compose"] and "run" in words and "--entrypoint" not in words:
            service = next(word for word in words if word in compose()["services"])
            words = [
                "chexfound-server" if service == "coordinator" else "chexfound-client",
                *words[words.index(service) + 1 :],
            ]
        for program in ("chexfound-server", "chexfound-client"):
            if program in words:
                yield program, words[words.index(program) + 1 :]


def parse(program: str, words: list[str]) -> Any:
    if program == "chexfound-server":
        return server.cli.parser().parse_args(words)
    return (client.cli if words[0].startswith("-") else client.operator.options).parser().parse_args(words)


def test_every_command_is_one() -> None:
    found = list(commands())
    assert {program for program, _ in found} == {"chexfound-server", "chexfound-client"}
    assert {"up", "init", "add-site", "enrol", "join", "nginx", "unit"} <= {words[0] for _, words in found}
    for program, words in found:
        parse(program, words)


def test_a_wrong_command_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("chexfound-server upp /x", "a && chexfound-client enrol", "docker compose run --rm riverside enroll"):
        ((program, words),) = typed(line)
        with pytest.raises(SystemExit):
            parse(program, words)


def test_programs_and_folders_are_one() -> None:
    """The coordinator's folder is the same wherever it stands, and lies on the volume."""
    folders = {
        str(parse(*one).dir) for one in commands() if one[0] == "chexfound-server" and one[1][0] in ("up", "init")
    }
    assert {folder for folder in folders if folder.startswith(HOME)} == {f"{HOME}/federation"}
    assert f"{HOME}/federation/ca.crt" in told("server", "HEALTHCHECK")[0]
