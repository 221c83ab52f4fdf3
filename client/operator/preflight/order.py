"""All checks, in the order in which they are done."""

from __future__ import annotations

from client.operator.preflight import local, remote
from client.operator.preflight.checks import Check

CHECKS = (
    Check("keys", local.keys),
    Check("roster", local.roster, ("keys",)),
    Check("code", local.code),
    Check("policy", local.policy, ("roster",)),
    Check("store", local.store),
    Check("secret", local.secret_key, ("store",)),
    Check("private", local.private, ("keys",)),
    Check("findings", local.findings, ("policy", "store")),
    Check("disk", local.disk),
    Check("memory", local.memory),
    Check("gpu", local.gpu),
    Check("dns", remote.dns, ("roster",)),
    Check("tcp", remote.tcp, ("dns",)),
    Check("tls", remote.tls, ("tcp",)),
    Check("clock", remote.clock, ("tls",)),
    Check("certificate", remote.certificate, ("tls",)),
    Check("coordinator", remote.coordinator, ("tls",)),
    Check("versions", remote.versions, ("coordinator",)),
    Check("key", remote.key, ("coordinator", "clock", "certificate")),
    Check("uplink", remote.uplink, ("key",)),
)
