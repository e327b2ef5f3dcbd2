"""NeMo's own tests of its Quantizer, with only the module path changed, and every branch of ours; no model is quantized here."""

import copy
import logging
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import MagicMock, patch

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from modelopt.torch.quantization.nn import TensorQuantizer
from omegaconf import DictConfig

from nemo_opt.errors import ConfigError, DataError
from nemo_opt.models.config import preset
from nemo_opt.parallel import Topology
from nemo_opt.quantize.config import ExportConfig, QuantizationConfig
from nemo_opt.quantize.quantizer import QUANT_CFG_CHOICES, Quantizer, get_quant_cfg_choices

HERE = "nemo_opt.quantize.quantizer"


@pytest.fixture
def basic_quantization_config():
    return DictConfig({"algorithm": "int8", "decoder_type": "llama", "awq_block_size": 128, "sq_alpha": 0.5, "enable_kv_cache": True})


@pytest.fixture
def basic_export_config():
    return DictConfig(
        {
            "dtype": "16",
            "decoder_type": "llama",
            "inference_tensor_parallel": 1,
            "inference_pipeline_parallel": 1,
            "save_path": "/tmp/model.qnemo",
        }
    )


class TestQuantizerAsNeMoTestsIt:
    def test_init_valid_configs(self, basic_quantization_config, basic_export_config):
        quantizer = Quantizer(basic_quantization_config, basic_export_config)
        assert quantizer.quantization_config == basic_quantization_config
        assert quantizer.export_config == basic_export_config
        assert quantizer.quant_cfg == QUANT_CFG_CHOICES["int8"]

    def test_init_invalid_algorithm(self, basic_quantization_config, basic_export_config):
        basic_quantization_config.algorithm = "invalid_algo"
        with pytest.raises(AssertionError):
            Quantizer(basic_quantization_config, basic_export_config)

    def test_init_invalid_dtype(self, basic_quantization_config, basic_export_config):
        basic_export_config.dtype = "32"
        with pytest.raises(AssertionError):
            Quantizer(basic_quantization_config, basic_export_config)

    def test_null_algorithm(self, basic_quantization_config, basic_export_config):
        basic_quantization_config.algorithm = None
        quantizer = Quantizer(basic_quantization_config, basic_export_config)
        assert quantizer.quant_cfg is None

    @patch(f"{HERE}.dist")
    def test_quantize_method(self, mock_dist, basic_quantization_config, basic_export_config):
        mock_dist.get_rank.return_value = 0
        mock_model = MagicMock()
        mock_forward_loop = MagicMock()
        quantizer = Quantizer(basic_quantization_config, basic_export_config)
        with (
            patch("modelopt.torch.quantization.quantize") as mock_quantize,
            patch("modelopt.torch.quantization.print_quant_summary"),
        ):
            quantizer.quantize(mock_model, mock_forward_loop)
            mock_quantize.assert_called_once_with(mock_model, QUANT_CFG_CHOICES["int8"], mock_forward_loop)

    @patch(f"{HERE}.dist")
    def test_modify_model_config(self, mock_dist):
        mock_config = DictConfig({"sequence_parallel": True})
        modified_config = Quantizer.modify_model_config(mock_config)
        assert modified_config.sequence_parallel is False
        assert modified_config.name == "modelopt"
        assert modified_config.apply_rope_fusion is False

    @patch(f"{HERE}.dist")
    @patch(f"{HERE}.export_tensorrt_llm_checkpoint")
    def test_export_method(self, mock_export, mock_dist, basic_quantization_config, basic_export_config):
        mock_dist.get_rank.return_value = 0
        mock_model = MagicMock()
        mock_model.cfg.megatron_amp_O2 = False
        mock_model.trainer.num_nodes = 1
        quantizer = Quantizer(basic_quantization_config, basic_export_config)
        with patch(f"{HERE}.save_artifacts"):
            quantizer.export(mock_model)
            mock_export.assert_called_once()
            call_args = mock_export.call_args[1]
            assert call_args["decoder_type"] == "llama"
            assert call_args["inference_tensor_parallel"] == 1
            assert call_args["inference_pipeline_parallel"] == 1


