"""systemd units of a coordinator and of a site, for this machine's programs and folders.

systemd.exec(5), systemd.service(5), systemd.syntax(7).  What a unit may not do is the same for both, but for the site's
GPUs: `PrivateDevices` and `ProtectClock` would hide /dev/nvidia*, so the site has neither.
"""

from __future__ import annotations

import os
import pwd
import sys
from collections.abc import Sequence
from pathlib import Path

from chexfound.errors import ConfigError

USER = "chexfound"  # to be made for it, where root makes the unit
GOODBYE_S = 60  # for a site to end once the message in hand is done or left


def server(folder: Path) -> str:
    """The unit that keeps a federation's coordinator up.

    Raises: ConfigError for a folder of unprintable characters.
    """
    return _TEMPLATE.format(
        what="coordinator of a federation of CheXFound",
        user=_user(),
        mounts=_quoted(folder),
        environment="",
        command=_command("chexfound-server", ["up", str(folder)]),
        stop="90s",  # it ends its three processes in turn
        writable=_quoted(folder),
        readable="",
        devices="PrivateDevices=yes\nProtectClock=yes\n",
    )


def client(home: Path, data: Path, arguments: Sequence[str], drain_s: float) -> str:
    """The unit that serves a site.

    Args:
        home: $CHEXFOUND_HOME.
        data: the site's images, which it may only read.
        arguments: of chexfound-client.
        drain_s: how long the message in hand may take once it is told to stop.

    Raises: ConfigError for a folder of unprintable characters.
    """
    settings = _quoted(f"CHEXFOUND_HOME={home}")
    return _TEMPLATE.format(
        what="site of a federation of CheXFound",
        user=_user(),
        mounts=f"{_quoted(home)} {_quoted(data)}",
        environment=f"Environment={settings}\n"
        "# For HTTPS_PROXY=http://…, where the way out needs one:\n"
        f"EnvironmentFile=-{_percent(home / 'environment')}\n",
        command=_command("chexfound-client", arguments),
        stop=f"{drain_s + GOODBYE_S:.0f}s",
        writable=_quoted(home),
        readable=f"ReadOnlyPaths={_quoted(data)}\n",
        devices="",
    )


def _user() -> str:
    """Name the account that makes the unit, unless that is root, as whom nothing of this should run."""
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # a container's
        return USER
    return USER if name == "root" else name


def _command(program: str, arguments: Sequence[str]) -> str:
    """A line of ExecStart: the first word takes no quotes and knows no variables; in the others a dollar is doubled."""
    first, words = str(Path(sys.executable).absolute().with_name(program)), list(arguments)
    if set(first) & set("\"'\\"):
        first, words = "/usr/bin/env", [first, *words]
    return " ".join([_quoted(first), *(_quoted(word).replace("$", "$$") for word in words)])


def _quoted(value: str | Path) -> str:
    """A word as systemd reads one.

    Raises: ConfigError.
    """
    text = _percent(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{text}"'


def _percent(value: str | Path) -> str:
    text = str(value)
    if not text.isprintable():
        raise ConfigError(f"{text!r}: a unit can name printable characters only; rename it, or make a link to it")
    return text.replace("%", "%%")


_TEMPLATE = """\
[Unit]
Description={what}
Wants=network-online.target
After=network-online.target
RequiresMountsFor={mounts}
StartLimitIntervalSec=0

[Service]
Type=exec
User={user}
{environment}ExecStart={command}
Restart=always
RestartSec=10s
KillMode=mixed
KillSignal=SIGTERM
TimeoutStopSec={stop}
UMask=0077

NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=read-only
ReadWritePaths={writable}
{readable}PrivateTmp=yes
{devices}ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
LockPersonality=yes
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""
