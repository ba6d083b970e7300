"""ONNX for ONNX Runtime GenAI, for the CPU and for CUDA, and portable graphs for any runtime."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.artifacts.tokenizer import check_tokenizer
from paretron.data.texts import Texts
from paretron.errors import Code, Problem, raise_all
from paretron.evaluate.parity import ParityReport
from paretron.recipe import Export
from paretron.versions import missing_or_old
from paretron_exporters import onnx_portable
from paretron_exporters.exporter import OnEvent, not_taken
from paretron_exporters.figures import about_model, figures
from paretron_exporters.onnx_limits import builder_config, unsupported
from paretron_exporters.onnx_precision import ACCURACY_LEVEL, Precision, precision_of

PORTABLE = "portable"
TAKES = frozenset({"backend", "dtype", "quantize", "device"})
PORTABLE_TAKES = frozenset({"backend", "dtype"})
FLOORS = {
    "onnx": "1.21",
    "onnx-ir": "0.1.12",
    "onnxruntime": "1.24",
    "onnxruntime-genai": "0.18",
    "onnxscript": "0.7",
}

INSTALL = 'pip install "paretron[onnx]"'


class OnnxExporter:
    """Graphs with their weights beside them; `backend: portable` has no operators of a vendor."""

    name = "onnx"

    def problems(self, config: Mapping[str, Any], *, export: Export) -> list[Problem]:
        """The limits of the one or the other builder, and its packages."""
        if export.backend == PORTABLE:
            return [
                *onnx_portable.unsupported(config, export),
                *not_taken(export, takes=PORTABLE_TAKES),
                *missing_or_old(onnx_portable.FLOORS, install=onnx_portable.INSTALL),
            ]
        return [
            *_backend(export),
            *unsupported(config, export),
            *not_taken(export, takes=TAKES),
            *missing_or_old(FLOORS, install=INSTALL),
        ]

    def needs(self, export: Export, *, params: int, embedding_params: int) -> tuple[int, int]:
        """The model in float32; beside portable graphs, each as it was traced."""
        return 4 * params, (8 * params if export.backend == PORTABLE else 0)

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
        """Build the graph, compare it with transformers, and publish it when it is the same model.

        Errors: ENGINE (the builder failed), GATE_RELOAD, GATE_PARITY.
        """
        checkpoint = Checkpoint.open(source)
        check_tokenizer(source, vocab=checkpoint.config["vocab_size"])
        raise_all(self.problems(checkpoint.config, export=export))

        from paretron.artifacts.card import write_card
        from paretron.artifacts.companions import copy_tokenizer

        with staged(out, provenance=provenance, overwrite=overwrite) as folder:
            copy_tokenizer(source, folder)
            on_event("note", {"message": "building and comparing the ONNX graph"})
            if export.backend == PORTABLE:
                made = _portable(checkpoint, folder)
            else:
                made = _genai(checkpoint, folder, precision_of(export))
            for note in made.notes:
                on_event("note", {"message": note})
            dump(folder / "parity.json", made.report.as_json())
            numbers = figures(checkpoint.config, made.report, dtype=made.dtype)
            write_card(
                folder,
                title=about_model(checkpoint.config),
                about=" ".join((made.about, *made.notes)),
                provenance=provenance,
                numbers=numbers | {"weights": made.weights},
                engines=(made.engine,),
                library=made.engine,
            )
        return made.report


EXPORTER = OnnxExporter()


@dataclass(frozen=True)
class _Made:
    """What was built, for the card: `dtype` is that of the cache, `notes` what nobody could see."""

    report: ParityReport
    about: str
    dtype: str
    weights: str
    engine: str
    notes: tuple[str, ...] = ()


def _genai(checkpoint: Checkpoint, folder: Path, precision: Precision) -> _Made:
    from paretron_exporters.genai import build, builder_version
    from paretron_exporters.onnx_file import stamp_producer, write_embedding_scale
    from paretron_exporters.onnx_gates import prove

    model = folder / "model.onnx"
    build(checkpoint, folder, config=builder_config(checkpoint.config), precision=precision)
    stamp_producer(model, builder_version())
    if checkpoint.family.embedding_scale_by_hidden:
        scale = math.sqrt(checkpoint.config["hidden_size"])
        write_embedding_scale(model, scale, dtype=precision.dtype)
    where = "the CPU" if precision.device == "cpu" else "CUDA"
    return _Made(
        prove(checkpoint, folder, precision),
        about=f"An ONNX graph for ONNX Runtime GenAI on {where}.",
        dtype=precision.dtype,
        weights=precision.about,
        engine="onnxruntime-genai",
        notes=tuple(_notes(precision)),
    )


def _notes(precision: Precision) -> list[str]:
    """What a number does not say, and what the gates did not see."""
    notes = []
    if precision.bits is not None and precision.device == "cpu":
        level = f"accuracy level {ACCURACY_LEVEL}"
        notes.append(f"Its kernels round what they multiply to 8 bits as well ({level}).")
    if not precision.runs_here:
        notes.append(
            f"It was not run: the CPU has no {precision.name} kernels. Its weights are proven."
        )
    elif precision.device == "cuda":
        notes.append("It was proven on the CPU, by the same operators; no GPU ran it.")
    return notes


def _portable(checkpoint: Checkpoint, folder: Path) -> _Made:
    from paretron_exporters.onnx_portable_gates import prove

    onnx_portable.build(checkpoint, folder)
    return _Made(
        prove(checkpoint, folder),
        about=(
            "Two ONNX graphs of standard operators for any runtime, one sequence at a time: "
            "prefill.onnx reads a prompt, decode.onnx one token behind it. Both take input_ids "
            "and position_ids; decode.onnx also takes as input.past_key_values... what either "
            "gave as output.past_key_values..."
        ),
        dtype="float32",
        weights="float32, shared by both graphs",
        engine="onnxruntime",
    )


def _backend(export: Export) -> list[Problem]:
    if export.backend is None:
        return []
    return [
        Problem(
            Code.UNSUPPORTED,
            f"onnx has no backend {export.backend!r}",
            where="export.backend",
            fix=f"{PORTABLE}, or leave it out for ONNX Runtime GenAI",
        )
    ]
