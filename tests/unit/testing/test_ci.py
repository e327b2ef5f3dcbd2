"""The CI definitions: what runs when (ci/plan.py), and that the YAML holds no logic of its own, pins what it uses and forgets no job."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
FILES = sorted((ROOT / ".github").rglob("*.yml"))
WORKFLOWS = {file.stem: yaml.safe_load(file.read_text()) for file in FILES if file.parent.name == "workflows"}

spec = importlib.util.spec_from_file_location("plan", ROOT / "ci/plan.py")
plan = importlib.util.module_from_spec(spec)
spec.loader.exec_module(plan)


@pytest.mark.parametrize(
    ("event", "context", "wanted"),
    [
        ("push", {"ref": "refs/heads/topic"}, ""),
        ("push", {"ref": "refs/heads/main"}, "l2-cpu l2-gpu"),
        ("push", {"ref": "refs/heads/main", "default_branch": "trunk"}, ""),
        ("push", {"ref": "refs/tags/main"}, ""),
        ("merge_group", {}, "l2-cpu l2-gpu"),
        ("pull_request", {"action": "opened"}, "l2-cpu"),
        ("pull_request", {"action": "labeled", "label": "documentation"}, "l2-cpu"),
        ("pull_request", {"action": "labeled", "label": "Run CICD"}, "l2-cpu l2-gpu"),
        ("pull_request", {"action": "labeled", "label": "needs-more-tests"}, "l2-cpu l2-gpu more"),
        ("pull_request", {"action": "synchronize", "label": "Run CICD"}, "l2-cpu"),
        ("workflow_dispatch", {}, "l2-cpu l2-gpu more"),
    ],
)
def test_tiers(event, context, wanted):
    assert {job for job, is_wanted in plan.tiers(event, **context).items() if is_wanted} == set(wanted.split())


def run(command, stdin="", **environment):
    done = [sys.executable, str(ROOT / "ci/plan.py"), command]
    return subprocess.run(done, input=stdin, capture_output=True, text=True, timeout=60, env={"PATH": os.environ["PATH"], **environment})


def test_tiers_are_written_for_github():
    done = run("tiers", EVENT="pull_request", ACTION="labeled", LABEL="Run CICD")
    assert done.stdout == "l2-cpu=true\nl2-gpu=true\nmore=false\n"


def test_matrix_is_one_job_a_script():
    scripts = [{"name": "L2_A", "timeout": 600}, {"name": "L2_B", "timeout": 61}]
    done = run("matrix", json.dumps(scripts), DEVICE="cuda")
    name, _, value = done.stdout.strip().partition("=")
    assert name == "matrix"
    assert json.loads(value) == [
        {"name": "L2_A", "runs_on": ["self-hosted", "gpu"], "minutes": 10 + plan.OVERHEAD_MINUTES},
        {"name": "L2_B", "runs_on": ["self-hosted", "gpu"], "minutes": 2 + plan.OVERHEAD_MINUTES},
    ]


@pytest.mark.parametrize(
    ("stdin", "message"),
    [
        ("[]", "no functional script is selected"),
        ("", "Expecting value"),
        (json.dumps([{"name": n, "timeout": 1} for n in ("L2_A", "L2_A_TP2")]), "names that are part of others"),
    ],
    ids=["empty", "nothing", "names"],
)
def test_a_matrix_that_would_run_something_else_is_an_error(stdin, message):
    done = run("matrix", stdin, DEVICE="cpu")
    assert done.returncode == 1
    assert message in done.stderr
    assert not done.stdout


def test_scripts_are_told_apart_by_name():
    """As `--only` does it in a job for one script."""
    names = [path.stem for path in (ROOT / "tests/functional").rglob("L[0-2]_*.sh")]
    assert len(names) > 10
    assert plan.matrix([{"name": name, "timeout": 1} for name in names], "cpu")


WANTED = {"l2-cpu": "true", "l2-gpu": "false"}
GOOD = {"tiers": "success", "l0": "success", "l2-cpu": "success", "l2-gpu": "skipped"}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, []),
        ({"l2-gpu": "success"}, []),
        ({"l0": "failure"}, ["l0: failure"]),
        ({"l0": "skipped"}, ["l0: skipped"]),
        ({"l2-cpu": "skipped"}, ["l2-cpu: skipped"]),
        ({"l2-cpu": "cancelled"}, ["l2-cpu: cancelled"]),
        ({"l2-gpu": "failure"}, ["l2-gpu: failure"]),
        ({"l2-gpu": None}, ["l2-gpu: not among the needed jobs"]),
    ],
)
def test_required(changed, found):
    needs = {name: {"result": result, "outputs": {}} for name, result in (GOOD | changed).items() if result}
    needs["tiers"]["outputs"] = WANTED
    assert plan.required(needs) == found
    assert run("required", NEEDS=json.dumps(needs)).returncode == bool(found)


def test_required_needs_a_plan():
    assert plan.required({"tiers": {"result": "failure", "outputs": {}}, "l0": {"result": "success"}}) == ["the job `tiers` said nothing"]
    assert plan.required({}) == ["the job `tiers` said nothing"]


# ---------------------------------------------------------------------------------------------------------------- YAML


def steps():
    for file in FILES:
        content = yaml.safe_load(file.read_text())
        jobs = content["jobs"].values() if "jobs" in content else [content["runs"]]
        for job in jobs:
            yield from ((file.name, step) for step in job.get("steps", []))


COMMAND = re.compile(
    r"(bash (?P<script>ci/\w+\.sh)|python3 (?P<python>ci/\w+\.py)|\.venv/bin/tox run)( [^;&|$`]*| \$\w+)*( (\||>>)[^;&`]+)?"
)


def test_yaml_only_calls_scripts_that_are_there():
    commands = [(name, step["run"]) for name, step in steps() if "run" in step]
    assert len(commands) > 8
    for name, command in commands:
        match = COMMAND.fullmatch(command)
        assert match, f"{name} has logic of its own: {command!r}"
        assert (ROOT / (match["script"] or match["python"] or "tox.ini")).is_file(), f"{name}: {command}"
    assert not COMMAND.fullmatch("bash ci/test.sh && echo ok")
    assert not COMMAND.fullmatch("pytest tests")


def test_actions_are_pinned():
    used = {step["uses"] for _, step in steps() if "uses" in step}
    used |= {job["uses"] for workflow in WORKFLOWS.values() for job in workflow["jobs"].values() if "uses" in job}
    assert len(used) > 5
    for action in used:
        assert re.fullmatch(r"actions/[\w-]+@v\d+", action) or (ROOT / action).exists(), f"{action} has no version, or is not there"


def test_no_job_is_forgotten_by_the_required_one():
    jobs = WORKFLOWS["cicd"]["jobs"]
    assert set(jobs["required"]["needs"]) == jobs.keys() - {"required"}
    assert jobs["required"]["if"] == "always()"
    assert jobs["tiers"]["outputs"].keys() == plan.tiers("push").keys() <= jobs.keys()


def test_what_comes_from_outside_is_no_code():
    """Names of branches and labels reach scripts through the environment, where they cannot be read as commands."""
    assert not [(name, step["run"]) for name, step in steps() if "${{" in step.get("run", "")]


def test_every_job_has_a_time_limit():
    jobs = [job for workflow in WORKFLOWS.values() for job in workflow["jobs"].values() if "uses" not in job]
    assert len(jobs) > 6
    assert all("timeout-minutes" in job for job in jobs)


def test_the_cluster_script_calls_what_is_there():
    text = (ROOT / "ci/slurm/suite.sbatch").read_text()
    called = re.findall(r"bash (ci/[\w/]+\.sh)", text)
    assert called
    assert all((ROOT / script).is_file() for script in called)
