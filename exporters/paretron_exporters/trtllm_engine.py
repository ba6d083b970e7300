"""A checkpoint for TensorRT-LLM's engine builder (1.2.1 and older), and the engine where it is.

Later releases have no such builder: they load the checkpoint that `trtllm` exports.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.artifacts.config import DTYPE_NAMES
from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.artifacts.tokenizer import check_tokenizer
from paretron.data.texts import Texts
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.evaluate.parity import ParityReport
from paretron.recipe import Export
from paretron_exporters import trtllm_build as builder
from paretron_exporters.exporter import OnEvent, not_taken
from paretron_exporters.figures import about_model, figures
from paretron_exporters.trtllm_config import checkpoint_config, unsupported
from paretron_exporters.trtllm_layout import Layout

TAKES = frozenset({"dtype", "quantize", "tensor_parallel", "pipeline_parallel", "serving", "build"})
_ABOUT = (
    "A checkpoint for the engine builder of TensorRT-LLM 1.2.1 and older. Its files were put "
    "together again and compared with the source; what an engine made of it computes was not "
    "compared here, for that takes the GPU that serves it."
)


class TrtllmEngineExporter:
    """One file of weights for each GPU, and the engine where its builder is installed."""

    name = "trtllm_engine"

    def problems(self, config: Mapping[str, Any], *, export: Export) -> list[Problem]:
        """What no engine can be built of, and an engine that is asked for without a builder."""
        problems = [*not_taken(export, takes=TAKES), *unsupported(config, export)]
        return [*problems, builder.missing()] if export.build and not builder.found() else problems

    def needs(self, export: Export, *, params: int, embedding_params: int) -> tuple[int, int]:
        """Nothing where weights stream; for the scales of FP8 the model runs in 16 bits."""
        return (2 * params if export.quantize else 0), 0

    def export(
        self,
        source: Path,
        *,
        export: Export,
        out: Path,
        provenance: Provenance,
        texts: Texts | None = None,
        overwrite: bool = False,
        on_event: OnEvent,
    ) -> ParityReport:
        """Write every rank's weights, prove them, build the engine where that can be done.

        Errors: USAGE (FP8 without a text), GATE_PARITY, GATE_RELOAD, GATE_NONFINITE, ENGINE.
        """
        from paretron.artifacts.card import write_card
        from paretron.artifacts.companions import copy_tokenizer

        checkpoint = Checkpoint.open(source)
        config = checkpoint.config
        check_tokenizer(source, vocab=config["vocab_size"])
        raise_all(self.problems(config, export=export))
        layout = Layout(export.tensor_parallel, export.pipeline_parallel)
        dtype = main_dtype(checkpoint, export)
        digests: dict[str, str] = {}
        with staged(out, provenance=provenance, overwrite=overwrite, digests=digests) as folder:
            report = write_checkpoint(
                checkpoint, folder, export=export, layout=layout, dtype=dtype, texts=texts,
                digests=digests, on_event=on_event,
            )  # fmt: skip
            copy_tokenizer(source, folder)
            dump(folder / "parity.json", report.as_json())
            engine = _engine(folder, config, export=export, on_event=on_event)
            numbers = figures(config, report, dtype=DTYPE_NAMES[dtype])
            write_card(
                folder,
                title=about_model(config),
                about=f"{_ABOUT} {engine}",
                provenance=provenance,
                numbers=numbers | _layout_figures(layout, export),
                engines=(),
                library="tensorrt-llm",
            )
        return report


EXPORTER = TrtllmEngineExporter()


def main_dtype(checkpoint: Checkpoint, export: Export) -> str:
    """The safetensors dtype of every tensor that is not FP8."""
    if export.dtype is not None:
        return next(k for k, v in DTYPE_NAMES.items() if v == export.dtype)
    if export.quantize is not None:  # FP8 kernels go with 16 bits
        return "F16" if checkpoint.dtype == "F16" else "BF16"
    return checkpoint.dtype


def write_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    *,
    export: Export,
    layout: Layout,
    dtype: str,
    texts: Texts | None,
    digests: dict[str, str],
    on_event: OnEvent,
) -> ParityReport:
    """Write config.json and the ranks' files, and prove them; `digests` gets their sha256."""
    from paretron_exporters.trtllm_gates import Proof, prove
    from paretron_exporters.trtllm_ranks import stage_targets, write_ranks
    from paretron_exporters.trtllm_scales import find_scales

    scales = None
    if export.quantize is not None:
        if texts is None:
            raise _no_text()
        whole = Layout(1, 1)
        targets = [target for (target,) in stage_targets(checkpoint, whole, 0)]
        scales = find_scales(checkpoint, targets, texts, on_event=on_event)
    told = checkpoint_config(
        checkpoint.family, checkpoint.config, layout, dtype=DTYPE_NAMES[dtype],
        fp8=scales is not None,
    )  # fmt: skip
    dump(folder / "config.json", told)
    proof = Proof(checkpoint, layout, dtype=dtype)
    write_ranks(
        checkpoint, folder, layout=layout, dtype=dtype, scales=scales, digests=digests,
        see=proof.see, on_event=on_event,
    )  # fmt: skip
    on_event("note", {"message": "comparing the ranks' files with the source"})
    return prove(folder, proof, scales=scales)


def _engine(folder: Path, config: Mapping[str, Any], *, export: Export, on_event: OnEvent) -> str:
    """Build the engine, or leave the command; the sentence that says which."""
    words = builder.command(export, positions=config["max_position_embeddings"])
    about = f"Needs TensorRT-LLM {builder.NEWEST} or older and the GPU that serves."
    builder.write_script(folder / builder.SCRIPT, [words], about=about)
    if builder.found():
        on_event("note", {"message": f"building the engine with {builder.BUILDER}"})
        builder.build(folder, words)
        return f"The engine in `{builder.ENGINE}` was built on this machine and fits its GPU alone."
    message = (
        f"no engine was built: {builder.BUILDER} is not on the path. Run {builder.SCRIPT} in the "
        f"container {builder.CONTAINER} on the GPU that serves."
    )
    on_event("note", {"message": message})
    return f"{builder.SCRIPT} builds the engine, in the container {builder.CONTAINER}."


def _layout_figures(layout: Layout, export: Export) -> dict[str, str]:
    return {
        "matrices": (export.quantize or "plain").upper(),
        "tensor parallel": str(layout.tensor_parallel),
        "pipeline parallel": str(layout.pipeline_parallel),
    }


def _no_text() -> ParetronError:
    return ParetronError(
        Problem(
            Code.USAGE,
            "FP8 takes the scales of a model's inputs from a calibration text",
            where="--quantize",
            fix="name the recipe that has one: --recipe RECIPE",
        )
    )
