"""A script about two hosts ends as infrastructure where namespaces are not permitted: it neither passes nor runs on one host."""

import os
import subprocess
from pathlib import Path

import pytest

TWO_HOSTS = Path(__file__).parents[2] / "functional/two_hosts.sh"


@pytest.mark.parametrize("user", ["0", "1000"], ids=["root", "user"])
def test_a_machine_without_namespaces_is_infrastructure(tmp_path, user):
    for name, text in {"unshare": 'echo "unshare: Operation not permitted" >&2; exit 1', "id": f"echo {user}"}.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
    script = tmp_path / "L2_Somewhere.sh"
    script.write_text(f"source {TWO_HOSTS}\ntwo_hosts\necho went on\n")
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(script)], capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 75
    assert "L2_Somewhere: this machine does not permit namespaces: unshare: Operation not permitted" in done.stderr
    assert "went on" not in done.stdout
