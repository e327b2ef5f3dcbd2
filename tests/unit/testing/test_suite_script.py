"""Headers and selection: whatever could be left out of a run in silence is an error."""

import datetime as dt
import json
import os
from pathlib import Path

import pytest

from nemo_opt.errors import ConfigError
from nemo_opt.testing.suite import script as module
from nemo_opt.testing.suite.script import discover, select

ROOT = Path(__file__).parents[3]
TODAY = dt.date(2030, 5, 1)


def names(scripts):
    return [script.name for script in scripts]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("# nothing", "needs one header line"),
        ("# tier=L2 ranks=2 timeout=5 device=any needs=none", "lacks owner"),
        ("# tier=L2 ranks=2 timeout=5 device=any needs=none owner=@x colour=red", "unknown keys"),
        ("# tier=L2 ranks=2 timeout=5 device=any needs=none owner=@x issue=#1", "belong to scripts in quarantine"),
        ("# tier=L1 ranks=2 timeout=5 device=any needs=none owner=@x", "does not agree"),
        ("# tier=L2 ranks=2 timeout=5 device=tpu needs=none owner=@x", "device 'tpu'"),
        ("# tier=L2 ranks=2 timeout=soon device=any needs=none owner=@x", "timeout 'soon'"),
        ("# tier=L2 ranks=0 timeout=5 device=any needs=none owner=@x", "ranks '0'"),
        ("# tier=L2 ranks=1 timeout=5 device=any needs=models owner=@x", "needs \\['models'\\]"),
        ("# tier=L2 ranks=1 timeout=5 device=any needs=none owner=@x memory=much", "memory 'much'"),
        ("# tier=L2 ranks=1 timeout=5 device=any needs=none owner=@x layout=wide", "layout 'wide'"),
        ("# tier=L2 ranks=2 timeout=5 device=any needs=none owner=@x layout=TP2PP2", "takes 4 ranks, but the header says ranks=2"),
    ],
)
def test_bad_headers(functional, header, message):
    functional.write("L2_A").write_text(f"{header}\nsource lib.sh\n")
    with pytest.raises(ConfigError, match=message):
        discover(functional.folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("check r.json 'x == 1'", "does not source lib.sh"),
        ("# source lib.sh", "does not source lib.sh"),
        ("source lib.sh\nset +e\n", "lets commands fail unseen"),
        ("source lib.sh\nset +ue\n", "lets commands fail unseen"),
        ("source lib.sh\n  set +o errexit\n", "lets commands fail unseen"),
        ("source lib.sh\nif true\n", "cannot be read by bash.*syntax error"),
    ],
)
def test_a_script_whose_exit_code_means_nothing_is_refused(functional, text, message):
    functional.write("L2_A").write_text(f"# tier=L2 ranks=2 timeout=5 device=any needs=none owner=@x\n{text}\n")
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        discover(functional.folder)


def test_a_file_that_no_run_would_find_is_refused(functional):
    """By its name or its header it is meant to be a script; helpers and tools have neither."""
    script = functional.write("L2_A")
    (functional.folder / "helper.sh").write_text("true\n")
    assert names(discover(functional.folder)) == ["L2_A"]
    misnamed = {"L3_B": "true\n", "L2-B": "true\n", "l2_b": "true\n", "other": script.read_text()}
    for name, text in misnamed.items():
        stray = functional.folder / f"{name}.sh"
        stray.write_text(text)
        with pytest.raises(ConfigError, match=f"{name}.sh is meant to be a script"):
            discover(functional.folder)
        stray.unlink()
    (functional.quarantine / "stray.sh").write_text("true\n")
    with pytest.raises(ConfigError, match=r"stray\.sh is meant to be a script"):
        discover(functional.folder)


def test_every_fault_is_named(functional):
    functional.write("L2_A", owner="")
    functional.write("L2_B", ranks="no")
    with pytest.raises(ConfigError, match=r"(?s)L2_A.*owner.*L2_B.*ranks"):
        discover(functional.folder)


def test_no_script(functional):
    with pytest.raises(ConfigError, match="holds no functional script"):
        discover(functional.folder)


