"""Checks of this machine: keys, roster, code, policy, store, disk, memory, GPU."""

from __future__ import annotations

import os
import shlex
import shutil
import stat

from chexfound.contract import limits
from chexfound.data.store import vocabulary
from chexfound.data.store.reader import Store, is_store
from chexfound.errors import ChexfoundError, ConfigError
from chexfound.host import machine
from chexfound.identity import signing
from chexfound.recipe import load as recipes
from client.home import approval, ledger, membership, secret
from client.home.paths import UMASK, exposed, named
from client.home.policy import Policy, SecAggPolicy
from client.operator.preflight.checks import Diagnosis, Subject, failed, ok, warning

GB, GIB = 10**9, 2**30
DEMO_BYTES, VITL_BYTES = 14 * 10**6, 1_610 * 10**6  # with their heads, float32
OF_NO_PATIENT = ("site.yaml", "federation.json", "ca.crt")  # which an operator may have written with his own umask
MEMORY_MIN = 2 * GIB  # the preset demo takes 1.1 in the worker (measured), Flower's node and the rest 0.4
MEMORY_VITL = 16 * GIB  # 8 for weights, gradients, moments and teacher, the rest for messages and images


def keys(subject: Subject) -> Diagnosis:
    """Both private keys are there, can be read, and by nobody else."""
    again = f"chexfound-client enrol --name {shlex.quote(subject.name)}"
    if not (subject.home / "keys").is_dir():
        return failed(f"site {subject.name!r} has no keys on this machine", again)
    for name in ("node.key", "identity.key"):
        path = subject.home / "keys" / name
        if path.exists() and (mode := stat.S_IMODE(path.stat().st_mode)) & 0o077:
            return failed(
                f"{path} is open to other accounts of this machine (mode {mode:04o})",
                f"chmod 600 {path}; if somebody may have read it, remove the keys and enrol anew: {again}",
            )
    try:
        held = membership.public_keys(subject.home)
    except ChexfoundError as error:
        return failed(str(error), f"bring the keys back from a backup, or remove what is left of them: {again}")
    return ok(f"node {signing.fingerprint(held.node)}, identity {signing.fingerprint(held.identity)}")


def roster(subject: Subject) -> Diagnosis:
    """The federation was approved, and has this site with the keys that it holds."""
    federation = membership.approved(subject.home)
    if federation is None:
        return failed(
            "no federation was approved yet",
            f"give the coordinator this site's .pub file; with the one that comes back: "
            f"chexfound-client join FILE{named(subject.name)}",
        )
    try:
        membership.check_own(
            subject.name, membership.public_keys(subject.home), federation, str(subject.home / "federation.json")
        )
    except ChexfoundError as error:
        return failed(str(error), f"{_approve(subject)}, with the coordinator's present file")
    authority = subject.home / "ca.crt"
    if not authority.is_file() or authority.read_text() != federation.authority:
        return failed(f"{authority} is not the authority that was approved", _approve(subject))
    subject.federation = federation
    sites = federation.sites
    return ok(f"federation {federation.name} at {federation.server}, roster {sites.serial} of {', '.join(sites.sites)}")


def _approve(subject: Subject) -> str:
    return f"chexfound-client join FILE{named(subject.name)}"


def code(subject: Subject) -> Diagnosis:
    """The code that the installed release ships was approved."""
    from client.node import flwr_private

    digest = flwr_private.release_bundle().digest()
    when = approval.approved(subject.home).get(digest)
    if when is None:
        approve = f"chexfound-client approve{named(subject.name)}"
        return failed(f"the installed release {digest[:12]}… was not approved here", approve)
    return ok(f"the installed release {digest[:12]}… was approved on {when[:10]}")


