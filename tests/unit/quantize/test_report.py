"""The report of a quantisation: what its drawings and tables say, read back from matplotlib's artists and from the page."""

import re
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from matplotlib.colors import same_color
from matplotlib.figure import Figure

from nemo_opt.pages import COLOURS
from nemo_opt.quantize.report import Line, lines_of, proof_text, write_report, write_sweep_report

LAYER = "decoder.layers.{}."
FACTS = {
    "decoder.layers.10.mlp.linear_fc1.weight_quantizer": {"sqnr_db": 30.0, "amax": 2.0, "bits": 8.0},
    "decoder.layers.2.mlp.linear_fc1.weight_quantizer": {"sqnr_db": 31.5, "amax": 0.5, "bits": 8.0},
    "decoder.layers.2.mlp.linear_fc1.input_quantizer": {"sqnr_db": 25.25, "amax": 40.0},
    "decoder.layers.2.self_attention.linear_qkv.weight_quantizer": {"sqnr_db": None, "amax": None, "bits": 4.25},
    "decoder.layers.2.self_attention.core_attention.k_bmm_quantizer": {"sqnr_db": 28.0, "amax": 3.0},
    "decoder.layers.2.self_attention.core_attention.q_bmm_quantizer": {"sqnr_db": 1.0, "amax": 3.0},
    "output_layer.weight_quantizer": {"sqnr_db": 33.0, "amax": 1.0, "bits": 8.0},
}
RESULT = {
    "path": "OUT/<a>",
    "layout": "TP2PP1",
    "spec": "te",
    "device": "cpu/gloo",
    "time_s": 2.5,
    "algorithm": "fp8",
    "export_format": "nemo",
    "loss_before": 5.0,
    "loss_after": 5.0125,
    "quantizers": 40,
    "bytes_before": 4_000_000,
    "bytes_after": 2_000_000,
    "block": "",
    "bits_per_weight": 8.001,
    "bits_per_parameter": 12.0,
    "calibration": {"samples": 64, "tokens": 8192, "padding": 0, "passes": 1, "time_s": 0.5, "tokens_per_s": 16384.0},
    "sqnr": {"weights": {"median": 31.0, "worst": 30.0, "worst_name": "decoder.layers.10.mlp.linear_fc1.weight_quantizer"}},
    "quantizer_facts": FACTS,
    "proof": None,
}
INT4 = RESULT | {"algorithm": "int4", "bits_per_weight": 4.25, "loss_after": 4.9, "block": "64", "proof": {"bound": 0.1}}
SWEEP = {
    "path": "OUT",
    "checkpoint": "CKPT",
    "layout": "TP2PP1",
    "spec": "te",
    "device": "cpu/gloo",
    "time_s": 30.0,
    "loss_before": 5.0,
    "bytes_before": 4_000_000,
    "runs": {
        "fp8": {"result": RESULT, "error": None},
        "int4": {"result": INT4, "error": None},
        "int8": {"result": None, "error": "it <broke>"},
    },
}


def test_lines_follow_the_forward_pass_and_the_layers():
    lines = lines_of(FACTS, "sqnr_db", min)
    assert lines == [
        Line(part="core_attention", kind="keys", layers=[2], values=[28.0]),
        Line(part="linear_fc1", kind="weights", layers=[2, 10], values=[31.5, 30.0]),
        Line(part="linear_fc1", kind="inputs", layers=[2], values=[25.25]),
    ], "a weight that loses nothing, the head and an unknown kind have no line"
    assert [line.values for line in lines_of(FACTS, "amax", max)] == [[3.0], [0.5, 2.0], [40.0]]


def test_the_worst_expert_stands_for_its_layer():
    name = "decoder.layers.0.mlp.experts.experts.{}.linear_fc1.weight_quantizer"
    facts = {name.format(n): {"sqnr_db": value, "amax": value} for n, value in enumerate((20.0, 10.0, 30.0))}
    assert lines_of(facts, "sqnr_db", min) == [Line(part="linear_fc1", kind="weights", layers=[0], values=[10.0])]
    assert lines_of(facts, "amax", max)[0].values == [30.0]


def test_a_proof_is_said_with_its_bounds():
    proof = {"tokens": 2048, "logit_error": 1.234e-6, "loss_difference": 0.0, "logit_bound": 1e-5, "loss_bound": 1e-4, "form": "hf"}
    assert proof_text(proof) == "tokens 2,048, logit error 1.23e-06 (bound 1e-05), loss difference 0 (bound 0.0001), form hf"


def drawn(write, value):
    """What `write` puts on the page: values of the template, and the axes of each drawing by its title."""
    axes = {}

    def plot(draw, *, title, **_):
        figure = Figure()
        draw(figure)
        axes[title] = figure.axes
        return f"<svg>{title}</svg>"

    with patch("nemo_opt.pages.plot", plot), patch("nemo_opt.pages.write_page") as page:
        write("page", value)
    (template, path), values = page.call_args.args, page.call_args.kwargs
    assert path == "page"
    return SimpleNamespace(template=template, axes=axes, **values)


def test_panels():
    page = drawn(write_report, RESULT)
    assert page.template == "ptq.html.j2"
    attention, fc1 = page.axes["SQNR of fp8"]
    assert [panel.get_title() for panel in (attention, fc1)] == ["core_attention", "linear_fc1"]
    weights, inputs = fc1.lines
    assert (list(weights.get_xdata()), list(weights.get_ydata())) == ([2, 10], [31.5, 30.0])
    assert list(inputs.get_ydata()) == [25.25]
    assert same_color(weights.get_color(), COLOURS["main"])
    assert [text.get_text() for text in fc1.get_legend().get_texts()] == ["weights", "inputs"]
    low, high = attention.get_ylim()
    assert fc1.get_ylim() == (low, high), "one scale for all"
    assert low < 25.25 < 31.5 < high
    assert high - low > 6.0
    assert page.axes["Amax of fp8"][1].get_yscale() == "log"


