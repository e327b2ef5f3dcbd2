"""Two trees against each other, with a measuring program that computes nothing: its times are what each tree's file says."""

import random
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest

from nemo_opt.errors import ConfigError
from nemo_opt.perf import compare as module
from nemo_opt.perf import duel, trees
from nemo_opt.perf.duel import DuelError
from nemo_opt.perf.pairs import middle
from nemo_opt.perf.trees import tree
from nemo_opt.perf.verdict import Verdict

ROOT = Path(__file__).parents[3]

PULSE = """
import json, os, random, socket, sys
from collections import namedtuple

Pulse = namedtuple("Pulse", "bench case")
PULSES = (Pulse("step", "TP1PP2"), Pulse("calibration", "fp8"))

def live(number, address, tree, rng):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        while connection.recv(1) == b"t":
            if tree.get("dies") == number:
                return "ZeroDivisionError in a rank"
            time_s = tree["times"][number] * rng.lognormvariate(0, tree["noise"])
            answer = {"time_s": time_s, "processor_s": 2 * time_s, "result": tree["result"]}
            connection.sendall(json.dumps(answer).encode() + b"\\n")

def serve():
    tree = json.load(open("nemo_opt/tree.json"))
    assert os.environ["PYTHONPATH"] == os.getcwd()
    if tree.get("broken"):
        sys.exit("ImportError: no stack")
    rng = random.Random(tree["seed"])
    for line in sys.stdin:
        request = json.loads(line)
        failure = live(request["pulse"], request["address"], tree, rng)
        print(json.dumps({"failure": failure}), flush=True)

if __name__ == "__main__":
    serve()
"""


@pytest.fixture
def pulse(tmp_path, monkeypatch):
    monkeypatch.setattr(duel, "_TIMEOUT_S", 20.0)
    place = tmp_path / "benchmarks" / "pulse.py"
    place.parent.mkdir()
    place.write_text(PULSE)
    return place


@pytest.fixture
def make(tmp_path):
    """A directory that stands for a tree: seconds of its two measurements, and more."""
    import json

    def make(name, times=(0.1, 0.2), *, noise=0.01, result=1.5, seed=0, **more):
        package = tmp_path / name / "nemo_opt"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "tree.json").write_text(json.dumps({"times": times, "noise": noise, "result": result, "seed": seed, **more}))
        return str(package.parent)

    return make


def compared(base, head, pulse, only=""):
    with tree(base, Path()) as before, tree(head, Path()) as after:
        return module.compare(before, after, pulse, module.measurements(pulse, only))


def verdicts(found):
    return {judgement.series: judgement.verdict for judgement in found.judgements}


def test_equal_trees_are_ok_by_both_clocks(pulse, make):
    found = compared(make("base"), make("head", seed=1), pulse)
    names = [f"{name}/{clock}" for name in ("step/TP1PP2", "calibration/fp8") for clock in ("time", "processor time")]
    assert verdicts(found) == dict.fromkeys(names, Verdict.OK)
    assert found.other_results == ()
    assert len(found.base) == len(found.head) == 8


@pytest.mark.parametrize(("slower", "verdict"), [(1.2, Verdict.REGRESSION), (0.8, Verdict.IMPROVEMENT)])
def test_what_became_slower_is_named_and_nothing_else(pulse, make, slower, verdict):
    found = compared(make("base"), make("head", (0.1, 0.2 * slower), seed=1), pulse)
    assert verdicts(found) == {
        "calibration/fp8/time": verdict,
        "calibration/fp8/processor time": verdict,
        "step/TP1PP2/time": Verdict.OK,
        "step/TP1PP2/processor time": Verdict.OK,
    }
    assert found.judgements[0].change == pytest.approx(slower - 1, abs=0.02)


def test_what_is_undecided_after_eight_pairs_gets_eight_more_once(pulse, make):
    found = compared(make("base", noise=0.3), make("head", noise=0.3, seed=1), pulse, only="step")
    assert len(found.head) == 16
    assert {judgement.n for judgement in found.judgements} == {16}


@pytest.mark.parametrize(("noise", "turns"), [(0.001, {duel.TURNS}), (0.5, {duel.MOST_TURNS})])
def test_a_pair_takes_more_turns_where_they_are_noisy(pulse, make, noise, turns):
    with tree(make("base", noise=noise), Path()) as before, tree(make("head", noise=noise, seed=1), Path()) as after:
        (pairs,) = duel.duel(before, after, pulse, [0], 2).values()
    assert {len(side) for pair in pairs for side in (pair.base, pair.head)} == turns


def test_the_error_of_a_pair_is_that_of_normal_noise():
    rng = random.Random(0)
    draws = [[rng.gauss(0, 1) for _ in range(24)] for _ in range(400)]
    told = statistics.median(duel._error_of_middle(values) for values in draws)
    assert told == pytest.approx(statistics.stdev(middle(np.array(values)) for values in draws), rel=0.15)
    assert duel._error_of_middle([3.0] * 8) == 0.0