@pytest.fixture
def patched():
    """Rank 0 of nothing: what ModelOpt would do is recorded, and done to nobody."""
    with (
        patch(f"{HERE}.dist") as dist,
        patch(f"{HERE}.mtq.quantize") as quantize,
        patch(f"{HERE}.mtq.print_quant_summary") as summary,
        patch(f"{HERE}.is_quantized", return_value=False),
    ):
        dist.get_rank.return_value = 0
        yield MagicMock(dist=dist, quantize=quantize, summary=summary)


@pytest.mark.parametrize("rank", [0, 1])
def test_summary_is_printed_on_rank_0_only(patched, rank):
    patched.dist.get_rank.return_value = rank
    model = MagicMock()
    assert Quantizer(QuantizationConfig()).quantize(model, MagicMock()) is model
    assert patched.summary.called == (rank == 0)


def test_no_algorithm_leaves_the_model_untouched(patched):
    model = MagicMock()
    assert Quantizer(QuantizationConfig(algorithm=None)).quantize(model) is model
    assert Quantizer().quantize(model) is model
    patched.quantize.assert_not_called()
    assert not model.mock_calls


def test_missing_data_is_refused_before_the_model_is_touched(patched):
    with pytest.raises(ConfigError, match="'fp8' needs calibration data"):
        Quantizer(QuantizationConfig()).quantize(MagicMock())
    patched.quantize.assert_not_called()


def test_upstream_may_change_what_it_is_given_without_changing_ours(patched):
    before = copy.deepcopy(QUANT_CFG_CHOICES)
    patched.quantize.side_effect = lambda model, config, loop: config["quant_cfg"].clear()
    quantizer = Quantizer(QuantizationConfig())
    quantizer.quantize(MagicMock(), MagicMock())
    quantizer.quant_cfg["algorithm"] = "changed"
    assert before == QUANT_CFG_CHOICES == get_quant_cfg_choices()


@pytest.fixture
def te_model(patched):
    """A GPTModel as far as the Quantizer looks, of layer spec te."""
    model = MagicMock(spec=GPTModel, decoder=MagicMock(layers=[]))
    model.named_modules.return_value = []
    with (
        patch(f"{HERE}._target", return_value=model),
        patch(f"{HERE}.spec_of", return_value="te") as spec,
        patch(f"{HERE}.model_config_of", return_value=preset("llama3.1-8b")),
        patch(f"{HERE}.parallel_state.get_tensor_model_parallel_world_size", return_value=1),
    ):
        yield MagicMock(model=model, spec_of=spec)


def _kv_entries(patched):
    return [entry for entry in patched.quantize.call_args.args[1]["quant_cfg"] if "bmm_quantizer" in entry["quantizer_name"]]


def test_int8_says_that_the_kv_cache_stays_as_it_is(patched, te_model, caplog):
    with caplog.at_level(logging.WARNING):
        Quantizer(QuantizationConfig(algorithm="int8", enable_kv_cache=True)).quantize(te_model.model, MagicMock())
    assert "KV cache stays unquantised beside int8: set kv_cache_qformat" in caplog.text
    assert not _kv_entries(patched)


def test_kv_cache_needs_attention_that_modelopt_knows(patched, te_model, caplog):
    Quantizer(QuantizationConfig()).quantize(te_model.model, MagicMock())
    assert len(_kv_entries(patched)) == 1
    te_model.spec_of.return_value = "local"
    with caplog.at_level(logging.WARNING):
        Quantizer(QuantizationConfig()).quantize(te_model.model, MagicMock())
    assert "does not quantise the attention of the layer spec local" in caplog.text
    assert not _kv_entries(patched)
    with pytest.raises(ConfigError, match="enable_kv_cache=True needs the layer spec te"):
        Quantizer(QuantizationConfig(enable_kv_cache=True)).quantize(te_model.model, MagicMock())


def test_blocks_that_do_not_fit_are_refused_before_the_model_is_touched(patched, te_model):
    with pytest.raises(ConfigError, match="blocks of 96 do not divide the 4096 inputs of linear_qkv"):
        Quantizer(QuantizationConfig(algorithm="int4", awq_block_size=96)).quantize(te_model.model, MagicMock())
    patched.quantize.assert_not_called()


def test_smoothquant_is_ours_with_nemos_alpha(patched, te_model):
    loop = MagicMock()
    with patch(f"{HERE}.smoothquant") as smoothquant:
        Quantizer(QuantizationConfig(algorithm="int8_sq", sq_alpha=0.25)).quantize(te_model.model, loop)
        Quantizer(QuantizationConfig(algorithm="INT8_SMOOTHQUANT_CFG")).quantize(te_model.model, loop)
    assert [call.kwargs["alpha"] for call in smoothquant.call_args_list] == [0.25, 1.0]
    assert smoothquant.call_args.args == (te_model.model, loop)
    assert patched.quantize.call_args.args[1]["algorithm"] is None


