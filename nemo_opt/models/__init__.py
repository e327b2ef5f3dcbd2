"""Llama presets, building a GPTModel on any topology, and Hugging Face in and out."""

from typing import TYPE_CHECKING

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "build": ["build_model", "transformer_config"],
        "config": ["ModelConfig", "RopeScaling", "preset"],
        "huggingface": ["export_hf", "import_hf"],
        "huggingface_config": ["config_from_hf"],
        "init": ["seeded_init"],
        "shards": ["Shard", "full_tensors", "gather_full", "parameter_shards"],
        "sizes": ["check_vocabulary", "model_config_of", "spec_of", "unwrap"],
    },
)

if TYPE_CHECKING:
    from nemo_opt.models.build import build_model as build_model
    from nemo_opt.models.build import transformer_config as transformer_config
    from nemo_opt.models.config import ModelConfig as ModelConfig
    from nemo_opt.models.config import RopeScaling as RopeScaling
    from nemo_opt.models.config import preset as preset
    from nemo_opt.models.huggingface import export_hf as export_hf
    from nemo_opt.models.huggingface import import_hf as import_hf
    from nemo_opt.models.huggingface_config import config_from_hf as config_from_hf
    from nemo_opt.models.init import seeded_init as seeded_init
    from nemo_opt.models.shards import Shard as Shard
    from nemo_opt.models.shards import full_tensors as full_tensors
    from nemo_opt.models.shards import gather_full as gather_full
    from nemo_opt.models.shards import parameter_shards as parameter_shards
    from nemo_opt.models.sizes import check_vocabulary as check_vocabulary
    from nemo_opt.models.sizes import model_config_of as model_config_of
    from nemo_opt.models.sizes import spec_of as spec_of
    from nemo_opt.models.sizes import unwrap as unwrap
