"""ONNX for ONNX Runtime GenAI, by its own model builder, in float32 for the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.artifacts.tokenizer import check_tokenizer
from paretron.errors import Problem, raise_all
from paretron.evaluate.parity import ParityReport
from paretron.recipe import Export
from paretron.versions import missing_or_old
from paretron_exporters.exporter import OnEvent, not_quantised
from paretron_exporters.figures import about_model, figures
from paretron_exporters.onnx_limits import builder_config, unsupported

FLOORS = {"onnx": "1.21", "onnx-ir": "0.1.12", "onnxruntime": "1.24", "onnxruntime-genai": "0.18"}

INSTALL = 'pip install "paretron[onnx]"'


class OnnxExporter:
    """A graph for ONNX Runtime GenAI with its weights beside it."""

    name = "onnx"

    def problems(self, config: Mapping[str, Any], *, export: Export) -> list[Problem]:
        """The builder's limits, and its packages."""
        return [
            *unsupported(config, export),
            *not_quantised(export),
            *missing_or_old(FLOORS, install=INSTALL),
        ]

    def export(
        self,
        source: Path,
        *,
        export: Export,
        out: Path,
        provenance: Provenance,
        overwrite: bool = False,
        on_event: OnEvent,
    ) -> ParityReport:
        """Build the graph, compare it with transformers in float32, and publish it when equal.

        Errors: ENGINE (the builder failed), GATE_RELOAD, GATE_PARITY.
        """
        checkpoint = Checkpoint.open(source)
        check_tokenizer(source, vocab=checkpoint.config["vocab_size"])
        raise_all(self.problems(checkpoint.config, export=export))

        from paretron.artifacts.card import write_card
        from paretron.artifacts.companions import copy_tokenizer
        from paretron_exporters.genai import build, builder_version
        from paretron_exporters.onnx_gates import prove
        from paretron_exporters.onnx_weights import stamp_producer, write_embedding_scale

        with staged(out, provenance=provenance, overwrite=overwrite) as folder:
            on_event("note", {"message": "building the ONNX graph"})
            build(checkpoint, folder, config=builder_config(checkpoint.config))
            stamp_producer(folder / "model.onnx", builder_version())
            if checkpoint.family.embedding_scale_by_hidden:
                hidden = checkpoint.config["hidden_size"]
                write_embedding_scale(folder / "model.onnx", math.sqrt(hidden))
            copy_tokenizer(source, folder)
            on_event("note", {"message": "comparing the graph with transformers"})
            report = prove(checkpoint, folder)
            dump(folder / "parity.json", report.as_json())
            write_card(
                folder,
                title=about_model(checkpoint.config),
                about="An ONNX graph for ONNX Runtime GenAI on the CPU.",
                provenance=provenance,
                numbers=figures(checkpoint.config, report, dtype="float32"),
                engines=("onnxruntime-genai",),
                library="onnxruntime-genai",
            )
        return report


EXPORTER = OnnxExporter()