def test_awq_is_ours_with_the_recipes_step(patched, te_model):
    loop = MagicMock()
    with patch(f"{HERE}.calibrate_awq") as awq:
        Quantizer(QuantizationConfig(algorithm="int4_awq")).quantize(te_model.model, loop)
        Quantizer(QuantizationConfig(algorithm="w4a8_awq", decoder_type="gemma")).quantize(te_model.model, loop)
        Quantizer(QuantizationConfig(algorithm="w4a8_awq")).quantize(te_model.model, loop)
    assert [call.kwargs["alpha_step"] for call in awq.call_args_list] == [0.1, 1.0, 0.1]
    assert awq.call_args.args == (te_model.model, loop)
    assert patched.quantize.call_args.args[1]["algorithm"] is None


@pytest.mark.parametrize(("decoder_type", "algorithm", "least"), [("gpt", "fp8", 4.48), ("gpt", "int8_sq", 1.27)])
def test_inputs_of_gpt_decoders_have_nemos_least_amax(patched, decoder_type, algorithm, least):
    with patch(f"{HERE}.mtq.postprocess_amax") as postprocess:
        Quantizer(QuantizationConfig(algorithm=algorithm, decoder_type=decoder_type)).quantize(MagicMock(), MagicMock())
    pattern, clamp = postprocess.call_args.args[1:]
    assert pattern == "*input_quantizer"
    torch.testing.assert_close(clamp(torch.tensor([0.0, 9.0])), torch.tensor([least, 9.0]))


@pytest.mark.parametrize(("decoder_type", "algorithm"), [("llama", "fp8"), (None, "fp8"), ("gpt", "int8"), ("gpt", "mxfp8")])
def test_other_amax_stays(patched, decoder_type, algorithm):
    with patch(f"{HERE}.mtq.postprocess_amax") as postprocess:
        Quantizer(QuantizationConfig(algorithm=algorithm, decoder_type=decoder_type)).quantize(MagicMock(), MagicMock())
    postprocess.assert_not_called()


def test_weight_only_needs_no_data(patched):
    config = QuantizationConfig(algorithm="fp8", weight_only=True, enable_kv_cache=False)
    Quantizer(config).quantize(MagicMock())
    assert patched.quantize.call_args.args[2] is None


def test_interleaved_chunks_are_refused(patched):
    with pytest.raises(ConfigError, match=r"2 chunks.*vp=1"):
        Quantizer(QuantizationConfig()).quantize([MagicMock(), MagicMock()], MagicMock())


def test_other_modules_are_refused(patched):
    with pytest.raises(ConfigError, match="Linear"):
        Quantizer(QuantizationConfig()).quantize(torch.nn.Linear(1, 1), MagicMock())


def test_quantized_model_is_refused(patched):
    gpt_model = MagicMock()
    gpt_model.config.num_moe_experts = None
    with (
        patch(f"{HERE}.unwrap", return_value=gpt_model),
        patch(f"{HERE}.is_quantized", return_value=True),
        pytest.raises(ConfigError, match="already quantized"),
    ):
        Quantizer(QuantizationConfig()).quantize([gpt_model], MagicMock())
    patched.quantize.assert_not_called()


@pytest.mark.parametrize("amax", [None, float("nan"), float("inf")])
def test_quantizer_without_a_finite_amax_is_refused(patched, amax):
    model = torch.nn.ModuleDict({"good": TensorQuantizer(amax=1.0), "bad": TensorQuantizer(), "off": TensorQuantizer(if_quant=False)})
    model["off"].disable()
    if amax is not None:
        model["bad"].register_buffer("_amax", torch.tensor(amax))
    with patch(f"{HERE}._target", return_value=model), pytest.raises(DataError, match="1 quantizers no finite amax, first bad"):
        Quantizer(QuantizationConfig()).quantize(model, MagicMock())


def test_export_needs_a_configuration():
    with pytest.raises(ConfigError, match="export configuration"):
        Quantizer(QuantizationConfig()).export(MagicMock())


