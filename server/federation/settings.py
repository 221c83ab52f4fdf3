"""The coordinator's folder: what a federation is, who is in it, and how its processes are started.

DIR/federation.yaml        name and addresses, to be edited by hand
DIR/ca.key, ca.crt         the authority; the key never leaves
DIR/server.key, server.crt what sites see
DIR/superexec.secret       by which the SuperLink knows the SuperExec that runs ServerApps
DIR/superlink.sqlite       Flower's database
DIR/roster.json            the sites, with their public keys
DIR/NAME.federation.json   the small file that goes to every site
DIR/flower/                Flower's own settings (FLWR_HOME)
DIR/systemd/               the unit that keeps it up
DIR/runs/                  what runs leave
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import yaml

from chexfound._launch import application_root
from chexfound.durable.files import replace_file, storage, write_json, write_text
from chexfound.errors import ConfigError
from chexfound.host import systemd
from chexfound.identity import roster
from chexfound.identity.roster import Address
from chexfound.parsing import strict_yaml
from server.federation import pki

FORMAT = 1
CONNECTION = "federation"  # what Flower's CLI calls the SuperLink
PRIVATE = ("ca.key", "server.key", "superexec.secret", "superlink.sqlite")
SUPEREXEC = "superexec.lock"  # held by the SuperExec while it runs
OURS = (sys.executable, "-P", "-m")  # a module of this installation; -P: not of the folder that we are in
POLL_S = "0.2"  # after which the SuperExec looks for a run again; Flower's own is 1 s


@dataclass(frozen=True, kw_only=True)
class Federation:
    """A federation's folder.

    Args:
        folder: absolute.
        name: of the federation, as sites see it.
        public: what sites connect to; the server's certificate is for its host.
        listen: where the guard listens.
        superlink: where the SuperLink listens; loopback, always.
    """

    folder: Path
    name: str
    public: Address
    listen: Address
    superlink: Address

    def __post_init__(self) -> None:
        if not self.superlink.loopback:
            raise ConfigError(
                f"superlink {self.superlink}: the SuperLink may listen on loopback only (127.0.0.1:PORT): whoever "
                "reaches its port can submit code to all sites"
            )

    # -- files

    def path(self, name: str) -> Path:
        """A file of the folder."""
        return self.folder / name

    @property
    def site_file(self) -> Path:
        """Give what goes to every site."""
        return self.path(f"{self.name}.federation.json")

    def sites(self) -> roster.Roster:
        """Tell who is in it.

        Raises: ConfigError.
        """
        path = self.path("roster.json")
        sites = roster.load(path)
        if sites.federation != self.name:
            raise ConfigError(
                f"{path}: of the federation {sites.federation!r}, and federation.yaml calls it {self.name!r}: sites "
                "approved that name; change it back"
            )
        return sites

    def connect(self) -> None:
        """Tell Flower's command line where the SuperLink is; federation.yaml or the folder's place may have changed."""
        path, address, authority = self.path("flower") / "config.toml", str(self.superlink), str(self.path("ca.crt"))
        with contextlib.suppress(FileNotFoundError, tomllib.TOMLDecodeError, KeyError, TypeError):
            told = tomllib.loads(path.read_text(encoding="utf-8"))["superlink"][CONNECTION]
            if (told["address"], told["root-certificates"]) == (address, authority):
                return
        quoted = json.dumps(authority, ensure_ascii=False).replace("\x7f", "\\u007f")
        write_text(
            path,
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{address}"\n'
            f"root-certificates = {quoted}\n",
        )

    def write_sites(self, sites: roster.Roster) -> None:
        """Change who is in it, and the file that goes to every site."""
        write_json(self.path("roster.json"), sites.as_dict())
        authority = self.path("ca.crt").read_text(encoding="ascii")
        write_json(self.site_file, roster.invitation(self.name, self.public, authority, sites))

    # -- processes

    def environment(self) -> dict[str, str]:
        """For every process of the coordinator; our programs first on the path, nothing sent to third parties."""
        values = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_INTERNAL_")}
        values["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), values.get("PATH", os.defpath)])
        values["PYTHONPATH"] = os.pathsep.join(filter(None, [str(application_root()), values.get("PYTHONPATH")]))
        values |= self.settings()
        for name in ("NO_PROXY", "no_proxy"):
            values[name] = ",".join([*filter(None, [values.get(name)]), "127.0.0.1", "localhost"])
        return values

    def settings(self) -> dict[str, str]:
        """Give what of the environment is this federation's."""
        return {
            "CHEXFOUND_HOME": str(self.folder),
            "FLWR_HOME": str(self.path("flower")),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": POLL_S,
            "PYTHONUNBUFFERED": "1",
        }

    def commands(self) -> dict[str, list[str]]:
        """Its three processes, as they can be typed; `processes` has those of `up`."""
        host, port = self.superlink.host, str(self.superlink.port)
        files = {name: str(self.path(name)) for name in ("ca.crt", "server.crt", "server.key", "superexec.secret")}
        return {
            "superlink": [
                "flower-superlink", "--host", host, "--port", port,
                "--ssl-ca-certfile", files["ca.crt"], "--ssl-certfile", files["server.crt"],
                "--ssl-keyfile", files["server.key"], "--enable-supernode-auth",
                "--database", str(self.path("superlink.sqlite")), "--disable-runtime-dependency-installation",
                "--isolation", "process", "--superexec-auth-secret-file", files["superexec.secret"],
            ],
            "superexec": ["chexfound-server", "superexec", str(self.folder)],
            "guard": ["chexfound-server", "guard", str(self.folder)],
        }  # fmt: skip

    def superexec_options(self) -> list[str]:
        """Give what Flower's own SuperExec is told by ours."""
        files = [str(self.path(name)) for name in ("ca.crt", "superexec.secret")]
        return [
            "--runtime-api-address", str(self.superlink),
            "--root-certificates", files[0], "--superexec-auth-secret-file", files[1],
        ]  # fmt: skip

    def processes(self) -> dict[str, list[str]]:
        """The same three as `chexfound-server up` runs them: with a SuperLink that waits for its database."""
        return {name: [*OURS, "server.cli", name, str(self.folder)] for name in self.commands()}

    def close(self) -> None:
        """Take from other accounts of this machine what a release before, or a copy, may have left open to them.

        Raises: StorageError.
        """
        with storage(self.folder):
            os.chmod(self.folder, 0o700)
            for name in PRIVATE:
                if (path := self.path(name)).exists():
                    os.chmod(path, 0o600)


