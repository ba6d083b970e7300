"""A model repository for Triton Inference Server, with its weights inside.

The weights are an artifact of the hf or the onnx exporter, made by it with its gates, manifest and
card; this file adds what a server needs to find them and to know its limits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paretron.artifacts.jsonfile import dump, read_object
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.serving import unrun_note, vllm_limit
from paretron.artifacts.staging import staged
from paretron.artifacts.tokenizer import tokenizer_problems
from paretron.data.texts import Texts
from paretron.errors import Code, Problem, raise_all
from paretron.evaluate.parity import ParityReport
from paretron.families import family_of
from paretron.recipe import Export
from paretron.versions import missing_or_old
from paretron_exporters import hf, onnx, trtllm
from paretron_exporters.exporter import Exporter, OnEvent, not_taken
from paretron_exporters.quantized_forms import FORMS
from paretron_exporters.triton_lint import FLOORS, INSTALL, lint
from paretron_exporters.triton_repository import (
    BACKENDS,
    MOUNT,
    NAMES,
    WEIGHTS,
    Backend,
    Deployment,
    vllm_arguments,
    write_repository,
)
from paretron_exporters.trtllm import bad_limits, server_settings
from paretron_exporters.trtllm_config import bad_degrees

# What the exporter of the weights is told of the section.
_OF_WEIGHTS = ("dtype", "quantize", "shard_bytes")
_DEGREES = frozenset({"tensor_parallel", "pipeline_parallel"})
TAKES: Mapping[Backend, frozenset[str]] = {
    "trtllm": frozenset({"backend", "serving", *_OF_WEIGHTS}) | _DEGREES,
    "vllm": frozenset({"backend", "serving", *_OF_WEIGHTS}) | _DEGREES,
    "onnx": frozenset({"backend", "serving", *_OF_WEIGHTS}),
}
# Who knows what a backend's engine can do.
_EXPORTERS: Mapping[Backend, Exporter] = {
    "trtllm": trtllm.EXPORTER,
    "vllm": hf.EXPORTER,
    "onnx": onnx.EXPORTER,
}
_SERVER = "Triton Inference Server"
_UNRUN: Mapping[Backend, tuple[str, ...]] = {
    "trtllm": (_SERVER, "TensorRT-LLM"),
    "vllm": (_SERVER,),
    "onnx": (_SERVER,),
}
_ABOUT = {
    "trtllm": "TensorRT-LLM's LLM API. model.py and its helpers come with the container, from the "
    "release of TensorRT-LLM that runs there.",
    "vllm": "vLLM.",
    "onnx": "ONNX Runtime GenAI under Triton's Python backend, on the CPU. Requests take turns, "
    "token by token; they share no matrix product, so more of them at once do not make more tokens "
    "a second.",
}


class TritonExporter:
    """A folder that `tritonserver --model-repository` serves as it is."""

    name = "triton"

    def problems(self, config: Mapping[str, Any], *, export: Export) -> list[Problem]:
        """No such backend, degrees and limits that do not fit, and what the weights' form says."""
        backend = next((b for b in BACKENDS if b == export.backend), None)
        if backend is None:
            cause = (
                f"triton knows no backend {export.backend!r}" if export.backend else "no backend"
            )
            fix = f"state one of {', '.join(BACKENDS)}"
            return [Problem(Code.RECIPE_VALUE, cause, where="export.backend", fix=fix)]
        return [
            *not_taken(export, takes=TAKES[backend]),
            *_EXPORTERS[backend].problems(config, export=_section(backend, export)),
            *(_vllm_problems(config, export) if backend == "vllm" else ()),
            *(bad_limits(config, export) if backend != "trtllm" else ()),
            *missing_or_old(FLOORS, install=INSTALL),
        ]

    def needs(self, export: Export, *, params: int, embedding_params: int) -> tuple[int, int]:
        """What the weights take."""
        weights = onnx.EXPORTER if export.backend == "onnx" else hf.EXPORTER
        section = _of_weights(weights.name, export)
        return weights.needs(section, params=params, embedding_params=embedding_params)

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
        """Export the weights, write the repository around them, and publish it when both hold.

        Errors: those of the hf or onnx exporter; GATE_RELOAD for a repository that Triton would
        refuse.
        """
        from paretron.artifacts.card import write_card
        from paretron_exporters.figures import about_model

        checkpoint = Checkpoint.open(source)
        config = checkpoint.config
        raise_all(self.problems(config, export=export))
        # Whoever asks a server gives text.
        raise_all(tokenizer_problems(source, vocab=config["vocab_size"]))
        backend = next(b for b in BACKENDS if b == export.backend)
        with staged(out, provenance=provenance, overwrite=overwrite) as folder:
            version = folder / NAMES[backend] / "1"
            version.mkdir(parents=True)
            weights = onnx.EXPORTER if backend == "onnx" else hf.EXPORTER
            report = weights.export(
                source,
                export=_of_weights(weights.name, export),
                out=version / WEIGHTS,
                provenance=provenance,
                texts=texts,
                on_event=on_event,
            )
            deployment = _deployment(config, export, backend, weights=version / WEIGHTS)
            write_repository(folder, deployment)
            raise_all(lint(folder, backend=backend))
            dump(folder / "parity.json", report.as_json())
            write_card(
                folder,
                title=about_model(config),
                about=f"A model repository for {_SERVER}, seen there as {MOUNT}: "
                f"{_ABOUT[backend]} client_http.py and client_grpc.py ask it. "
                f"{unrun_note(_UNRUN[backend])}",
                provenance=provenance,
                numbers=_figures(deployment),
                engines=(),
                library="tritonserver",
            )
        return report