def test_another_result_is_said_and_fails_nothing(pulse, make):
    found = compared(make("base"), make("head", result=1.6, seed=1), pulse)
    assert found.other_results == ("step, TP1PP2", "calibration, fp8")
    assert not any(judgement.verdict.fails for judgement in found.judgements)


def test_only_some(pulse, make):
    assert verdicts(compared(make("base"), make("head", seed=1), pulse, only="CALIB")).keys() == {
        "calibration/fp8/time",
        "calibration/fp8/processor time",
    }
    with pytest.raises(ConfigError, match="no measurement's name contains 'export': choose from step, TP1PP2; calibration, fp8"):
        module.measurements(pulse, "export")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"dies": 1}, r"(?s)head cannot be measured: ZeroDivisionError in a rank"),
        ({"broken": True}, r"(?s)head cannot be measured: .*ImportError: no stack"),
    ],
)
def test_a_tree_that_cannot_be_measured_is_named_with_its_reason(pulse, make, fault, message):
    with pytest.raises(DuelError, match=message):
        compared(make("base"), make("head", **fault), pulse)


def test_one_that_ends_before_it_is_asked_is_named_too(pulse, make):
    """Its pipe is broken then, when the request is sent and once more when it is closed."""

    def ask(there):
        with duel._server(there, pulse) as server:
            server._process.wait(20)
            server.ask(0, "nowhere")

    with tree(make("broken", broken=True), Path()) as there, pytest.raises(DuelError, match=r"(?s)cannot be measured: .*no stack"):
        ask(there)


class TestCounts:
    @pytest.fixture
    def exact(self, tmp_path):
        """Writes the benchmarks of counts, of which one test does what is given."""

        def write(body):
            (tmp_path / "conftest.py").write_text((ROOT / "benchmarks" / "conftest.py").read_text())
            place = tmp_path / "test_exact.py"
            place.write_text(f"def test_counts(benchmark, figure):\n    benchmark.pedantic(int)\n    {body}\n")
            return place

        return write

    @pytest.fixture
    def here(self):
        with tree(str(ROOT), ROOT) as this:
            yield this

    def test_those_of_both_trees_without_times(self, exact, here):
        place = exact(
            "figure(bench='step', case='TP2PP1', metric='collectives', kind='exact', unit='', value=7.0)\n"
            "    figure(bench='step', case='TP2PP1', metric='time', kind='time', unit='s', samples=[1.0, 2.0])"
        )
        base, head = module.counts(here, here, place)
        assert [(figure.bench, figure.case, figure.metric, figure.value) for figure in base] == [("step", "TP2PP1", "collectives", 7.0)]
        assert base == head

    def test_one_that_fails_is_shown(self, exact, here):
        with pytest.raises(ConfigError, match=r"(?s)test_exact.py fails:.*assert 1 == 2"):
            module.counts(here, here, exact("assert 1 == 2"))


class TestTrees:
    @pytest.fixture
    def repository(self, tmp_path):
        root = tmp_path / "repository"
        (root / "nemo_opt").mkdir(parents=True)

        def git(*arguments):
            identity = ("-c", "user.name=a", "-c", "user.email=a@b")
            return subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True).stdout

        git("init", "-q")
        for version in ("1", "2"):
            (root / "nemo_opt" / "__init__.py").write_text(version)
            git("add", ".")
            git("commit", "-qm", f"version {version}")
        return root, git

    def test_a_commit_is_checked_out_for_the_time_being(self, repository):
        root, git = repository
        with tree("HEAD~1", root) as old, tree("HEAD", root) as new:
            assert [(one.root / "nemo_opt" / "__init__.py").read_text() for one in (old, new)] == ["1", "2"]
            assert [one.sources.subject for one in (old, new)] == ["version 1", "version 2"]
            assert not old.sources.dirty
        assert not old.root.exists()
        assert git("worktree", "list").count("\n") == 1

    def test_a_directory_is_measured_as_it_is(self, repository):
        root, _ = repository
        (root / "nemo_opt" / "__init__.py").write_text("changed")
        with tree(str(root), Path("/nowhere")) as one:
            assert one.root == root
            assert one.sources.dirty

    @pytest.mark.parametrize("name", ["no-such-branch", "/nowhere", "--help"])
    def test_neither_is_refused(self, repository, name):
        with pytest.raises(ConfigError, match=f"'{name}' is neither a commit of"), tree(name, repository[0]):
            pass

    def test_a_checkout_that_fails_leaves_nothing(self, repository, monkeypatch):
        root, git = repository
        real = trees._git
        monkeypatch.setattr(trees, "_git", lambda *a: None if "add" in a else real(*a))
        with pytest.raises(ConfigError, match="shallow"), tree("HEAD", root):
            pass
        assert git("worktree", "list").count("\n") == 1