@pytest.mark.parametrize(
    ("name", "said", "layout"),
    [("L2_A_TP2PP1", "", "TP2PP1"), ("L2_TP1PP2_A", "", "TP1PP2"), ("L2_A", "EP2", "EP2"), ("L2_A", "", ""), ("L2_A_CP2", "CP2", "CP2")],
)
def test_layouts(functional, name, said, layout):
    functional.write(name, ranks=2, **({"layout": said} if said else {}))
    assert discover(functional.folder)[0].layout == layout


@pytest.mark.parametrize(("name", "said"), [("L2_A_TP2PP1", "TP1PP2"), ("L2_TP2_PP2", "")])
def test_layouts_that_disagree(functional, name, said):
    functional.write(name, ranks=4, **({"layout": said} if said else {}))
    with pytest.raises(ConfigError, match="which layout is it"):
        discover(functional.folder)


class TestQuarantine:
    def test_it_says_where_and_until_when(self, functional):
        functional.write("L2_A", quarantined=True, issue="#7", expires="2030-05-01")
        script = discover(functional.folder, TODAY)[0]
        assert (script.quarantined, script.issue, script.expires) == (True, "#7", TODAY)
        assert script.row()["quarantine"] == {"issue": "#7", "expires": "2030-05-01"}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ({"expires": "2030-04-30"}, "its quarantine expired on 2030-04-30"),
            ({"expires": "soon"}, "expires 'soon' is no date"),
            ({"expires": "2030-07-31"}, "more than 90 days away"),
            ({"expires": ""}, "lacks expires"),
            ({"expires": "2030-05-02", "issue": ""}, "lacks issue"),
        ],
    )
    def test_it_may_not_be_forgotten(self, functional, monkeypatch, words, message):
        monkeypatch.setattr(module, "LONGEST_QUARANTINE_DAYS", 90)
        functional.write("L2_Good")
        functional.write("L2_A", quarantined=True, **words)
        with pytest.raises(ConfigError, match=message):
            discover(functional.folder, TODAY)

    def test_one_name_is_one_script(self, functional):
        functional.write("L2_A")
        functional.write("L2_A", quarantined=True)
        with pytest.raises(ConfigError, match="has the name of"):
            discover(functional.folder)


class TestSelect:
    @pytest.fixture
    def scripts(self, functional):
        functional.write("L0_Unit", device="cpu")
        functional.write("L2_Prune_TP2PP1", ranks=2)
        functional.write("L2_Prune_TP1PP2", ranks=2, device="cuda")
        functional.write("L2_Distill", layout="TP2PP1", ranks=2)
        functional.write("L2_Known", quarantined=True)
        return discover(functional.folder)

    @pytest.mark.parametrize(
        ("chosen", "expected"),
        [
            ({}, ["L0_Unit", "L2_Distill", "L2_Prune_TP1PP2", "L2_Prune_TP2PP1"]),
            ({"tier": "L0"}, ["L0_Unit"]),
            ({"layout": "TP2PP1"}, ["L2_Distill", "L2_Prune_TP2PP1"]),
            ({"only": ["Unit", "Dist"]}, ["L0_Unit", "L2_Distill"]),
            ({"device": "cpu"}, ["L0_Unit", "L2_Distill", "L2_Prune_TP2PP1"]),
            ({"device": "cuda", "tier": "L2"}, ["L2_Distill", "L2_Prune_TP1PP2", "L2_Prune_TP2PP1"]),
            ({"quarantined": True, "only": ["n"]}, ["L0_Unit", "L2_Known", "L2_Prune_TP1PP2", "L2_Prune_TP2PP1"]),
        ],
    )
    def test_filters(self, scripts, chosen, expected):
        assert names(select(scripts, **chosen)) == expected

    @pytest.mark.parametrize("chosen", [{"tier": "L1"}, {"layout": "TP4"}, {"only": ["Quantise"]}, {"only": ["Known"]}])
    def test_an_empty_selection_is_an_error(self, scripts, chosen):
        with pytest.raises(ConfigError, match=r"no script selected by .*L2_Known \(quarantined\)"):
            select(scripts, **chosen)

    def test_devices(self, scripts):
        with pytest.raises(ConfigError, match="device 'any' is unknown"):
            select(scripts, device="any")


def test_scripts_of_the_repository():
    """Each is what a script must be, no quarantine has expired, and all start by themselves."""
    scripts = discover(ROOT / "tests" / "functional")
    assert len(scripts) >= 20
    for script in scripts:
        assert os.access(script.path, os.X_OK), script.path
    json.dumps([script.row() for script in scripts])