def test_what_differs_by_less_than_a_bit_looks_the_same():
    facts = {name: {"sqnr_db": 31.5, "amax": 1.0} for name in FACTS}
    (panel, *_) = drawn(write_report, RESULT | {"quantizer_facts": facts}).axes["SQNR of fp8"]
    low, high = panel.get_ylim()
    assert high - low >= 6.0


def test_rows_are_worst_first_and_not_endless():
    details = drawn(write_report, RESULT).details
    assert [facts["sqnr_db"] for _, facts in details["rows"]] == [1.0, 25.25, 28.0, 30.0, 31.5, 33.0, None]
    assert details["hidden"] == 0
    many = {f"decoder.layers.{n}.mlp.linear_fc1.weight_quantizer": {"sqnr_db": float(n), "amax": 1.0} for n in range(100)}
    details = drawn(write_report, RESULT | {"quantizer_facts": many}).details
    assert (len(details["rows"]), details["hidden"], details["rows"][-1][1]["sqnr_db"]) == (40, 60, 39.0)


def test_changes_of_the_loss_are_drawn_fewest_bits_first():
    page = drawn(write_sweep_report, SWEEP)
    assert page.template == "ptq_sweep.html.j2"
    assert list(page.details) == ["fp8", "int4"]
    (plot,) = page.axes["Change of the loss by algorithm"]
    assert [label.get_text() for label in plot.get_yticklabels()] == ["fp8", "int4"], "from below"
    assert [bar.get_width() for bar in plot.patches] == pytest.approx([0.0125, -0.1])
    assert [(text.get_text(), text.xy[0]) for text in plot.texts] == [("+0.01250", pytest.approx(0.0125)), ("-0.10000", 0.0)]


def test_precision_by_algorithm():
    (plot,) = drawn(write_sweep_report, SWEEP).axes["SQNR by algorithm"]
    assert [label.get_text() for label in plot.get_yticklabels()] == ["int4", "fp8"], "from below, so in their order"
    medians, worst = plot.lines[0], plot.lines[1]
    assert list(medians.get_xdata()) == [31.0, 31.0]
    assert list(worst.get_xdata()) == [30.0, 30.0]


UNMEASURED = RESULT | {"loss_after": None, "sqnr": {}, "quantizer_facts": {}}


@pytest.mark.parametrize("runs", [{"fp8": {"result": None, "error": "no"}}, {"fp8": {"result": UNMEASURED, "error": None}}])
def test_nothing_is_drawn_of_nothing(runs, tmp_path):
    page = drawn(write_sweep_report, SWEEP | {"runs": runs})
    assert not page.axes
    write_sweep_report(tmp_path / "page.html", SWEEP | {"runs": runs})


def text_of(path):
    plain = path.read_text().replace("\N{EN DASH}", "-")
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(style|svg).*?</\1>", "", plain)))


def test_page_of_one(tmp_path):
    write_report(tmp_path / "page.html", RESULT | {"proof": {"tokens": 2048, "logit_error": 1.25e-6, "logit_bound": 1e-5}})
    source, text = (tmp_path / "page.html").read_text(), text_of(tmp_path / "page.html")
    assert source.count("<svg") == 2
    assert not re.findall(r"<script|<link|(?:src|href)=\"(?!#)", source), "nothing is loaded from elsewhere"
    for part in (
        "5.0000 5.0125 +0.01250",
        "16 8.001 -50.0 %",
        "16 12.000 -25.0 %",
        "4.00 MB 2.00 MB -50.0 %",
        "64 samples, 8,192 tokens; 1 pass in 0.5 s, 16,384 tokens/s",
        "31.0 dB in the median; worst 30.0 dB",
        "tokens 2,048, logit error 1.25e-06 (bound 1e-05)",
        "exact",
        "OUT/&lt;a&gt;",
    ):
        assert part in text


def test_page_of_a_measurement_without_losses_data_or_export(tmp_path):
    nothing = {
        "loss_before": None,
        "loss_after": None,
        "bits_per_weight": None,
        "bytes_after": None,
        "calibration": None,
        "algorithm": None,
    }
    write_report(tmp_path / "page.html", RESULT | nothing | {"sqnr": {}, "quantizer_facts": {}})
    text = text_of(tmp_path / "page.html")
    assert "Quantisation: none" in text
    assert "none was needed" in text
    assert "4.00 MB - -" in text
    padded = RESULT["calibration"] | {"padding": 1500, "passes": 2}
    write_report(tmp_path / "page.html", RESULT | {"calibration": padded, "block": "64"})
    text = text_of(tmp_path / "page.html")
    assert "8,192 tokens, 1,500 of padding; 2 passes in 0.5 s" in text
    assert "40, blocks of 64 weights" in text


def test_page_of_a_sweep(tmp_path):
    write_sweep_report(tmp_path / "page.html", SWEEP)
    source, text = (tmp_path / "page.html").read_text(), text_of(tmp_path / "page.html")
    assert "unquantised 5.0000 16 16 4.00 MB" in text
    assert "fp8 5.0125 +0.01250 8.001 12.00 2.00 MB 31.0 / 30.0 - - 2.5 s" in text
    assert "int4 64 4.9000 -0.10000 4.250 12.00 2.00 MB 31.0 / 30.0 - yes 2.5 s" in text
    assert "int8 failed: it &lt;broke&gt;" in text
    assert source.count("<svg") == 2 + 2 * 2
    assert 'href="#fp8"' in source
    assert 'id="fp8"' in source
