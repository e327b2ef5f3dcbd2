"""What it costs to have a small job done on two ranks: by a pool that is warm, through the fork server, and by a cold torchrun.

All three do the same job in one run of this benchmark: they set up Megatron-Core's groups at TP2, sum over the tensor parallel ranks and
return the sum; the results must be equal. Times are a user's, from the call to its result; cold starts and those through the server are
interleaved. The goal is that each of the two takes at most 3 % of a cold start. What warms up (imports of the pool's ranks and of the
server) is not in them; what two processes need to be forked and to meet is the limit, 0.42 s of 17.3 s.
"""

import json
import statistics
import subprocess
import sys
import time

from nemo_opt.launch import run_ranks
from nemo_opt.testing.fork_server import ForkServer

COLD, WARM = 3, 12
LUCK = 0.08
"""Relative deviation between runs, of times of 30 ms beside one of 8 s: 0.0038, 0.0045 and 0.0035 of it were seen."""
GOAL, LIMIT = 0.03, 0.024

JOB = """
import json, os, sys

import nemo_opt._stack

import torch
from megatron.core import parallel_state

from nemo_opt.parallel import Topology, parallel


def reduce():
    with parallel(Topology(tp=2)):
        group = parallel_state.get_tensor_model_parallel_group()
        x = torch.ones(2) * (group.rank() + 1)
        torch.distributed.all_reduce(x, group=group)
        return x.tolist()


if __name__ == "__main__":
    result = reduce()
    if os.environ["RANK"] == "0":
        with open(sys.argv[1], "w") as file:
            json.dump(result, file)
"""


def _timed(times_s, function):
    start = time.perf_counter()
    result = function()
    times_s.append(time.perf_counter() - start)
    return result


def _reduce(folder):
    """In a pool's rank: the job's module is found as the other two find it."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from rank_job import reduce

    return reduce()


def test_ranks_that_are_warm_beside_ranks_that_are_cold(benchmark, figure, ranks, tmp_path, monkeypatch):
    (tmp_path / "rank_job.py").write_text(JOB)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # before the server starts: ranks import with the server's path
    result = tmp_path / "result.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "rank_job.py", result]
    times_s = {"cold": [], "pool": [], "server": []}
    sums = []

    def cold():
        result.unlink(missing_ok=True)
        subprocess.run(torchrun, check=True, capture_output=True, timeout=300)
        return json.loads(result.read_text())

    def pool():
        sums.extend(_timed(times_s["pool"], lambda: ranks(2).run(_reduce, str(tmp_path))))

    ranks(2).run(_reduce, str(tmp_path))
    with ForkServer(tmp_path / "server.log") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for _ in range(COLD):
            sums.append(_timed(times_s["cold"], cold))
            sums.extend(_timed(times_s["server"], lambda: run_ranks("rank_job:reduce", {}, devices=2)) for _ in range(WARM // COLD))
    benchmark.pedantic(pool, rounds=WARM)

    assert sums == [[3.0, 3.0]] * (COLD + WARM + 2 * WARM)
    cold_s = statistics.median(times_s["cold"])
    common = {"bench": "start of two ranks", "metric": "time of a cold torchrun's", "peer": "torchrun", "peer_value": 1.0}
    for kind, case in (("pool", "warm pool"), ("server", "fork server")):
        figure(**common, case=case, samples=[time_s / cold_s for time_s in times_s[kind]], limit=LIMIT, goal=GOAL, luck=LUCK)
    figure(bench="start of two ranks", case="torchrun", metric="time", kind="time", unit="s", samples=times_s["cold"])
