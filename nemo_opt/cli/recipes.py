"""Commands about quantisation recipes."""

from pathlib import Path
from typing import Annotated

import typer

from nemo_opt.api.corpus import data_config
from nemo_opt.cli.layout import Layout, with_layout
from nemo_opt.cli.models import Checkpoint, Data, Json, Mbs, Overwrite, SeqLength, Spec, Split, Tokenizer, check_spec
from nemo_opt.cli.report import show
from nemo_opt.cli.run import start, write_json

__all__ = ["register"]


@with_layout
def recipe(
    ckpt: Checkpoint,
    output: Annotated[Path, typer.Argument(help="Recipe to write (.yaml or .json).", show_default=False)],
    bits: Annotated[float, typer.Option("--bits", help="Most bits a weight of the layers' linears, on average.")],
    algorithms: Annotated[str, typer.Option("--algorithms", help="Formats to choose from; unquantised is always a choice.")] = "nvfp4,fp8",
    awq_block_size: Annotated[int, typer.Option("--awq-block-size", help="Block size of int4.")] = 128,
    samples: Annotated[int, typer.Option("--samples", help="Samples to calibrate and score on.", rich_help_panel="Data")] = 128,
    tokenizer: Tokenizer = None,
    mbs: Mbs = 4,
    seq_length: SeqLength = 128,
    data: Data = None,
    split: Split = None,
    spec: Spec = None,
    overwrite: Overwrite = False,
    json: Json = None,
    *,
    layout: Layout,
) -> None:
    """Search mixed precision under a budget of bits; quantise with the recipe afterwards, at any layout.

    Example: `nemo-opt recipe ./teacher mixed.yaml --bits 6 --algorithms nvfp4,fp8`, then
    `nemo-opt ptq ./teacher ./teacher-mixed --algorithm mixed.yaml --tp 2`
    """
    from nemo_opt.quantize.config import QuantizationConfig

    names = [name.strip() for name in algorithms.split(",")]
    result = start(
        "search_recipe",
        devices=layout.devices,
        topology=layout.topology,
        checkpoint=str(ckpt),
        output=str(output),
        effective_bits=bits,
        candidates=[QuantizationConfig(algorithm=name, awq_block_size=awq_block_size) for name in names],
        data=data_config(data, split=split, seq_length=seq_length, micro_batch_size=mbs, global_batch_size=mbs),
        tokenizer=tokenizer,
        samples=samples,
        spec=check_spec(spec),
        overwrite=overwrite,
    )
    show(result)
    if json is not None:
        write_json(result, json)


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("recipe", rich_help_panel="Models")(recipe)