def test_export_needs_a_layout():
    with patch(f"{HERE}.current_topology", return_value=None), pytest.raises(ConfigError, match="pass topology"):
        Quantizer(None, {"path": "out", "export_format": "nemo"}).export([MagicMock()])


@pytest.fixture
def written():
    """Every writer and every proof, replaced."""
    names = ("save_checkpoint", "export_quantized_hf", "check_trtllm", "export_trtllm", "prove_checkpoint", "prove_export")
    with ExitStack() as stack:
        mocks = {name: stack.enter_context(patch(f"{HERE}.{name}")) for name in names}
        stack.enter_context(patch(f"{HERE}.unwrap", side_effect=lambda model: model[0]))
        stack.enter_context(patch(f"{HERE}.spec_of", return_value="local"))
        yield MagicMock(**mocks)


def _exporter(**settings):
    return Quantizer(QuantizationConfig(algorithm="int8"), ExportConfig(path="out", **settings))


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), (16, torch.float16), ("16", torch.float16)])
def test_hugging_face_export_is_proven_before_it_has_its_name(written, dtype, expected):
    quantizer, model = _exporter(export_format="hf", dtype=dtype), MagicMock()
    assert quantizer.export([model], topology=Topology(tp=2), tokenizer_dir="tok", proof_batches=["batch"]) is (
        written.export_quantized_hf.return_value
    )
    ((chunks, path), settings) = written.export_quantized_hf.call_args
    assert (chunks, path) == ([model], Path("out"))
    prove = settings.pop("prove")
    assert settings == {"dtype": expected, "tokenizer_dir": "tok", "overwrite": False}
    written.prove_export.assert_not_called()
    prove(Path("partial"), "plan")
    written.prove_export.assert_called_once_with(Path("partial"), [model], "plan", ["batch"])
    assert quantizer.proof is written.prove_export.return_value
    quantizer.export([model], topology=Topology(tp=2))
    assert written.export_quantized_hf.call_args.kwargs["prove"] is None
    assert quantizer.proof is None, "of the last export"


def test_trtllm_gets_modelopts_writer_and_the_engines_sizes(written):
    from nemo_opt.quantize.quantizer import export_tensorrt_llm_checkpoint

    model = MagicMock()
    _exporter(inference_tp=2, inference_pp=3, decoder_type="gemma").export([model], topology=Topology(tp=2), overwrite=True)
    written.check_trtllm.assert_called_once_with(spec="local", world_size=2, inference_tp=2, inference_pp=3)
    written.export_trtllm.assert_called_once_with(
        [model],
        Path("out"),
        write=export_tensorrt_llm_checkpoint,
        decoder_type="gemma",
        dtype=torch.bfloat16,
        tokenizer_dir=None,
        overwrite=True,
    )
    _exporter().export([model], topology=Topology())
    assert written.export_trtllm.call_args.kwargs["decoder_type"] == "llama"


def test_checkpoint_is_proven_where_there_are_batches(written):
    quantizer, model = _exporter(export_format="nemo"), MagicMock()
    quantizer.export([model], topology=Topology(tp=2))
    assert written.save_checkpoint.call_args.kwargs["prove"] is None
    assert quantizer.export([model], topology=Topology(tp=2), proof_batches=["batch"]) == Path("out")
    written.prove_checkpoint.assert_not_called()
    written.save_checkpoint.call_args.kwargs["prove"](Path("partial"))
    written.prove_checkpoint.assert_called_once_with(Path("partial"), [model], Topology(tp=2), ["batch"])
    assert quantizer.proof is written.prove_checkpoint.return_value


@pytest.mark.parametrize(("model_dir", "expected"), [(None, "from_config"), ("given", "given")])
def test_export_writes_a_checkpoint_that_names_the_algorithm(model_dir, expected):
    quantizer = Quantizer(QuantizationConfig(algorithm="int8"), ExportConfig(path="from_config", export_format="nemo"))
    gpt_model = MagicMock()
    with patch(f"{HERE}.save_checkpoint") as save, patch(f"{HERE}.unwrap", return_value=gpt_model):
        assert quantizer.export([gpt_model], model_dir, topology=Topology(tp=2), extra={"loss": 4.0}, overwrite=True) == Path(expected)
    save.assert_called_once_with(
        Path(expected),
        [gpt_model],
        topology=Topology(tp=2),
        tokenizer_dir=None,
        extra={"quantization": "int8", "loss": 4.0},
        prove=None,
        overwrite=True,
    )
