"""Secure aggregation at a site: its stages, checked by chexfound/secagg/site.py, over client/masked/attempts.py."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chexfound.contract.request import MaskedRequest, Reply, Request
from chexfound.durable.files import canonical, replace_file, write_json
from chexfound.errors import ProtocolError, RefusedError
from chexfound.identity.roster import Roster
from chexfound.model import checkpoint
from chexfound.phases import dispatch, parted, payload
from chexfound.phases.payload import Payload, Settings
from chexfound.phases.site_state import Decision, Site
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from chexfound.secagg import mask, messages
from chexfound.secagg.keys import Secrets
from chexfound.secagg.messages import Advert, Attempt, Packet
from chexfound.secagg.site import Side, WrongSharesError, advertise, check_adverts
from client.answer import lineage
from client.answer import provenance as lines
from client.home import membership
from client.home.policy import PLAIN, REQUIRED, Policy
from client.masked.attempts import Attempts, AttemptStage

TENSORS: dict[str, tuple[str, ...]] = {  # that a phase starts from; it refuses what it does not know, or is not listed
    "counts": (),
    "pretrain": ("",),
    "adapt": ("",),
    "evaluate": ("head.",),
}


def answer(site: Site, recipe: Recipe, request: MaskedRequest, run_id: int, home: Path) -> Reply:
    """Answer in a stage of secure aggregation, or to a request in the clear that its recipe allows.

    Raises: RefusedError for what would tell more than one sum; any ChexfoundError of the phase itself.
    """
    with closing(_desk(home, site.name)) as desk:
        desk.sweep()
        return desk.answer(site, recipe, request, run_id)


def features(site: Site, recipe: Recipe, request: Request, run_id: int, home: Path) -> Reply:
    """Take the backbone of a run under masks and make features of it, of which no sum is asked, and say nothing.

    To send one site another backbone is of no use: the context of every later sum holds its digest, so sites that have
    different ones do not open each other's shares.

    Raises: any ChexfoundError of the phase itself.
    """
    with closing(_desk(home, site.name)) as desk:
        index, n = desk.index(), desk.parameters.n
    held = lines.admit(site, recipe, replace(request, roster_index=0), run_id, n)
    work = replace(held.request, roster_index=index)
    reply = dispatch.run(site, recipe, work)
    held.keep(reply)
    lineage.record_features(site, recipe, work)
    return reply


def _desk(home: Path, name: str = "") -> SiteProtocol:
    return SiteProtocol(home, name, membership.present(home).sites, membership.identity_key(home), Policy.load(home))


def sweep(home: Path) -> None:
    """Drop the secrets of an attempt that is over, or whose time is, without a request of it."""
    if (home / "secagg" / "attempt").exists():
        with closing(_desk(home)) as desk:
            desk.sweep()


def check_plain(recipe: Recipe, request: Request, run_id: int, home: Path | None) -> None:
    """Check that a request in the clear asks for nothing that recipe or site's policy would have masked.

    Raises: RefusedError.
    """
    if home is not None:
        sweep(home)
    masked = recipe.aggregation == "secagg"
    policy = Policy() if home is None else Policy.load(home)
    required = home is not None and policy.masked(len(membership.present(home).sites.sites))
    untold = ("enrol",) if home is None else ("enrol", "features")  # whose replies hold nothing that is to be masked
    if not (required or masked) or (masked and request.phase in untold):
        return
    line = f"site.yaml says '{REQUIRED}'" if policy.secagg.required else f"here that needs '{PLAIN}' in site.yaml"
    why = "" if masked else f"the run's recipe does not aggregate under masks; {line}"
    error = RefusedError("secagg.plain", why)
    if home is not None:
        with closing(Attempts(home, 0.0)) as attempts:
            attempts.refuse(Attempt(run=run_id, phase=request.phase, round=request.round, attempt=1), error)
    raise error


class SiteProtocol(Attempts):
    """Answer a site's stages."""

    def __init__(self, home: Path, site: str, sites: Roster, key: Ed25519PrivateKey, policy: Policy) -> None:
        self.site, self.sites, self.key = site, sites, key
        self.parameters = policy.parameters(len(sites.sites))
        super().__init__(home, policy.secagg.attempt_s)

    def answer(self, site: Site, recipe: Recipe, request: MaskedRequest, run_id: int) -> Reply:
        """Answer a stage, or give the same answer again.

        Raises: RefusedError, after which the attempt is over; ProtocolError for what is no request.
        """
        if recipe.aggregation != "secagg":
            raise ProtocolError("a stage of secure aggregation in a run whose recipe does not aggregate under masks")
        number = request.params.get("attempt")
        told = {"run": run_id, "phase": request.phase, "round": request.round, "attempt": number}
        attempt = messages.parse(Attempt, told, "the attempt")
        asked = hashlib.sha256(canonical({"request": request.shared(), "told": request.params})).hexdigest()
        try:
            if (before := self._before(request.stage, attempt)) is not None:
                if before.asked != asked:
                    twice = request.stage == "consistency"
                    raise RefusedError("secagg.survivors-twice" if twice else "secagg.repeat")
            else:
                before = self._stage(site, recipe, request, attempt, asked)
                write_json(self.folder / f"{request.stage}.json", asdict(before))
            if request.stage == "unmask":
                self._forget(answered=True)
            return self._reply(request.stage, before)
        except WrongSharesError as error:  # the one refusal that names others, whom the coordinator cannot judge
            self._end(attempt, error)
            return Reply(values={"refused": error.code, "dealers": error.dealers})
        except RefusedError as error:
            self._end(attempt, error)
            raise

    # -- the stages

    def _stage(self, site: Site, recipe: Recipe, request: MaskedRequest, attempt: Attempt, asked: str) -> AttemptStage:
        if request.stage == "advertise":
            values, kept = self._advertise(site, recipe, request, attempt)
        elif request.stage == "share":
            values, kept = self._share(site, recipe, request, attempt)
        else:
            side = self._side(attempt)
            if request.stage == "masked":
                values, kept = self._masked(side, site, recipe, request)
            elif request.stage == "consistency":
                values, kept = self._consistency(side, request)
            else:
                values, kept = self._unmask(side, request)
        return AttemptStage(asked=asked, values=values, kept=kept)

    def _advertise(
        self, site: Site, recipe: Recipe, request: MaskedRequest, attempt: Attempt
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        _keys(request, {"attempt"})
        if request.phase not in payload.PHASES:
            raise ProtocolError(f"{request.phase!r} is no phase that is summed")
        if not self._is_open(attempt):
            self._begin(attempt)
        secrets = Secrets.fresh()
        with replace_file(self.folder / "secrets.json", 0o600) as temporary:
            temporary.write_text(json.dumps({name: value.hex() for name, value in _secrets(secrets).items()}))
        work = replace(request, roster_index=self.index())
        advert = advertise(
            self.key,
            attempt,
            self.site,
            secrets,
            findings=parted.declared(site, recipe, work),
            minimum=self.parameters.minimum,
            state=lineage.present(site, recipe, request),
        )
        return {"advert": asdict(advert)}, {"request": request.shared(), "recipe": recipes.digest(recipe)}

    def _share(
        self, site: Site, recipe: Recipe, request: MaskedRequest, attempt: Attempt
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        _keys(request, {"attempt", "adverts", "parameters", "weights", "settings", "shapes"})
        self._check_same(recipe, request)
        if request.params["parameters"] != self.parameters.shared():
            raise RefusedError(
                "secagg.parameters", f"told {request.params['parameters']}, has {self.parameters.shared()} (site.yaml)"
            )
        adverts = messages.parse_all(Advert, request.params["adverts"], "the adverts")
        own = messages.parse(Advert, self._values("advertise")["advert"], "this site's advert")
        by_name = check_adverts(adverts, own, attempt, self.sites, self.parameters)
        weights = messages.parse(str, request.params["weights"], "the weights' digest")
        plan = self._plan(recipe, request, request.params)
        base = self._base(site, recipe, request, weights)
        context = messages.context_of(
            attempt,
            self.sites,
            self.parameters,
            by_name,
            request=plan.asked(),
            weights=base,
            recipe=recipes.to_json(recipe),
            layout=plan.layout.as_list(),
        )
        side = self._side_of(attempt, by_name, context)
        kept = {
            "told": {key: request.params[key] for key in ("adverts", "weights", "settings", "shapes")},
            "context": context.hex(),
            "base": base,
            "question": plan.question(),
            "place": plan.place(),
        }
        return {"context": context.hex(), "packets": [asdict(packet) for packet in side.deal()]}, kept

    def _masked(
        self, side: Side, site: Site, recipe: Recipe, request: MaskedRequest
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        _keys(request, {"attempt", "sharers", "packets"})
        sharers = messages.parse_names(request.params["sharers"], "the sharers")
        packets = messages.parse_all(Packet, request.params["packets"], "the packets")
        side.check_sharers(sharers, packets)  # opened again when they are needed: on the disk they stay sealed
        shared = self._kept("share")
        self._check_same(recipe, request)
        weights = checkpoint.digest(request.tensors)
        if weights != shared["told"]["weights"]:
            raise RefusedError("secagg.weights")
        if odd := [name for name in request.tensors if not name.startswith(TENSORS[request.phase])]:
            raise RefusedError("secagg.weights", f"the tensor {odd[0]!r} has no part in it, and hides equal weights")
        if self._base(site, recipe, request, weights) != shared["base"]:
            raise RefusedError("secagg.weights", "the backbone here is another one by now")
        held = lines.admit(site, recipe, replace(request, roster_index=0), side.attempt.run, self.parameters.n)
        plan = self._plan(recipe, held.request, shared["told"])
        zeroed = side.zeroed(parted.parted(recipe, request), sharers)
        states = {advert.state for advert in side.adverts.values()}
        work = replace(held.request, roster_index=self.index())
        decision = Decision(
            reset_state=len(states) > 1 or "" in states,  # all the same rounds behind them, or all without
            excluded=tuple(zeroed),  # before the work, not after: what is trained on them is in every other number
        )
        lineage.begin(site, recipe, work)
        reply = dispatch.run(site, recipe, work, decision)
        held.keep(reply)
        lineage.record(site, recipe, work, shared["base"], decision)
        values, weight = plan.values(reply, zeroed, spend=True)
        arrays = self._arrays(plan.layout.sizes)
        mask.masked(plan.layout, values, weight, side.masks(sharers), arrays)
        for array in arrays.values():
            array.flush()
        digest = payload.digest(arrays)
        kept = {
            "sharers": sharers,
            "packets": [asdict(packet) for packet in packets],
            "summed": [name for name in parted.parted(recipe, request) if name not in zeroed],
            "sizes": {str(ring): array.size for ring, array in arrays.items()},
            "weights": lineage.base(site, request.phase, held.name or weights, held.backbone),
        }
        return {
            "context": side.context.hex(),
            "payload": digest,
            "signature": side.sign_masked(sharers, digest),
        }, kept

    def _consistency(self, side: Side, request: MaskedRequest) -> tuple[dict[str, Any], dict[str, Any]]:
        _keys(request, {"attempt", "survivors"})
        survivors = messages.parse_names(request.params["survivors"], "the survivors")
        masked = self._kept("masked")
        signature = side.sign_survivors(masked["sharers"], survivors, masked["summed"])
        return {"signature": signature}, {"survivors": survivors}

    def _unmask(self, side: Side, request: MaskedRequest) -> tuple[dict[str, Any], dict[str, Any]]:
        _keys(request, {"attempt", "signatures"})
        signatures = messages.parse(dict[str, messages.Signature], request.params["signatures"], "the signatures")
        masked, survivors = self._kept("masked"), self._kept("consistency")["survivors"]
        side.check_signers(masked["sharers"], survivors, signatures)
        packets = messages.parse_all(Packet, masked["packets"], "the packets")
        opened = side.check_sharers(masked["sharers"], packets)
        self._check_differencing(side.attempt, survivors, masked["summed"])
        answer = side.answer(opened, survivors)
        return {"shares": {dealer: asdict(one) for dealer, one in answer.items()}}, {}

    # -- what a stage stands on

    def index(self) -> int:
        """This site's number, which is not what the coordinator says."""
        return sorted(self.sites.sites).index(self.site)

    def _check_same(self, recipe: Recipe, request: MaskedRequest) -> None:
        """Check that a later stage is of what this site advertised for, which is all that the context then binds.

        Raises: RefusedError.
        """
        before = self._kept("advertise")
        if request.shared() != before["request"]:
            raise RefusedError("secagg.weights", "another request than this site advertised for")
        if recipes.digest(recipe) != before["recipe"]:
            raise RefusedError("secagg.weights", "another recipe than this site advertised for")

    def _base(self, site: Site, recipe: Recipe, request: MaskedRequest, weights: str) -> str:
        if request.phase == "adapt":
            lineage.check_features(site, recipe, request)
        return lineage.base(site, request.phase, weights)

    def _side(self, attempt: Attempt) -> Side:
        shared = self._kept("share")
        adverts = messages.parse_all(Advert, shared["told"]["adverts"], "the adverts")
        return self._side_of(attempt, {one.site: one for one in adverts}, bytes.fromhex(shared["context"]))

    def _side_of(self, attempt: Attempt, adverts: dict[str, Advert], context: bytes) -> Side:
        secrets = self._read("secrets")
        if secrets is None or set(secrets) != set(_secrets(Secrets.fresh())):
            raise RefusedError("secagg.incomplete")
        return Side(
            key=self.key,
            site=self.site,
            attempt=attempt,
            sites=self.sites,
            parameters=self.parameters,
            secrets=Secrets(**{name: bytes.fromhex(value) for name, value in secrets.items()}),
            adverts=adverts,
            context=context,
        )

    def _plan(self, recipe: Recipe, request: Request, told: dict[str, Any]) -> Payload:
        shapes = messages.parse(dict[str, list[messages.Number]], told["shapes"], "the shapes")
        settings = messages.parse(Settings, told["settings"], "the settings")
        return payload.plan(recipe, request, settings, self.parameters.n, shapes)


def _keys(request: MaskedRequest, keys: set[str]) -> None:
    if set(request.params) != keys:
        raise ProtocolError(f"{request.stage}: holds other values than {', '.join(sorted(keys))}")


def _secrets(secrets: Secrets) -> dict[str, bytes]:
    return {"cipher": secrets.cipher, "mask": secrets.mask, "seed": secrets.seed}
