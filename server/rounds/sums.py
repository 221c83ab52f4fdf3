"""Sums that the coordinator opens without seeing a site's part: five stages over the exchange, tried again if need be.

What is checked here finds out early who is at fault; what protects a site is what it checks itself
(chexfound/secagg/site.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from chexfound.contract.request import MaskedRequest, Reply, Request
from chexfound.durable.files import write_json
from chexfound.errors import ProtocolError, RefusedError, SiteError
from chexfound.identity import signing
from chexfound.identity.roster import Roster
from chexfound.model import checkpoint
from chexfound.phases import parted as phases_parted
from chexfound.phases import payload
from chexfound.phases.payload import Payload, Settings
from chexfound.recipe import load as recipes
from chexfound.recipe.schema import Recipe
from chexfound.secagg import keys, messages
from chexfound.secagg.coordinator import BlameError, Opening, accused
from chexfound.secagg.keys import Secrets
from chexfound.secagg.messages import Advert, Attempt, Opened, Packet
from chexfound.secagg.parameters import Parameters, labelling
from chexfound.secagg.site import too_rare
from chexfound.wire import arrays
from server.exchange.protocol import Exchange, Member, Missing
from server.rounds import validation
from strategies.secagg import MaskedSum

Event = dict[str, Any]
_T = TypeVar("_T")
WHY = {
    "secagg.blame": "dealt or opened a wrong share, and is left out",
    "secagg.doubt": "it, or one it disputes with, lies",
}


@dataclass(frozen=True, kw_only=True)
class Summed:
    """Hold what an attempt gave.

    Args:
        plan: of the arrays; its request is the one that was asked.
        sums: by section.
        survivors: the sites that it is over.
        missing: the others, each with the reason.
        up: bytes of masked arrays that came.
        down: bytes of tensors that were sent.
        clipped: values beyond their range, over all sites.
    """

    plan: Payload
    sums: Mapping[str, np.ndarray]
    survivors: list[str]
    missing: list[dict[str, str]]
    up: int
    down: int
    clipped: int
    zeroed: list[str]


class FailedError(SiteError):
    """An attempt that gave no sum; another may."""


@dataclass(kw_only=True)
class SecureSums:
    """Make the sums of one run under masks.

    Args:
        members: the sites that enrolled, sorted by name.
        sites: the federation's roster; n is its size.
        run_id: of the messages, which sites sign for.
        folder: the run's.
    """

    recipe: Recipe
    exchange: Exchange
    members: Sequence[Member]
    sites: Roster
    run_id: int
    folder: Path
    tell: Callable[[Event], None]
    left_out: dict[str, str] = field(default_factory=dict)  # by name: why

    def __post_init__(self) -> None:
        self.parameters = Parameters.of(len(self.sites.sites), self.recipe.secagg.colluders)

    def sum(
        self,
        request: Request,
        settings: Settings,
        shapes: Mapping[str, Sequence[int]],
        *,
        backbone: str = "",
        whole: Mapping[str, Tensor] | None = None,
    ) -> Summed:
        """Ask until one attempt gives a sum.

        Args:
            request: the same to all sites.
            settings: of the numbers, told to all.
            shapes: of what is summed.
            backbone: digest of what the sites were sent in `features`, where the phase stands on it.
            whole: to send in place of the request's tensors to sites that do not all carry the same rounds.

        Raises: SiteError when no attempt did.
        """
        failed: list[str] = []
        for _ in range(self.recipe.secagg.attempts):
            number = self._next(request)
            attempt = Attempt(run=self.run_id, phase=request.phase, round=request.round, attempt=number)
            one = _Try(self, attempt, request, settings, dict(shapes), backbone, whole)
            try:
                return one.run()
            except FailedError as error:
                failed.append(str(error))
                self.tell({"event": "attempt", "phase": request.phase, "round": request.round, "failed": str(error)})
            finally:
                self.left_out |= one.at_fault
                one.close()
            if one.hopeless:
                break
        hint = ""
        if any("secagg.differencing" in text for text in failed):
            hint = "; have each site's operator allow it: chexfound-client secagg release --last"
            if request.phase == "counts":
                hint = f"; the last run's counts were over other sites: wait for all to be there, or{hint[1:]}"
            else:
                hint = (
                    "; a sum on these weights was opened before, over other sites, by another recipe, or of other "
                    f"images: begin from other weights (another seed), or{hint[1:]}"
                )
        tried = "one attempt" if len(failed) == 1 else f"{len(failed)} attempts, of which the last"
        raise SiteError(f"{_where(request)}: no sum after {tried}: {failed[-1]}{hint}")

    def hand_out(self, request: Request) -> list[dict[str, str]]:
        """Send all sites what no sum is made of; who did not take it, with the reason.

        Raises: SiteError if fewer did than a sum needs.
        """
        names, reasons = [member.name for member in self.members], dict(self.left_out)
        requests = [None if name in self.left_out else request for name in names]
        for name, outcome in zip(names, self.exchange.ask(requests), strict=True):
            if isinstance(outcome, Missing):
                reasons[name] = outcome.reason
            elif outcome is not None:
                try:
                    validation.check_nothing(outcome)
                except ProtocolError as error:
                    reasons[name] = error.code
                    self.tell({"event": "refused", **_place(request), "site": name, "reason": error.code})
        missing = [{"site": name, "reason": why} for name, why in sorted(reasons.items())]
        needed = max(self.parameters.t, self.recipe.federation.quorum_sites or 0)
        if len(names) - len(missing) < needed:
            who = ", ".join(f"{one['site']} ({one['reason']})" for one in missing)
            raise SiteError(
                f"{_where(request)}: only {len(names) - len(missing)} of {self.parameters.n} sites came through, "
                f"{needed} are needed; missing: {who}"
            )
        return missing

    def _next(self, request: Request) -> int:
        """A number that no site has seen for this sum, whenever the coordinator died."""
        path = self.folder / "attempts.json"
        numbers: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
        key = f"{self.run_id}/{request.phase}/{request.round}"
        numbers[key] = numbers.get(key, 0) + 1
        write_json(path, numbers)
        return numbers[key]

    def opened(self, key: str) -> list[list[str]]:
        """Over which sites this sum may have been opened before, by whoever was asked to: the oldest first."""
        path = self.folder / "opened.json"
        kept: dict[str, list[list[str]]] = json.loads(path.read_text()) if path.exists() else {}
        return kept.get(key, [])

    def keep_opened(self, key: str, survivors: list[str], *, refused: bool = False) -> None:
        """Remember that sites are asked to open a sum over these; or that they will not, having opened another."""
        others = [names for names in self.opened(key) if names != survivors]
        write_json(self.folder / "opened.json", {key: others if refused else [*others, survivors]})


class _Try:
    """One attempt."""

    def __init__(
        self,
        run: SecureSums,
        attempt: Attempt,
        request: Request,
        settings: Settings,
        shapes: dict[str, Sequence[int]],
        backbone: str,
        whole: Mapping[str, Tensor] | None,
    ) -> None:
        self.run_, self.attempt, self.request, self.settings, self.shapes = run, attempt, request, settings, shapes
        self.backbone, self.whole = backbone, whole
        self.sites, self.parameters = run.sites, run.parameters
        self.reasons: dict[str, str] = {member.name: "" for member in run.members} | run.left_out
        self.at_fault: dict[str, str] = {}
        self.spool: MaskedSum | None = None
        self.hopeless = False  # as long as no operator releases it: all sites came, and will not open this sum
        self.up = self.down = 0

    def run(self) -> Summed:
        """All five stages.

        Raises: FailedError.
        """
        names = self.asked = [member.name for member in self.run_.members if member.name not in self.run_.left_out]
        adverts = self._adverts(names)
        states = {advert.state for advert in adverts.values()}
        if self.whole is not None and (len(states) > 1 or "" in states):
            self.request = replace(self.request, tensors=dict(self.whole))
        self.plan = payload.plan(self.run_.recipe, self.request, self.settings, self.parameters.n, self.shapes)
        packets = self._packets(adverts)
        sharers = sorted({dealer for dealer, _ in packets})
        zeroed, least = self._zeroed(adverts, sharers)
        if self.request.phase == "adapt" and len(zeroed) == len(self.request.findings):
            # On these weights one sum is opened: one of nothing would be in the way of the next round's.
            return self._summed(self.plan.nothing(), sharers, zeroed)
        came = self._masked(adverts, packets, sharers)
        summed = [name for name in phases_parted.parted(self.run_.recipe, self.request) if name not in zeroed]
        survivors = self._survivors(adverts, came, summed, least)
        signatures = self._signatures(sharers, survivors)
        masks = self._open(adverts, packets, sharers, survivors, signatures)
        assert self.spool is not None
        return self._summed(self.spool.result(survivors, masks), survivors, zeroed)

    def _summed(self, sums: Mapping[str, np.ndarray], survivors: list[str], zeroed: list[str]) -> Summed:
        return Summed(
            plan=self.plan,
            sums=sums,
            survivors=survivors,
            missing=[
                {"site": name, "reason": why} for name, why in sorted(self.reasons.items()) if name not in survivors
            ],
            up=self.up,
            down=self.down,
            clipped=int(sums["clipped"].sum()) if "clipped" in sums else 0,
            zeroed=zeroed,
        )

    def close(self) -> None:
        """Drop what was spooled."""
        if self.spool is not None:
            self.spool.close()

    # -- the stages

    def _adverts(self, names: Sequence[str]) -> dict[str, Advert]:
        def take(name: str, reply: Reply) -> None:
            advert = messages.parse(Advert, reply.values.get("advert"), "an advert")
            if advert.site != name:
                raise ProtocolError("advertises as another site")
            advert.verify(self.attempt, self.sites)
            check_advert(advert, self.parameters.n, parted)
            adverts[name] = advert

        parted = phases_parted.parted(self.run_.recipe, self.request)
        adverts: dict[str, Advert] = {}
        self._ask("advertise", dict.fromkeys(names, {}), take)
        return self._enough(adverts, "advertised")

    def _packets(self, adverts: dict[str, Advert]) -> dict[tuple[str, str], Packet]:
        tensors = checkpoint.digest(self.request.tensors)
        weights = messages.weights_of(tensors, self.backbone) if self.backbone else tensors
        self.sum_ = f"{self.request.phase}/{weights}"
        self.context = messages.context_of(
            self.attempt,
            self.sites,
            self.parameters,
            adverts,
            request=self.plan.asked(),
            weights=weights,
            recipe=recipes.to_json(self.run_.recipe),
            layout=self.plan.layout.as_list(),
        )
        told = {
            "adverts": [asdict(adverts[name]) for name in sorted(adverts)],
            "parameters": self.parameters.shared(),
            "weights": tensors,
            "settings": asdict(self.settings),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
        }

        def take(name: str, reply: Reply) -> None:
            if reply.values.get("context") != self.context.hex():
                raise RefusedError("secagg.weights", "stands on something else than it was sent")
            packets = messages.parse_all(Packet, reply.values.get("packets"), "the packets")
            if sorted(packet.holder for packet in packets) != sorted(adverts) or {p.dealer for p in packets} != {name}:
                raise ProtocolError("does not deal one packet to each site")
            for packet in packets:
                packet.verify(self.attempt, self.context, self.sites)
            dealt[name] = packets

        dealt: dict[str, list[Packet]] = {}
        self._ask("share", dict.fromkeys(adverts, told), take)
        self._enough(dealt, "dealt shares")
        return {(packet.dealer, packet.holder): packet for packets in dealt.values() for packet in packets}

    def _masked(
        self, adverts: Mapping[str, Advert], packets: Mapping[tuple[str, str], Packet], sharers: list[str]
    ) -> list[str]:
        self.spool = spool = MaskedSum(self.plan.layout, self.run_.folder / "masked")
        told = {
            name: {"sharers": sharers, "packets": [asdict(packets[dealer, name]) for dealer in sharers]}
            for name in sharers
        }
        came: list[str] = []
        complaints: dict[str, list[str]] = {}

        def take(name: str, reply: Reply) -> None:
            if "refused" in reply.values:
                dealers = messages.parse_names(reply.values.get("dealers"), "dealers")
                if not (found := [dealer for dealer in dealers if dealer in sharers]):
                    raise ProtocolError("complains of no site that shares")
                complaints[name] = found
                self.reasons[name] = "secagg.shares"
                return
            digest = messages.parse(messages.Digest, reply.values.get("payload"), "the payload's digest")
            if reply.values.get("context") != self.context.hex() or payload.digest(reply.masked) != digest:
                raise ProtocolError("gives masked arrays of another context, or not those that it signed")
            fields = messages.masked_fields(self.attempt, self.context, name, sharers, digest)
            signature = messages.parse(messages.Signature, reply.values.get("signature"), "the signature")
            messages.verify(self.sites, name, signature, signing.MASKED, fields)
            spool.add(name, reply.masked)
            self.up += sum(array.nbytes for array in reply.masked.values())
            came.append(name)

        seconds = self.run_.recipe.federation.round_timeout_s
        self._ask("masked", told, take, tensors=self.request.tensors, timeout_s=seconds)
        if complaints:
            at_fault, doubtful = accused(complaints, self.parameters.c)
            self.at_fault |= dict.fromkeys(doubtful, "secagg.doubt") | dict.fromkeys(at_fault, "secagg.blame")
            raise FailedError(
                "shares do not open: " + "; ".join(f"{name} {WHY[why]}" for name, why in sorted(self.at_fault.items()))
            )
        return came

    def _zeroed(self, adverts: Mapping[str, Advert], sharers: Sequence[str]) -> tuple[list[str], int]:
        least = labelling(max(adverts[name].minimum for name in sharers), self.parameters.c)
        names = phases_parted.parted(self.run_.recipe, self.request)
        return too_rare(names, [adverts[name] for name in sharers], least), least

    def _survivors(
        self, adverts: Mapping[str, Advert], came: Sequence[str], summed: Sequence[str], least: int
    ) -> list[str]:
        quorum = self.run_.recipe.federation.quorum_sites or 0
        needed = max(self.parameters.t, quorum, *(adverts[name].minimum for name in came), 0)
        if len(came) < needed:
            raise FailedError(
                f"only {len(came)} of {self.parameters.n} sites came through, {needed} are needed" + self._why()
            )
        before = [names for names in self.run_.opened(self.sum_) if set(names) <= set(came)]
        came = before[0] if before else came  # whom a site has opened this sum over, it opens it over again
        if rare := too_rare(summed, [adverts[name] for name in came], least):
            raise FailedError(f"too few sites with a part in {rare[0]!r} came through" + self._why())
        return sorted(came)

    def _signatures(self, sharers: Sequence[str], survivors: list[str]) -> dict[str, str]:
        fields = messages.survivors_fields(self.attempt, self.context, sharers, survivors)

        def take(name: str, reply: Reply) -> None:
            signature = messages.parse(messages.Signature, reply.values.get("signature"), "the signature")
            messages.verify(self.sites, name, signature, signing.SURVIVORS, fields)
            signatures[name] = signature

        signatures: dict[str, str] = {}
        self._ask("consistency", dict.fromkeys(survivors, {"survivors": survivors}), take)
        return self._enough(signatures, "agreed to the survivors")

    def _open(
        self,
        adverts: Mapping[str, Advert],
        packets: Mapping[tuple[str, str], Packet],
        sharers: list[str],
        survivors: list[str],
        signatures: dict[str, str],
    ) -> list[tuple[int, bytes]]:
        opening = Opening(
            attempt=self.attempt,
            sites=self.sites,
            parameters=self.parameters,
            context=self.context,
            adverts=adverts,
            packets=packets,
            sharers=sharers,
            survivors=survivors,
        )

        def take(name: str, reply: Reply) -> None:
            shares = reply.values.get("shares")
            if not isinstance(shares, dict):
                raise ProtocolError("opens no shares")
            opened = {dealer: messages.parse(Opened, one, "a share") for dealer, one in shares.items()}
            try:
                opening.add(name, opened)
            except BlameError:
                self.at_fault[name] = "secagg.blame"
                raise

        self.run_.keep_opened(self.sum_, survivors)  # first: who answers and is not heard has answered all the same
        self._ask("unmask", dict.fromkeys(signatures, {"signatures": signatures}), take)
        if not opening.enough:
            if "secagg.differencing" in self.reasons.values():
                self.run_.keep_opened(self.sum_, survivors, refused=True)
                self.hopeless = len(survivors) == len(self.asked) and not self.run_.opened(self.sum_)
            raise FailedError(f"fewer than {self.parameters.t} sites opened their shares" + self._why())
        try:
            return opening.masks()
        except BlameError as error:
            self.at_fault[error.site] = "secagg.blame"
            raise FailedError(str(error)) from error

    # -- asking

    def _ask(
        self,
        stage: str,
        told: Mapping[str, Mapping[str, Any]],
        take: Callable[[str, Reply], None],
        *,
        tensors: Mapping[str, Tensor] | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Ask the sites of `told`; one that does not reply, or whose reply `take` refuses, is out of this attempt."""
        names = [member.name for member in self.run_.members]
        shared = dict(tensors or {})
        place = self.request.place()
        requests = [
            MaskedRequest(**place, stage=stage, params={"attempt": self.attempt.attempt, **told[name]}, tensors=shared)
            if name in told
            else None
            for name in names
        ]
        self.down += sum(arrays.payload_bytes(request.tensors) for request in requests if request is not None)
        seconds = timeout_s or self.run_.recipe.secagg.stage_timeout_s
        for name, outcome in zip(names, self.run_.exchange.ask(requests, seconds), strict=True):
            if isinstance(outcome, Missing):
                self.reasons[name] = outcome.reason
                if outcome.reason == "secagg.parameters" and self.request.phase == "counts":  # the first sum of a run
                    raise SiteError(
                        f"{name} has other numbers of sites or colluders than the recipe, {self.parameters.shared()}: "
                        "secagg.colluders must be the same at all sites (site.yaml) and in the recipe, and the roster "
                        "that of the federation; chexfound-client secagg show says what a site has"
                    )
            elif outcome is not None:
                try:
                    take(name, outcome)
                except (ProtocolError, RefusedError) as error:
                    self.reasons[name] = error.code
                    self.run_.tell({"event": "refused", **_place(self.request), "site": name, "reason": error.code})
            del outcome  # before the next one comes

    def _enough(self, came: dict[str, _T], did: str) -> dict[str, _T]:
        if len(came) < self.parameters.t:
            raise FailedError(f"only {len(came)} sites {did}, {self.parameters.t} are needed" + self._why())
        return came

    def _why(self) -> str:
        said = [f"{name} ({reason})" for name, reason in sorted(self.reasons.items()) if reason]
        return f"; missing: {', '.join(said)}" if said else ""


def check_advert(advert: Advert, n: int, parted: Sequence[str]) -> None:
    """Check that the other sites will take an advert: they would refuse the whole attempt for it, and again the next.

    Args:
        advert: of one site.
        n: sites of the roster.
        parted: what was asked that a site may have a part in; of anything else an advert has no word.

    Raises: RefusedError.
    """
    if advert.cipher == advert.mask:
        raise RefusedError("secagg.cohort", "both keys are the same")
    if advert.minimum > n:
        raise RefusedError("secagg.cohort", f"wants sums over {advert.minimum} sites, of {n}")
    if set(advert.findings) - set(parted) or len(set(advert.findings)) < len(advert.findings):
        raise RefusedError("secagg.cohort", "has a part in what was not asked, or in one thing twice")
    for key in (advert.cipher, advert.mask):
        keys.agree(Secrets.fresh().cipher, key, "chexfound secagg check", [])


def _place(request: Request) -> Event:
    return {"phase": request.phase, "round": request.round}


def _where(request: Request) -> str:
    return f"{request.phase}, round {request.round + 1}" if request.steps else request.phase
