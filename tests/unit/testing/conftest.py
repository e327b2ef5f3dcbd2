"""Small functional scripts for the tests of their runner."""

import json

import pytest

from nemo_opt.testing import suite

LIB = """
set -euo pipefail
holds() { echo '{"kind": "check", "what": "loss < 1", "holds": true, "values": {"loss": 0.5}, "source": "r"}' >>"$NEMO_OPT_ASSERTIONS"; }
"""
"""In place of tests/functional/lib.sh, which takes a hundred times as long; test_suite_lib.py runs that one."""


class Functional:
    """A folder of scripts, and runs of it."""

    def __init__(self, tmp_path):
        self.folder, self.logs, self.report = tmp_path / "functional", tmp_path / "logs", tmp_path / "report.json"
        self.quarantine, self.history = self.folder / "quarantine", tmp_path / "history.jsonl"
        self.quarantine.mkdir(parents=True)
        (self.folder / "lib.sh").write_text(LIB)

    def write(self, name, body="holds", *, quarantined=False, lib="lib.sh", **words):
        """Writes a script; `words` replace those of its header."""
        header = {"tier": name[:2], "ranks": 1, "timeout": 30, "device": "any", "needs": "none", "owner": "@x"}
        header |= {"issue": "#1", "expires": "2999-01-01"} if quarantined else {}
        path = (self.quarantine if quarantined else self.folder) / f"{name}.sh"
        line = " ".join(f"{key}={value}" for key, value in (header | words).items())
        path.write_text(f"#!/usr/bin/env bash\n# {line}\nsource {self.folder}/{lib}\n{body}\n")
        return path

    def run(self, *, tier=None, layout=None, only=(), quarantined=False, **options):
        """(exit code, what the JSON says of each script)."""
        chosen = suite.Options(**{"logs": self.logs, "history": self.history, "json": self.report, "fresh": True} | options)
        code = suite.main(folder=self.folder, options=chosen, tier=tier, layout=layout, only=only, quarantined=quarantined)
        return code, {row["name"]: row for row in json.loads(self.report.read_text())["scripts"]}


@pytest.fixture
def functional(tmp_path, monkeypatch):
    """On the CPU, and with quarantines that may end in a thousand years."""
    monkeypatch.setenv("NEMO_OPT_DEVICE", "cpu")
    monkeypatch.delenv("NEMO_OPT_FORK_SERVER", raising=False)
    monkeypatch.setattr("nemo_opt.testing.suite.script.LONGEST_QUARANTINE_DAYS", 400_000)
    return Functional(tmp_path)