def policy(subject: Subject) -> Diagnosis:
    """Check that what the site demands in site.yaml can be read, and be had in this federation."""
    assert subject.federation is not None  # `roster` has been well
    path, n = subject.home / "site.yaml", len(subject.federation.sites.sites)
    try:
        demanded = Policy.load(subject.home)
    except ConfigError as error:
        return failed(str(error), f"mend {path}: until then every run is refused; docs/site.md says what it may hold")
    granted = demanded.limits(n)
    presets = ((name, recipes.load(name)) for name in recipes.presets())
    if impossible := limits.contradictions(granted, presets, n):
        return failed(f"{path}: no recipe can be granted: {'; '.join(impossible)}", f"change that in {path}")
    clear = "runs in the clear are refused" if granted.masked else "runs in the clear are accepted"
    try:
        runs = ledger.begun(ledger.read(subject.home))
    except ConfigError as error:
        return failed(str(error), "every run is refused until then")
    if runs >= demanded.max_runs:
        return warning(
            f"{runs} runs were begun in 30 days, as many as {path} allows: another is refused",
            f"if the security officer agrees, raise max_runs in {path}",
        )
    try:
        held = demanded.parameters(n)
    except ConfigError as error:
        if granted.masked:
            return failed(f"{path}: {error}; {clear}, so there can be none", f"change secagg in {path}, or take it out")
        if demanded.secagg != SecAggPolicy():
            return warning(f"{path}: {error}", f"change secagg in {path}, or take it out")
        return ok(f"{clear}; {error}")
    return ok(f"{clear}; a masked sum is over {held.survivors} of {n} sites or more, of which {held.c} may collude")


def store(subject: Subject) -> Diagnosis:
    """The images can be read."""
    data = subject.data
    if data is not None:
        if not os.path.isdir(data) or not os.access(data, os.R_OK | os.X_OK):
            return failed(f"--data {data}: no folder that this account may read", "check the path, mount and owner")
        if not any(data.iterdir()):
            return failed(f"--data {data}: is empty", "check that the images' disk is mounted")
    own = sorted(path for path in subject.home.glob("store-*") if path.is_dir())
    paths = [data] if data is not None and is_store(data) else own
    said = []
    for path in paths:
        try:
            opened = Store.open(path)
            opened.pixels([0, len(opened) - 1] if len(opened) else [])
        except (ChexfoundError, OSError, ValueError) as error:
            return failed(
                f"{path}: {error}" if str(path) not in str(error) else str(error),
                f"remove {path}: it is made anew from the images at the next start",
            )
        said.append(f"{len(opened)} images of {len(set(opened.keys))} patients, {opened.px} px, in {path}")
        subject.store = opened
    if not said:
        return ok("none yet: it is made of the images of --data when the site is served first")
    if not len(opened):
        why = f"see why: chexfound-client --data DIR{named(subject.name)} says what was refused"
        return failed(f"{paths[-1]} holds no image", why)
    return ok("; ".join(said))


def secret_key(subject: Subject) -> Diagnosis:
    """The site's secret is there, and is that which its stores were made with."""
    found = secret.present(subject.home)
    if found is None:
        return ok("none yet: it is made when the site is served first, and belongs in the backup, with keys/")
    return ok(f"key {found.naming.key_id} names and splits the patients; it belongs in the backup, with keys/")


def private(subject: Subject) -> Diagnosis:
    """No other account of this machine has any right to what is the site's: pixels, labels, secrets, its updates."""
    folder = subject.home.parent
    if folder.is_dir() and folder.stat().st_mode & UMASK:
        return failed(f"{folder} is open to other accounts of this machine", f"chmod go= {shlex.quote(str(folder))}")
    plain = [subject.home / name for name in OF_NO_PATIENT]
    if found := [path for path in exposed(subject.home) if path not in plain]:
        first, more = found[0], f" and {len(found) - 1} more" if len(found) > 1 else ""
        place = subject.home if first.is_relative_to(subject.home) else first
        mode = stat.S_IMODE(first.stat().st_mode)
        return failed(
            f"{first} is open to other accounts of this machine (mode {mode:04o}){more}",
            f"chmod -R go= {shlex.quote(str(place))}",
        )
    data = subject.data
    if data is not None and is_store(data) and any(exposed(data)):
        return warning(
            f"--data {data}: other accounts of this machine can read the store",
            f"chmod -R go= {shlex.quote(str(data))}",
        )
    return ok("nothing of the site's is open to other accounts of this machine")


