"""The promises of the rules are kept on invented noise; `python -m nemo_opt.perf.power` tells of recorded noise, with more trials."""

import numpy as np
import pytest

from nemo_opt.errors import DataError
from nemo_opt.perf import power as module
from nemo_opt.perf.pair_file import append_pairs
from nemo_opt.perf.power import invented_noise, main, noise_of, power_table, recorded_noise
from nemo_opt.perf.record import write


@pytest.fixture(scope="module")
def rows():
    return power_table(invented_noise(), trials=60)


def test_ours_keeps_its_promises(rows):
    ours = rows[0]
    assert ours.rule.startswith("history")
    assert ours.false_alarm <= 0.01
    assert ours.ten_at_once >= 0.80
    assert ours.ten_in_3 >= 0.95


def test_no_rival_of_fewer_false_alarms_finds_more(rows):
    ours, *rivals = rows[:5]
    assert not [rival.rule for rival in rivals if rival.false_alarm <= ours.false_alarm and rival.ten_at_once >= ours.ten_at_once]


def test_rivals_are_known_to_fail(rows):
    """What their users report: false alarms by the previous run and by rounds, and a deviation that outliers blow up."""
    previous, _, rounds, conbench = rows[1:5]
    assert previous.false_alarm > 0.03
    assert rounds.false_alarm > 0.10
    assert conbench.ten_at_once < 0.5


def test_pairs_keep_their_promises(rows):
    extended = rows[-1]
    assert extended.rule.startswith("8 pairs, 16 where inconclusive")
    assert extended.false_alarm <= 0.01
    assert extended.five_at_once >= 0.90
    assert extended.ten_at_once == 1.0


def test_loud_noise_makes_no_false_alarms():
    (ours, *_) = module.RULES.values()
    checks = module._histories(invented_noise(deviation=0.08, seed=1), ours, 0.0, 120, 30, seed=1)
    assert module._share(checks, True) <= 0.01
    assert module._share(checks, None) > 0.2


def test_same_seed_gives_the_same_table(monkeypatch):
    monkeypatch.setattr(module, "CHECKS", 1)
    noise = invented_noise(seed=1)
    first = power_table(noise, trials=4, runs=12, seed=3)
    assert first == power_table(noise, trials=4, runs=12, seed=3)


def test_invented_noise_is_as_it_was_asked_for():
    noise = invented_noise(deviation=0.03, outliers=0.0, likeness=0.6, seed=2)
    (deviations,) = noise.deviations
    assert noise.deviation == pytest.approx(0.03, rel=0.1)
    assert np.corrcoef(deviations[1:], deviations[:-1])[0, 1] == pytest.approx(0.6, abs=0.06)


def test_draws_keep_neighbours_together():
    noise = module.Noise(deviations=(np.arange(40.0),))
    deviations, path = module._draw(noise.deviations, 4 * module.BLOCK, np.random.default_rng(0))
    assert deviations is noise.deviations[0]
    blocks = path.reshape(4, module.BLOCK)
    assert np.all((np.diff(blocks, axis=1) % 40) == 1)


class TestRecordedPairs:
    @pytest.fixture
    def kept(self, figure, run, tmp_path):
        """A file of pairs of one measurement by two clocks, whose ratios are 1.01 and 0.99."""

        def keep(pairs=12):
            def side(factors):
                clocks = list(zip(("time", "processor time"), factors, strict=True))
                return [run(i, *(figure(x * (2 + i % 3), name, kind="time") for name, x in clocks)) for i in range(pairs)]

            append_pairs(tmp_path / "pairs.jsonl", side((1.0, 1.0)), side((1.01, 0.99)))
            return tmp_path / "pairs.jsonl"

        return keep

    def test_noise_of_pairs_and_of_the_base_alone(self, kept):
        ratios, times = recorded_noise(kept()), recorded_noise(kept(), times=True)
        for noise in (ratios, times):
            assert np.exp(noise.pairs[0]) == pytest.approx(np.tile([1.01, 0.99], (len(noise.pairs[0]), 1)), abs=1e-4)
            assert len(noise.deviations) == 2
        assert np.abs(ratios.deviations).max() < 1e-4
        assert np.exp(times.deviations[1][:12]) == pytest.approx(np.tile([2 / 3, 1, 4 / 3], 4))

    def test_too_few_are_refused(self, kept):
        with pytest.raises(DataError, match="no measurement has 10 pairs"):
            recorded_noise(kept(9))

    def test_either_clock_finds(self):
        quiet, slower = np.full(8, 0.001), np.full(8, 0.06)
        quiet[::2] = -0.001
        rule = module._pairs_rule
        assert rule(np.stack([quiet, quiet], axis=1), 8, 8) is False
        assert rule(np.stack([quiet, slower], axis=1), 8, 8) is True
        loud = np.array([0.3, -0.3] * 4)
        assert rule(np.stack([quiet, loud], axis=1), 8, 8) is None

    def test_an_inconclusive_clock_extends_both(self):
        """As `compare` does: what eight pairs found is judged again with the sixteen."""
        first = np.concatenate([np.full(8, 0.06), np.full(8, -0.06)])
        loud = np.array([0.3, -0.3] * 8)
        assert module._pairs_rule(np.stack([first, loud], axis=1), 8, 8) is True
        assert module._pairs_rule(np.stack([first, loud], axis=1), 8, 16) is None

    def test_command_takes_what_compare_kept(self, kept, tmp_path, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(module, "CHECKS", 1)
        assert main(["--pairs", str(kept()), "--trials", "3", "--runs", "10"]) == 0
        assert "12 pairs of 1 measurements, by clock 0.0%, 0.0%" in capsys.readouterr().out
        assert main(["--pairs", str(tmp_path / "nothing")]) == 2
        assert "cannot be read" in capsys.readouterr().err


@pytest.fixture
def folder(tmp_path, figure, run):
    rng = np.random.default_rng(0)
    for number in range(12):
        value = float(np.exp(rng.normal(0, 0.02)))
        samples = tuple((value * np.exp(rng.normal(0, 0.01, 9))).tolist())
        write(run(number, figure(value, samples=samples), figure(7, "count", kind="exact")), tmp_path)
    return tmp_path / "here"


def test_noise_is_that_of_the_records(figure, run):
    values = [1.0, 1.1, 0.9, 1.0, 1.05, 1.0, 1.0, 1.2, 1.0, 1.0]
    noise = noise_of([run(i, figure(x), figure(i, "count", kind="exact")) for i, x in enumerate(values)])
    assert len(noise.deviations) == 1
    assert np.exp(noise.deviations[0]) == pytest.approx(values)


def test_too_few_records_tell_no_noise(figure, run):
    with pytest.raises(DataError, match="10 times, the most is 9"):
        noise_of([run(i, figure(1.0)) for i in range(9)])


def test_command_prints_the_table_of_recorded_noise(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(module, "CHECKS", 1)
    assert main([str(folder), "--trials", "3", "--runs", "10"]) == 0
    printed = capsys.readouterr().out
    assert "1 series" in printed
    assert all(name in printed for name in module.RULES)


def test_command_refuses_a_folder_that_is_not_there(capsys):
    assert main(["/nowhere"]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "Example: python -m nemo_opt.perf.power" in capsys.readouterr().out
