"""How long a command takes until its first work, beside what PyTorch alone and the whole stack take to be imported.

All are processes of their own, interleaved; a rank that has imported the same before them left files in the system's cache:
- `nemo-opt ptq CHECKPOINT OUTPUT` as a user types it: the parent checks the command, starts a rank, which imports the stack, sets up its
  groups, opens tokenizer and data, and begins to read the checkpoint. One bit of a weight was flipped, so that this first work is also the
  last: the rank refuses the checkpoint by its checksum. The refusal is asserted, and 2.9 MB are hashed in no time;
- `import torch`, the limit;
- the whole stack: what a script of Megatron-Core and ModelOpt imports, as the peer;
- `nemo-opt --help` and a refused flag, which load no torch, beside an interpreter that does nothing.

Goals are issue 7's: at most 1.5 times `import torch` (the peer: 5.2). Help has no goal there; the interpreter is its limit.
"""

import statistics
import subprocess
import sys
from functools import partial

import pytest

from nemo_opt.perf.interleave import interleave, ratios

ROUNDS = 3
GOAL = 1.5
BENCH = "cold start"
ENTRY = "from nemo_opt.cli import main; main()"
"""What the console script of the package does."""
STACK = (
    "import torch, megatron.core.models.gpt, megatron.core.pipeline_parallel, megatron.core.optimizer, megatron.core.dist_checkpointing, "
    "modelopt.torch.quantization, modelopt.torch.opt"
)
"""What a script needs that loads a Megatron-Core model and quantises it."""


def make_damaged_checkpoint(folder):
    """On one rank: the tiny preset, its weights altered by a bit after they were hashed."""
    from nemo_opt.checkpoint.save import save_checkpoint
    from nemo_opt.data.corpus import builtin_documents
    from nemo_opt.data.tokenizer import train_tokenizer
    from nemo_opt.models.build import build_model
    from nemo_opt.models.config import preset
    from nemo_opt.parallel import Topology, parallel

    config = preset("tiny", vocab_size=512)
    train_tokenizer(builtin_documents()[:40], config.vocab_size, folder / "tokenizer")
    with parallel(Topology()) as topology:
        chunks = build_model(config, topology, seed=1)
        save_checkpoint(folder / "checkpoint", chunks, topology=topology, tokenizer_dir=folder / "tokenizer")
    largest = max((folder / "checkpoint" / "weights").iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


def _run(*arguments, code, says):
    """A Python process to its end, which must be this one."""
    done = subprocess.run([sys.executable, *arguments], check=False, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert (done.returncode, says in output) == (code, True), output


@pytest.fixture
def contenders(ranks, tmp_path):
    ranks(1).run(make_damaged_checkpoint, tmp_path)
    checkpoint, output = str(tmp_path / "checkpoint"), str(tmp_path / "output")
    imported = "print('imported')"
    return {
        "ptq": partial(_run, "-c", ENTRY, "ptq", checkpoint, output, code=2, says="is altered: SHA-256"),
        "torch": partial(_run, "-c", f"import torch; {imported}", code=0, says="imported"),
        "stack": partial(_run, "-c", f"{STACK}; {imported}", code=0, says="imported"),
        "help": partial(_run, "-c", ENTRY, "--help", code=0, says="quickstart"),
        "refusal": partial(_run, "-c", ENTRY, "ptq", checkpoint, output, "--algorithm", "fp9", code=2, says="fp9"),
        "nothing": partial(_run, "-c", imported, code=0, says="imported"),
    }


def test_cold_start(benchmark, figure, contenders):
    times_s = benchmark.pedantic(interleave, args=(contenders, ROUNDS), kwargs={"warmup": 0}, rounds=1)
    of_torch = {name: ratios(times, times_s["torch"]) for name, times in times_s.items()}
    common = {"bench": BENCH, "metric": "time of importing torch", "limit": 1.0}
    stack = {"peer": "import of Megatron-Core and ModelOpt", "peer_value": statistics.median(of_torch["stack"])}
    figure(**common, case="ptq until its first work", samples=of_torch["ptq"], **stack, goal=GOAL)
    figure(bench=BENCH, case="ptq until its first work", metric="time", kind="time", unit="s", samples=times_s["ptq"])
    for name, case in (("help", "help"), ("refusal", "refused flag")):
        floor = statistics.median(of_torch["nothing"])
        figure(bench=BENCH, case=case, metric="time of importing torch", samples=of_torch[name], limit=floor)