def findings(subject: Subject) -> Diagnosis:
    """Which names of findings stay, and how those that leave are counted."""
    if subject.store is None:
        return ok("no store yet")
    demanded = Policy.load(subject.home)  # `policy` has been well
    store, least = subject.store, demanded.cells.patients
    stays = vocabulary.withheld(store, store.ids, vocabulary.permitted(demanded.findings))
    few = f"; counts and figures of fewer than {least} patients are told as suppressed" if least else ""
    if stays:
        names, remedy = vocabulary.said(stays)
        return warning(f"{names}{few}", f"{remedy} (no patient's name may stand there)")
    return ok(f"the names of all {len(store.findings)} may leave{few}")


def disk(subject: Subject) -> Diagnosis:
    """There is room for what a run leaves at a site."""
    from chexfound.recipe.schema import ARCHS, Recipe
    from client.answer.grants import IN_PARTS, MODELS_KEPT

    def needed(recipe: Recipe, model_bytes: int) -> int:
        images, px = (len(subject.store), subject.store.px) if subject.store else (0, recipe.image_px)
        tokens = (px // recipe.student.patch_size) ** 2 + 1
        width = ARCHS[recipe.student.arch][0] * recipe.adapt.n_last_blocks
        models = MODELS_KEPT + IN_PARTS * (2 * model_bytes > 1e6 * recipe.federation.part_mb)
        return images * (1 + recipe.adapt.views) * tokens * width * 4 + models * model_bytes

    place = next(path for path in (subject.home, *subject.home.parents) if path.exists())
    free = shutil.disk_usage(place).free
    least = needed(recipes.load("demo"), DEMO_BYTES)
    large = needed(recipes.load("vitl16-cxr1m"), VITL_BYTES)
    images = f"{len(subject.store)} labelled images" if subject.store else "no image yet"
    text = (
        f"{free / GB:.1f} GB free at {place}; with {images}, a run leaves {least / GB:.1f} GB (the preset demo) "
        f"to {large / GB:.1f} GB (ViT-L)"
    )
    if free < least:
        return failed(text, "free some space, or move everything to another disk and set CHEXFOUND_HOME")
    if free < large:
        return warning(text, "ask the coordinator which model is planned, before a run of ViT-L")
    return ok(text)


def memory(subject: Subject) -> Diagnosis:
    """There is memory for the smallest model at all, and for ViT-L."""
    total = machine.memory()
    if total is None:
        return warning("the system does not tell how much there is", f"{MEMORY_MIN / GIB:.0f} GiB are the least")
    text = f"{total / GIB:.1f} GiB; {MEMORY_MIN / GIB:.0f} are the least, ViT-L takes {MEMORY_VITL / GIB:.0f}"
    if total < MEMORY_MIN:
        return failed(text, "give the machine, or the container, more memory")
    if total < MEMORY_VITL:
        return warning(text, "enough for small models; ask the coordinator which model is planned")
    return ok(text)


def gpu(subject: Subject) -> Diagnosis:
    """The GPUs that are asked for are there."""
    import torch

    asked = subject.gpus or os.environ.get("CHEXFOUND_GPUS")
    found = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    listed = ", ".join(dict.fromkeys(found)) if found else "none"
    try:
        device = machine.device()
        number = machine.gpus(asked)
    except ChexfoundError as error:
        return failed(
            f"{error}; found: {listed}",
            "check nvidia-smi, the driver, and that the container was given the GPUs; or do not ask for them",
        )
    if not device.startswith("cuda"):
        return ok("none: the processor trains, which takes long for anything but small models")
    return ok(f"{number} of {len(found)} used: {listed}")