EXPORTER = TritonExporter()


def _section(backend: Backend, export: Export) -> Export:
    """The section for the exporter that knows what the backend's engine can do."""
    if backend == "trtllm":
        return export.model_copy(update={"to": "trtllm", "backend": None})
    return _of_weights(_EXPORTERS[backend].name, export)


def _of_weights(to: str, export: Export) -> Export:
    """The section for the exporter of the weights: its settings alone."""
    theirs = {name: getattr(export, name) for name in _OF_WEIGHTS}
    stated = {name: value for name, value in theirs.items() if value is not None}
    return Export.model_validate({"to": to} | stated)


def _deployment(
    config: Mapping[str, Any], export: Export, backend: Backend, *, weights: Path
) -> Deployment:
    longest = export.serving.max_seq_len or int(config["max_position_embeddings"])
    arguments: Mapping[str, Any] = {}
    if backend == "trtllm":
        arguments = server_settings(config, export)
    elif backend == "vllm":
        written = read_object(weights / "config.json", code=Code.GATE_RELOAD)
        arguments = vllm_arguments(export, max_seq_len=longest, dtype=computed_in(written))
    return Deployment(backend, longest, export.serving.max_batch_size, arguments)


def computed_in(written: Mapping[str, Any]) -> str:
    """The dtype to state to vLLM: that of the weights, unless no kernel of their form takes it."""
    form = written.get("quantization_config", {}).get("quant_method")
    wide = written["dtype"] == "float32"
    return "bfloat16" if wide and form == "modelopt" else str(written["dtype"])


def _vllm_problems(config: Mapping[str, Any], export: Export) -> list[Problem]:
    limit = vllm_limit(config)
    fix = "state backend: trtllm or onnx, or prune to another shape"
    problems = [Problem(Code.UNSUPPORTED, limit, fix=fix)] if limit else []
    form = FORMS.get(export.quantize or "")
    if form is not None and not form.vllm:
        readable = ", ".join(f.name for f in FORMS.values() if f.vllm)
        cause = f"vLLM (0.32) reads no {form.name}"
        problems.append(Problem(Code.UNSUPPORTED, cause, "export.quantize", f"one of {readable}"))
    return [*problems, *bad_degrees(family_of(config), config, export)]


def _figures(deployment: Deployment) -> dict[str, str]:
    """What a client must know of a server: its names and limits."""
    return {
        "model": deployment.name,
        "longest prompt and answer": f"{deployment.max_seq_len} tokens",
        "requests at once": str(deployment.max_batch_size),
    } | {
        key.replace("_", " "): str(value)
        for key, value in deployment.arguments.items()
        if not isinstance(value, Mapping)
    }
