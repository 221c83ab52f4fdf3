"""Status of a site, by what its own processes wrote last; for the operator on its machine."""

from __future__ import annotations

import datetime
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chexfound.data.store import vocabulary
from chexfound.data.store.index import INDEX
from chexfound.data.store.reader import Store
from chexfound.errors import ChexfoundError, ConfigError
from chexfound.host.durations import span
from chexfound.identity.roster import read_json
from chexfound.parsing.names import shown
from chexfound.secagg.parameters import MINIMUM
from client.answer import acceptance, refusals
from client.home import approval, ledger, membership
from client.home.paths import named
from client.home.policy import Policy, clear
from client.home.secret import own_stores
from client.node import flower_node

SCHEMA = 1
STALE_S = 90.0  # a node that runs writes every 30 s
STATES = {
    "connecting": "connecting to the coordinator",
    "idle": "connected, and waiting for a run",
    "receiving": "receiving what a round needs",
    "working": "working",
    "sending": "sending its reply",
    "away": "trying to reach the coordinator, which does not answer",
    "draining": "finishing, since it was told to stop",
    "stopped": "stopped",
}
IN_A_RUN = ("receiving", "working", "sending", "draining")
TEXTS = ("since", "contact", "run", "phase", "refused")
NUMBERS = ("round", "done", "of")


def read(name: str, home: Path) -> dict[str, Any]:
    """All of it, as `status --json` prints it.

    Raises: ConfigError for a file that was damaged.
    """
    federation = membership.approved(home)
    return {
        "schema": SCHEMA,
        "site": name,
        "at": _now().isoformat(timespec="seconds"),
        "node": _node(home / "node.json"),
        "federation": None
        if federation is None
        else {
            "name": federation.name,
            "server": str(federation.server),
            "roster": federation.sites.serial,
            "sites": sorted(federation.sites.sites),
        },
        "refused": None if (last := refusals.read(home)) is None else asdict(last) | {"why": last.why},
        "policy": _policy(home, federation),
        "weights": {
            "approved": approval.approved_weights(home),
            "refused": approval.refused_weights(home),
            "warnings": acceptance.warnings(home),
        },
        "code": {"approved": approval.approved(home), "refused": list(approval.refused(home))},
        "stores": [_store(path, _words(home)) for path in sorted(home.glob(f"store-*/{INDEX}"))],
        "disk": {"free_bytes": shutil.disk_usage(home).free if home.exists() else None},
    }


def _policy(home: Path, federation: membership.ApprovedFederation | None) -> dict[str, Any]:
    """Whether the site refuses runs in the clear, and how many it took part in; an error, if that cannot be read."""
    try:
        policy, runs = Policy.load(home), ledger.begun(ledger.read(home))
        # Without a roster there are few and many: where both give one answer, it is that.
        numbers = {0, MINIMUM} if federation is None else {len(federation.sites.sites)}
        answers = {policy.masked(n) for n in numbers}
        required = answers.pop() if len(answers) == 1 else None
        by_word = policy.secagg.required is not None
        return {"required": required, "by_word": by_word, "runs": runs, "max_runs": policy.max_runs, "error": None}
    except ConfigError as error:
        return {"required": None, "by_word": None, "runs": None, "max_runs": None, "error": str(error)}


def _node(path: Path) -> dict[str, Any] | None:
    """Give what the node wrote, with whether it still runs and how old that is; None if it never ran."""
    if not path.exists():
        return None
    values = read_json(path)
    if (
        not isinstance(values, dict)
        or values.get("schema") != flower_node.SCHEMA
        or values.get("state") not in STATES
        or type(values.get("pid")) is not int
        or not all(values.get(key) is None or isinstance(values[key], str) for key in TEXTS)
        or not all(values.get(key) is None or type(values[key]) is int for key in NUMBERS)
    ):
        raise ConfigError(f"{path}: not what this release's node writes; start chexfound-client again")
    age = _now().timestamp() - path.stat().st_mtime
    return {
        **{key: values.get(key) for key in ("pid", "state", *TEXTS, *NUMBERS)},
        "running": _running(values["pid"]),
        "age_s": round(age, 1),
        "stale": age > STALE_S,
    }


def _running(pid: int) -> bool:
    """Whether a process of that number is there; signal 0 reaches nobody."""
    if pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another account's
    return True


def _words(home: Path) -> frozenset[str]:
    """Names that may leave; where site.yaml cannot be read nothing does, and those of the release are compared with."""
    try:
        return vocabulary.permitted(Policy.load(home).findings)
    except ConfigError:
        return vocabulary.permitted()


def _store(index: Path, words: frozenset[str]) -> dict[str, Any]:
    path = index.parent
    try:
        opened = Store.open(path)
    except ChexfoundError as error:
        return {"path": str(path), "error": str(error)}
    return {
        "path": str(path),
        "px": opened.px,
        "images": len(opened),
        "patients": len(set(opened.keys)),
        "withheld": vocabulary.withheld(opened, opened.ids, words),
    }


