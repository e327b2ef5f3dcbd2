"""Builds a Llama as Megatron-Core's GPTModel on any topology.

Decisions:
- GPTModel, although Megatron-Core announces HybridModel as its heir: ModelOpt 0.47 prunes, distils and exports GPTModel.
- Weights are made by `seeded_init`, never by Megatron-Core, whose weights depend on the layout; modules allocate uninitialised memory.
- The vocabulary is padded to `VOCAB_MULTIPLE` whatever TP is, so that a checkpoint fits every layout.
- One layer spec for all layers; norms of the local spec are torch's, those of the TE spec are Transformer Engine's (or its reference).
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import nemo_opt._stack

import torch
from megatron.core import parallel_state
from megatron.core.extensions.transformer_engine import HAVE_TE, TENorm
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from nemo_opt.device import choose_device, default_spec, local_device
from nemo_opt.errors import ConfigError
from nemo_opt.models.config import ModelConfig, RopeScaling
from nemo_opt.models.init import seeded_init
from nemo_opt.models.sizes import CONFIG_ATTRIBUTE, Spec, check_vocabulary, model_config_of, spec_of, unwrap
from nemo_opt.parallel import Topology

__all__ = ["Spec", "build_model", "check_vocabulary", "model_config_of", "rebuilt", "spec_of", "transformer_config", "unwrap"]


def build_model(
    config: ModelConfig,
    topology: Topology,
    *,
    spec: Spec | None = None,
    dtype: torch.dtype | None = None,
    seed: int | None = 1234,
    **transformer_overrides: Any,
) -> list[GPTModel]:
    """The chunks of the model that this rank holds, in training mode; one per virtual pipeline stage. Call it on every rank.

    Args:
        config: Sizes of the model.
        topology: The layout; model parallel state must have been initialised for it.
        spec: Layer spec; None takes the device's default.
        dtype: Of weights and pipeline messages; None takes the device's.
        seed: Of `seeded_init`. None leaves weights uninitialised, for callers that load them at once.
        transformer_overrides: Fields of Megatron-Core's TransformerConfig.

    Raises:
        ConfigError: The model does not fit the topology or the spec.

    """
    spec = spec or default_spec()
    _check_initialised(topology)
    mcore_config = transformer_config(config, topology, spec=spec, dtype=dtype, **transformer_overrides)
    chunks = [_build_chunk(config, mcore_config, spec, vp_stage if topology.vp > 1 else None) for vp_stage in range(topology.vp)]
    if seed is not None:
        seeded_init(chunks, seed)
    return chunks


def transformer_config(
    config: ModelConfig,
    topology: Topology,
    *,
    spec: Spec | None = None,
    dtype: torch.dtype | None = None,
    **overrides: Any,
) -> TransformerConfig:
    """Megatron-Core's configuration of `config` at `topology`.

    Raises:
        ConfigError: Sizes do not divide as the topology needs, or the spec cannot do what it asks.

    """
    spec = spec or default_spec()
    device = choose_device()
    dtype = dtype or device.dtype
    topology.validate(topology.world_size, config)
    _check_spec(topology, spec)
    on_gpu = device.type == "cuda"
    settings: dict[str, Any] = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.norm_epsilon,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method_std": config.init_method_std,
        "perform_initialization": False,
        "use_cpu_initialization": False,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "gradient_accumulation_fusion": False,
        # torch.compile'd elementwise chains: they pay on GPUs only, and compiling needs a toolchain
        "bias_activation_fusion": on_gpu,
        "bias_dropout_fusion": on_gpu,
        # these two need kernels of Megatron-LM and of the real Transformer Engine
        "masked_softmax_fusion": False,
        "apply_rope_fusion": on_gpu and spec == "te",
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "virtual_pipeline_model_parallel_size": topology.vp if topology.vp > 1 else None,
        "context_parallel_size": topology.cp,
        "expert_model_parallel_size": topology.ep,
        # With two stages both neighbours are the same rank, and a batch of four messages between two ranks would be matched crosswise:
        # an activation arrives as a gradient, without an error. Megatron-LM refuses that; separate messages are right at every pp.
        "overlap_p2p_comm": topology.vp > 1,
        "batch_p2p_comm": topology.vp == 1,
        "sequence_parallel": topology.sp,
        "num_layers_in_first_pipeline_stage": topology.first_stage_layers,
        "num_layers_in_last_pipeline_stage": topology.last_stage_layers,
        "transformer_impl": "transformer_engine" if spec == "te" else "local",
    }
    if config.num_moe_experts is not None:
        settings |= _moe_settings(config, spec)
    return TransformerConfig(**(settings | overrides))


def rebuilt(gpt_model: GPTModel, layers: Sequence[int]) -> GPTModel:
    """A new model like `gpt_model`, at the sizes that its configuration has been changed to, with weights that are not yet written.

    Args:
        gpt_model: The model, unwrapped; the only chunk of this rank. Its configuration object is shared with the new one.
        layers: Which of its layers on this rank, from 0, the new one's layers follow (their spec).

    """
    spec = gpt_model.transformer_layer_spec
    if isinstance(spec, TransformerBlockSubmodules):
        spec = dataclasses.replace(spec, layer_specs=[spec.layer_specs[index] for index in layers])
    with _without_deprecation_notice():
        new = type(gpt_model)(
            gpt_model.config,
            spec,
            vocab_size=gpt_model.vocab_size,
            max_sequence_length=gpt_model.max_sequence_length,
            pre_process=gpt_model.pre_process,
            post_process=gpt_model.post_process,
            fp16_lm_cross_entropy=gpt_model.fp16_lm_cross_entropy,
            parallel_output=gpt_model.parallel_output,
            share_embeddings_and_output_weights=gpt_model.share_embeddings_and_output_weights,
            position_embedding_type=gpt_model.position_embedding_type,
            rotary_percent=gpt_model.rotary_percent,
            rotary_base=gpt_model.rotary_base,
            pg_collection=gpt_model.pg_collection,
        )
    # carried over with its frequencies, which no pruned size changes
    new.rotary_pos_emb, new.rotary_scaling = gpt_model.rotary_pos_emb, gpt_model.rotary_scaling
    return new.to(local_device())


def _build_chunk(config: ModelConfig, mcore_config: TransformerConfig, spec: Spec, vp_stage: int | None) -> GPTModel:
    pp_rank, pp_size = parallel_state.get_pipeline_model_parallel_rank(), mcore_config.pipeline_model_parallel_size
    last_vp_stage = (mcore_config.virtual_pipeline_model_parallel_size or 1) - 1
    with _without_deprecation_notice():
        model = GPTModel(
            mcore_config,
            _block_spec(mcore_config, spec, vp_stage),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.max_position_embeddings,
            pre_process=pp_rank == 0 and not vp_stage,
            post_process=pp_rank == pp_size - 1 and (vp_stage or 0) == last_vp_stage,
            share_embeddings_and_output_weights=config.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.rotary_base,
            rope_scaling=config.rope_scaling is not None,
            rope_scaling_factor=config.rope_scaling.factor if config.rope_scaling else 1.0,
            vp_stage=vp_stage,
        )
    if config.rope_scaling is not None:
        _scale_rope(model, config.rope_scaling)
    setattr(model, CONFIG_ATTRIBUTE, config)
    # a router allocates its weight on the host whatever the device is
    return model.to(local_device())


def _block_spec(mcore_config: TransformerConfig, spec: Spec, vp_stage: int | None) -> TransformerBlockSubmodules:
    num_layers = get_num_layers_to_build(mcore_config, vp_stage, parallel_state.get_pipeline_model_parallel_rank())
    layer_spec = _te_layer_spec(mcore_config) if spec == "te" else _local_layer_spec(mcore_config)
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * num_layers, layer_norm=TENorm if spec == "te" else WrappedTorchNorm)


def _te_layer_spec(mcore_config: TransformerConfig) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=mcore_config.num_moe_experts, moe_grouped_gemm=mcore_config.moe_grouped_gemm
    )


def _local_layer_spec(mcore_config: TransformerConfig) -> ModuleSpec:
    layer_spec = get_gpt_layer_local_spec(num_experts=mcore_config.num_moe_experts, normalization="RMSNorm")
    if mcore_config.num_moe_experts is not None:
        # The TE spec fuses the norm before experts into no linear, so under the local spec's own map their checkpoints would differ.
        names = layer_spec.submodules.sharded_state_dict_keys_map
        layer_spec.submodules.sharded_state_dict_keys_map = {k: v for k, v in names.items() if k != "pre_mlp_layernorm."}
    return layer_spec


def _moe_settings(config: ModelConfig, spec: Spec) -> dict[str, Any]:
    return {
        "num_moe_experts": config.num_moe_experts,
        "moe_ffn_hidden_size": config.ffn_hidden_size,
        "moe_router_topk": config.moe_router_topk,
        # a softmax over one chosen expert would be the constant 1 and starve the router of gradient
        "moe_router_pre_softmax": config.moe_router_topk == 1,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": spec == "te",
    }


def _scale_rope(model: GPTModel, scaling: RopeScaling) -> None:
    """Frequencies with all four parameters; GPTModel passes on only the factor and fixes the others at Llama 3's values."""
    rotary = model.rotary_pos_emb
    channels = torch.arange(0, model.config.kv_channels, 2, dtype=torch.float32, device=rotary.inv_freq.device)
    frequencies = 1.0 / (model.rotary_base ** (channels / model.config.kv_channels))
    rotary.inv_freq = rotary._apply_scaling(frequencies, **dataclasses.asdict(scaling))


