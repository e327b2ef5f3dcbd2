"""`python -m nemo_opt.cpu`: an unmodified GPU program, its spawned ranks, and a GPU-only pytest suite."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_opt.cpu import __main__ as main

SUITE = """
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def work(rank, rendezvous):
    torch.cuda.set_device(rank)
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", init_method="file://" + rendezvous, rank=rank, world_size=2, device_id=device)
    total = torch.full((2,), float(rank + 1), device=f"cuda:{torch.cuda.current_device()}")
    dist.all_reduce(total)
    with open(rendezvous + str(rank), "w") as file:
        file.write(f"{device} {dist.get_backend()} {total.tolist()} {total.is_cuda}")
    dist.destroy_process_group()


def test_devices():
    assert torch.cuda.device_count() == 2
    layer = torch.nn.Linear(4, 1).cuda()
    layer(torch.ones(2, 4, device="cuda")).sum().backward()
    assert layer.weight.grad.tolist() == [[2.0] * 4]
    assert "CUDA_HOME" not in os.environ


def test_spawned_ranks(tmp_path):
    mp.spawn(work, args=(str(tmp_path / "rank"),), nprocs=torch.cuda.device_count())
    for rank in range(2):
        assert (tmp_path / f"rank{rank}").read_text() == f"cuda:{rank} gloo [3.0, 3.0] False"


def test_that_fails():
    assert torch.ones(1).cuda().is_cuda
"""


def _run(*arguments, **environment):
    command = [sys.executable, "-m", "nemo_opt.cpu", *arguments]
    root = str(Path(__file__).parents[3])
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, cwd=root, env={**os.environ, **environment})


def test_script_gets_its_arguments_and_the_number_of_devices(tmp_path):
    script = tmp_path / "program.py"
    script.write_text("import os, sys; print(sys.argv[1:], os.environ['NEMO_OPT_CPU_DEVICES'], __name__); sys.exit(7)")
    done = _run("--devices", "5", str(script), "--steps", "3", "-m")
    assert done.returncode == 7, done.stderr
    assert done.stdout == "['--steps', '3', '-m'] 5 __main__\n"


@pytest.mark.ranks
@pytest.mark.wide
def test_gpu_only_suite_runs_spawns_ranks_and_may_fail(tmp_path):
    suite = tmp_path / "test_suite.py"
    suite.write_text(SUITE)
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("print('the hidden sitecustomize ran')")
    options = ("-q", "-s", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "base"))
    # Ranks that somebody else's program spawns are not ours to measure.
    settings = {"CUDA_HOME": "/usr/local", "PYTHONPATH": str(site), "NEMO_OPT_COVERAGE_KILLED": "1"}
    done = _run("--devices", "2", "-m", "pytest", *options, str(suite), **settings)
    assert done.returncode == 1, done.stderr
    assert "1 failed, 2 passed" in done.stdout
    assert "test_that_fails" in done.stdout
    assert "the hidden sitecustomize ran" in done.stdout


def test_process_without_torch_pays_nothing():
    code = "import sys; assert 'torch' not in sys.modules and 'nemo_opt.cpu' not in sys.modules; print('light')"
    environment = main._environment(1)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.stdout == "light\n", done.stderr


def test_arguments_from_the_program_on_are_the_programs(tmp_path):
    script = tmp_path / "program.py"
    script.touch()
    assert main._parse(["--devices", "3", str(script), "--devices", "5", "-m"]) == (3, [str(script), "--devices", "5", "-m"])
    assert main._parse(["-m", "pytest", "--devices", "5"])[1] == ["-m", "pytest", "--devices", "5"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a SCRIPT or -m MODULE"),
        (["no_such_script.py"], "no_such_script.py: no such script"),
        (["--devices", "0", "-m", "x"], "at least one"),
    ],
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_examples(capsys):
    with pytest.raises(SystemExit):
        main.main(["--help"])
    assert "python -m nemo_opt.cpu --devices 8 -m pytest tests/gpu -x" in capsys.readouterr().out


def test_program_replaces_this_process(monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "/usr/local/cuda")
    called = []
    monkeypatch.setattr(os, "execve", lambda *arguments: called.append(arguments))
    main.main(["--devices", "4", "-m", "pytest", "-x"])
    ((executable, arguments, environment),) = called
    assert (executable, arguments) == (sys.executable, [sys.executable, "-m", "pytest", "-x"])
    assert environment["NEMO_OPT_CPU_DEVICES"] == "4"
    assert "CUDA_HOME" not in environment