def refused(home: Path) -> list[str]:
    """The files that the site's stores have left out, each with the reason.

    Raises: DataError for a store that was damaged.
    """
    found = [Store.open(path).refused for path in own_stores(home)]
    listed = sorted({f"{shown(file)}: {shown(reason)}" for files in found for file, reason in files})
    return listed or ["no file was left out"]


def lines(found: dict[str, Any]) -> list[str]:
    """For people."""
    option = named(found["site"])
    said = [f"site {found['site']}: {_doing(found['node'], option)}"]
    node, federation = found["node"], found["federation"]
    if node is not None:
        said.append(
            f"  coordinator   last answered {_ago(node['contact'])}"
            if node["contact"]
            else "  coordinator   has not answered yet"
        )
        if node["refused"]:
            said.append(f"  refused       the last run: {shown(node['refused'])}")
    if last := found["refused"]:
        said.append(
            f"  refused       {shown(last['phase'])} of run {shown(last['run'])}: {shown(last['code'])}, "
            f"{shown(last['why'])}; {_ago(last['since'])}"
        )
    said.append(
        f"  federation    none approved yet: chexfound-client join FILE{option}"
        if federation is None
        else f"  federation    {federation['name']} at {federation['server']}, roster {federation['roster']}: "
        + ", ".join(federation["sites"])
    )
    policy = found["policy"]
    said.append(
        f"  policy        every run is refused: {policy['error']}"
        if policy["error"]
        else f"  policy        {clear(policy['required'], by_word=policy['by_word'])}"
        if policy["required"] is not None
        else "  policy        runs in the clear are accepted or refused by how many sites the roster has"
    )
    if not policy["error"]:
        full = policy["runs"] >= policy["max_runs"]
        said.append(
            f"  runs          {policy['runs']} of {policy['max_runs']} begun in 30 days"
            + (": another is REFUSED; max_runs in site.yaml allows more" if full else "")
        )
    approved, refused = found["code"]["approved"], found["code"]["refused"]
    said += [f"  code          {digest[:12]}… approved on {when[:10]}" for digest, when in approved.items()]
    if not approved:
        said.append(f"  code          none approved yet: chexfound-client approve{option}")
    for digest in refused:
        said.append(f"  code          {digest[:12]}… REFUSED: chexfound-client approve {digest[:12]}{option}")
    weights = found["weights"]
    said += [f"  weights       {digest[:12]}… approved on {when[:10]}" for digest, when in weights["approved"].items()]
    for digest, code in weights["refused"].items():
        said.append(
            f"  weights       {digest[:12]}… REFUSED ({code}): chexfound-client approve --weights {digest[:12]}{option}"
        )
    said += [f"  weights       moved further than this site's own steps: {text}" for text in weights["warnings"]]
    for store in found["stores"]:
        what = store.get("error") or f"{store['images']} images of {store['patients']} patients, {store['px']} px"
        said.append(f"  store         {what}")
        if store.get("withheld"):
            said += [f"  findings      {text}" for text in vocabulary.said(store["withheld"])]
    if not found["stores"]:
        said.append("  store         none yet: it is made when the site is served first")
    if found["disk"]["free_bytes"] is not None:
        said.append(f"  disk          {found['disk']['free_bytes'] / 1e9:.1f} GB free")
    return said


def _doing(node: dict[str, Any] | None, option: str) -> str:
    if node is None:
        return f"has not been served yet: chexfound-client --data DIR{option}"
    doing = STATES[node["state"]]
    if node["state"] in IN_A_RUN:
        doing += f": {shown(node['phase'].rpartition('.')[2])}" if node["phase"] else ""
        doing += f", round {node['round']}" if node["round"] is not None else ""
        doing += f", {node['done']} of {node['of']}" if node["of"] else ""
        doing += f", run {shown(node['run'])}" if node["run"] else ""
    since = f", since {_ago(node['since'])}" if node["since"] else ""
    if node["state"] == "stopped":
        return f"stopped {_ago(node['since'])}" if node["since"] else "stopped"
    if not node["running"]:
        return (
            f"NOT RUNNING (process {node['pid']} is gone); {span(node['age_s'])} ago it was {doing}. "
            f"Start it again: chexfound-client --data DIR{option}"
        )
    if node["stale"]:
        return (
            f"process {node['pid']} has told nothing for {span(node['age_s'])}, and was {doing} then: it hangs, or "
            "another program has that number now"
        )
    return f"{doing}{since} (process {node['pid']})"


def _ago(moment: str) -> str:
    """A time of the node's, with how long ago that is; as it is if it cannot be read."""
    try:
        when = datetime.datetime.fromisoformat(moment)
    except ValueError:
        return moment
    when = when if when.tzinfo else when.replace(tzinfo=datetime.UTC)
    return f"{when.astimezone(datetime.UTC):%Y-%m-%d %H:%M:%S} UTC ({span((_now() - when).total_seconds())} ago)"


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
