"""GGUF for llama.cpp and what builds on it, through the gguf package, streamed tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.artifacts.tokenizer import check_tokenizer
from paretron.errors import Code, Problem, raise_all
from paretron.evaluate.parity import ParityReport
from paretron.families import Sizes, family_of, sizes
from paretron.recipe import Export
from paretron.versions import missing_or_old
from paretron_exporters.exporter import OnEvent
from paretron_exporters.figures import about_model, figures

FLOORS = {"gguf": "0.19"}
INSTALL = 'pip install "paretron[gguf]"'
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "llama3", "linear")
Q8_0_BLOCK = 32  # weights of one row that share a scale
FILE = "model.gguf"


class GgufExporter:
    """One file with weights, settings and tokenizer."""

    name = "gguf"

    def problems(self, config: Mapping[str, Any], *, export: Export) -> list[Problem]:
        """Families and rotary embeddings that are not written, rows that Q8_0 cannot block."""
        family = family_of(config)
        if family.model_type not in FAMILIES:
            return [
                _unsupported(f"no {family.model_type} in GGUF", f"supported: {', '.join(FAMILIES)}")
            ]
        problems = []
        rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ROPE_TYPES:
            problems.append(
                _unsupported(f"rope_type {kind}", f"supported: {', '.join(ROPE_TYPES)}")
            )
        if export.quantize == "q8_0":
            problems += _unblocked(sizes(family, config))
        elif export.quantize is not None:
            problems.append(_unsupported(f"quantize: {export.quantize}", "supported: q8_0"))
        return [*problems, *missing_or_old(FLOORS, install=INSTALL)]

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
        """Write the file, read it back, and publish it when it is the same model.

        Errors: INPUT_TOKENIZER (not a byte-level BPE), GATE_PARITY.
        """
        checkpoint = Checkpoint.open(source)
        check_tokenizer(source, vocab=checkpoint.config["vocab_size"])
        raise_all(self.problems(checkpoint.config, export=export))

        from paretron.artifacts.card import write_card
        from paretron_exporters.gguf_file import write_gguf, written_as
        from paretron_exporters.gguf_gates import prove

        kind = written_as(checkpoint, export)
        with staged(out, provenance=provenance, overwrite=overwrite) as folder:
            for note in write_gguf(checkpoint, folder / FILE, kind=kind, on_event=on_event):
                on_event("note", {"message": note})
            on_event("note", {"message": "comparing the file with its source"})
            report = prove(checkpoint, folder / FILE, kind=kind)
            dump(folder / "parity.json", report.as_json())
            dtype = {"F32": "float32", "F16": "float16"}.get(kind, "bfloat16")
            numbers = figures(checkpoint.config, report, dtype=dtype) | {"weights": kind}
            write_card(
                folder,
                title=about_model(checkpoint.config),
                about=f"A GGUF file ({kind}) for llama.cpp and what builds on it.",
                provenance=provenance,
                numbers=numbers,
                engines=("llama.cpp",),
                library="gguf",
            )
        return report


EXPORTER = GgufExporter()


def _unblocked(size: Sizes) -> list[Problem]:
    rows = {
        "hidden": size["hidden"],
        "ffn": size["ffn"],
        "heads * head_dim": size["kv_heads"] * size["q_per_kv"] * size["head_dim"],
    }
    return [
        _unsupported(
            f"{name} is {n}, and q8_0 blocks rows by {Q8_0_BLOCK}",
            f"nearest: {n // Q8_0_BLOCK * Q8_0_BLOCK} or {-(-n // Q8_0_BLOCK) * Q8_0_BLOCK}",
        )
        for name, n in rows.items()
        if n % Q8_0_BLOCK
    ]


def _unsupported(cause: str, fix: str) -> Problem:
    return Problem(Code.UNSUPPORTED, cause, fix=fix)
