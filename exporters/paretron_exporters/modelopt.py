"""NVIDIA Model Optimizer: calibrates a model's scales on a text and writes it quantised."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paretron.errors import Code, ParetronError, Problem
from paretron_exporters.exporter import OnEvent
from paretron_exporters.quantized_forms import Form
from paretron_exporters.quiet import quiet

if TYPE_CHECKING:
    import torch


def quantise(
    source: Path, folder: Path, *, form: Form, ids: torch.Tensor, on_event: OnEvent
) -> None:
    """Calibrate a checkpoint on `ids` int64 [samples, seq_len] and write it to `folder`.

    What it leaves is weights, config.json and hf_quant_config.json, without a tokenizer. The model
    is held in float32, on the first GPU if there is one, and so is written what is not quantised.
    Errors: UNSUPPORTED, with what the library says, when it cannot.
    """
    import torch

    from paretron.artifacts.models import load_model

    model = load_model(source).to("cuda" if torch.cuda.is_available() else "cpu")

    def feed(network: torch.nn.Module) -> None:
        for done, window in enumerate(ids, start=1):
            network(input_ids=window[None].to(model.device), use_cache=False)
            on_event("progress", {"done": done, "total": len(ids), "unit": "windows"})

    try:
        with quiet(), torch.no_grad():
            import modelopt.torch.quantization as mtq
            from modelopt.torch.export import export_hf_checkpoint

            model.set_experts_implementation("eager")  # the only one whose inputs are seen
            mtq.quantize(model, _config(mtq, form), feed)
            # In a narrower dtype weights would be rounded to it first, and then to codes.
            export_hf_checkpoint(model, dtype=torch.float32, export_dir=folder)
    except (AssertionError, AttributeError, KeyError, NotImplementedError, RuntimeError,
            TypeError, ValueError) as error:  # fmt: skip
        raise ParetronError(
            Problem(
                Code.UNSUPPORTED,
                f"nvidia-modelopt: {type(error).__name__}: {' '.join(str(error).split())[:300]}",
                where=f"export.quantize: {form.name}",
                fix="try int8 or fp8_dynamic, which are written without it",
            )
        ) from error


def _config(mtq: Any, form: Form) -> dict[str, Any]:
    presets = {
        "fp8": mtq.FP8_DEFAULT_CFG,
        "fp8_kv": mtq.FP8_DEFAULT_CFG,
        "nvfp4": mtq.NVFP4_DEFAULT_CFG,
        "int4_awq": mtq.INT4_AWQ_CFG,
        "int8_sq": mtq.INT8_SMOOTHQUANT_CFG,
    }
    config: dict[str, Any] = copy.deepcopy(presets[form.name])
    if form.kv_cache:
        config["quant_cfg"] = [*config["quant_cfg"], *copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])]
    return config