def create(folder: Path, name: str, public: Address, listen: Address, superlink: Address) -> Federation:
    """Make a federation in a new folder.

    Raises: ConfigError if the folder is in use, or something is wrongly given.
    """
    roster.check_name(name, "federation name")
    folder = folder.absolute()
    unit = systemd.server(folder)
    with storage(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"{folder}: is in use; give a new folder (to renew the certificate: chexfound-server renew)"
            )
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(folder, 0o700)
    result = Federation(folder=folder, name=name, public=public, listen=listen, superlink=superlink)
    pki.make_authority(folder, name)
    pki.make_server(folder, [public.host])
    with replace_file(result.path("superexec.secret"), 0o600) as temporary:
        temporary.write_bytes(secrets.token_hex(32).encode())
    result.write_sites(roster.Roster(federation=name, serial=0, sites={}))
    result.connect()
    write_text(result.path("systemd") / "chexfound-server.service", unit)
    write_text(
        result.path("federation.yaml"), _TEMPLATE.format(**_texts(result))
    )  # last: its presence makes a folder one
    return result


_TEMPLATE = """\
# A federation of chexfound-server.  After a change: chexfound-server renew (if `public` changed), then up again.
format: 1
name: {name}
public: {public}        # what sites connect to; the certificate is for this host
listen: {listen}        # where the guard listens
superlink: {superlink}  # where flower-superlink listens: loopback only
"""
_KEYS = ("name", "public", "listen", "superlink")


def _texts(federation: Federation) -> dict[str, str]:
    return {key: json.dumps(str(getattr(federation, key)), ensure_ascii=False) for key in _KEYS}


def load(folder: Path) -> Federation:
    """The federation of a folder.

    Raises: ConfigError for a folder that holds none, or a federation.yaml that cannot be.
    """
    folder = folder.absolute()
    path = folder / "federation.yaml"
    try:
        values = strict_yaml.load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(
            f"{folder}: no federation.yaml there; make a federation with: chexfound-server init"
        ) from error
    except (OSError, UnicodeDecodeError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ConfigError(f"{path}: not of format {FORMAT}, which this release reads")
    odd = sorted(map(str, set(values) - {"format", *_KEYS}))
    missing = [key for key in _KEYS if not isinstance(values.get(key), str)]
    if odd or missing:
        raise ConfigError(
            f"{path}: "
            + "; ".join([f"unknown key {key!r}" for key in odd] + [f"no text for {key!r}" for key in missing])
        )
    roster.check_name(values["name"], f"{path}: name")
    addresses = {key: Address.parse(values[key], f"{path}: {key}") for key in ("public", "listen", "superlink")}
    return Federation(folder=folder, name=values["name"], **addresses)
