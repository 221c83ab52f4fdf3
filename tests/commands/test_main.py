from __future__ import annotations

import pytest

from chexfound.commands import main


def test_help_names_the_commands_of_the_federation(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith("chexfound-client (a hospital), chexfound-server (the coordinator).")