def _check_initialised(topology: Topology) -> None:
    if not parallel_state.model_parallel_is_initialized():
        raise ConfigError("model parallel state is not initialised: call nemo_opt.parallel.initialize(topology) first")
    state = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
    )
    if state != (topology.tp, topology.pp, topology.cp, topology.ep):
        raise ConfigError(f"ranks are laid out as (tp, pp, cp, ep) = {state}, the model asks for {topology}: initialise that topology")


def _check_spec(topology: Topology, spec: Spec) -> None:
    if spec not in ("te", "local"):
        raise ConfigError(f"unknown layer spec {spec!r}; known are ['local', 'te']")
    if spec == "te" and not HAVE_TE:
        raise ConfigError("spec 'te' needs Transformer Engine, which does not import here: install nemo_opt[te], or use spec 'local'")
    if spec == "local" and topology.cp > 1:
        raise ConfigError(f"cp {topology.cp} needs spec 'te': Megatron-Core's local attention does not split the sequence")
    if spec == "local" and topology.sp and choose_device().type == "cuda":
        raise ConfigError("sp needs spec 'te' on GPUs: Megatron-Core refuses torch's norms there, which the CPU backend repairs")


class _without_deprecation_notice:  # noqa: N801 -- used as a function
    """Silences GPTModel's notice about HybridModel, which the module docstring answers."""

    _logger = logging.getLogger("megatron.core.models.gpt.gpt_model")

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)
