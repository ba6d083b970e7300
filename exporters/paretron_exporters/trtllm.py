"""What TensorRT-LLM's PyTorch backend serves: a Hugging Face checkpoint, and how it is started.

The checkpoint is an artifact of the hf exporter, made by it with its gates, manifest and card;
this file adds the settings of the server and the commands that start and measure it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from paretron.artifacts.jsonfile import dump
from paretron.artifacts.manifest import Provenance
from paretron.artifacts.reader import Checkpoint
from paretron.artifacts.staging import staged
from paretron.artifacts.tokenizer import tokenizer_problems
from paretron.data.texts import Texts
from paretron.errors import Code, ParetronError, Problem, raise_all
from paretron.evaluate.parity import ParityReport
from paretron.families import family_of
from paretron.recipe import Export
from paretron_exporters import hf
from paretron_exporters.exporter import OnEvent, not_taken
from paretron_exporters.figures import about_model
from paretron_exporters.trtllm_build import write_script
from paretron_exporters.trtllm_config import bad_degrees

# What the exporter of the checkpoint is told of the section.
_OF_WEIGHTS = ("dtype", "quantize", "shard_bytes")
TAKES = frozenset({"tensor_parallel", "pipeline_parallel", "serving", *_OF_WEIGHTS})
# By the documentation of 1.2: the classes of its PyTorch backend, and the forms that they load.
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "nemotron", "gemma3_text", "phi3", "mixtral", "qwen3_moe",
)  # fmt: skip
QUANTIZE = ("fp8", "fp8_kv", "nvfp4", "int4_awq")
MODEL, CONFIG, SERVE, BENCH = "model", "llm_config.yaml", "serve.sh", "bench.sh"
_REQUESTS, _TOKENS = 1000, 128  # of the benchmark; tokens of a prompt, and of an answer
_ABOUT = (
    f"A checkpoint for TensorRT-LLM (1.2 or newer, PyTorch backend) in `{MODEL}`, the settings of "
    f"its server in {CONFIG}; {SERVE} starts it, {BENCH} measures it. The checkpoint was compared "
    "with its source in transformers; TensorRT-LLM needs a GPU and was not run here."
)


class TrtllmExporter:
    """A checkpoint with the settings and commands of `trtllm-serve` and `trtllm-bench`."""

    name = "trtllm"

    def problems(self, config: Mapping[str, Any], *, export: Export) -> list[Problem]:
        """What TensorRT-LLM has no class or kernel for, degrees that do not divide, limits."""
        family = family_of(config)
        said = [
            (f"no {family.model_type} in trtllm", FAMILIES, family.model_type in FAMILIES),
            (f"quantize: {export.quantize}", QUANTIZE, export.quantize in (None, *QUANTIZE)),
        ]
        wrong = [
            Problem(Code.UNSUPPORTED, cause, fix=f"supported: {', '.join(allowed)}")
            for cause, allowed, fits in said
            if not fits
        ]
        return [
            *not_taken(export, takes=TAKES),
            *(wrong or hf.EXPORTER.problems(config, export=_of_weights(export))),
            *bad_degrees(family, config, export),
            *bad_limits(config, export),
        ]

    def needs(self, export: Export, *, params: int, embedding_params: int) -> tuple[int, int]:
        """What the checkpoint takes."""
        return hf.EXPORTER.needs(
            _of_weights(export), params=params, embedding_params=embedding_params
        )

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
        """Export the checkpoint, write settings and commands beside it, and publish all.

        Errors: those of the hf exporter; GATE_RELOAD for settings that do not read back.
        """
        from paretron.artifacts.card import write_card

        checkpoint = Checkpoint.open(source)
        config = checkpoint.config
        raise_all(self.problems(config, export=export))
        # Whoever asks a server gives text.
        raise_all(tokenizer_problems(source, vocab=config["vocab_size"]))
        settings = server_settings(config, export)
        with staged(out, provenance=provenance, overwrite=overwrite) as folder:
            report = hf.EXPORTER.export(
                source,
                export=_of_weights(export),
                out=folder / MODEL,
                provenance=provenance,
                texts=texts,
                on_event=on_event,
            )
            write_settings(folder / CONFIG, settings)
            _write_commands(folder)
            dump(folder / "parity.json", report.as_json())
            write_card(
                folder,
                title=about_model(config),
                about=_ABOUT,
                provenance=provenance,
                numbers=_figures(settings),
                engines=(),
                library="tensorrt-llm",
            )
        return report


EXPORTER = TrtllmExporter()


def server_settings(config: Mapping[str, Any], export: Export) -> dict[str, Any]:
    """What `trtllm-serve --config` reads: arguments of TensorRT-LLM's LLM class."""
    serving = export.serving
    return {
        "tensor_parallel_size": export.tensor_parallel,
        "pipeline_parallel_size": export.pipeline_parallel,
        "max_batch_size": serving.max_batch_size,
        "max_num_tokens": serving.max_num_tokens,
        "max_seq_len": serving.max_seq_len or int(config["max_position_embeddings"]),
        "kv_cache_config": {
            "free_gpu_memory_fraction": serving.gpu_memory,
            "dtype": "fp8" if export.quantize == "fp8_kv" else "auto",
        },
        "cuda_graph_config": {"enable_padding": True},
    }


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write YAML and read it back; GATE_RELOAD when another meaning comes out."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    text = io.StringIO()
    yaml.dump(dict(settings), text)
    path.write_text(text.getvalue(), "utf-8")
    found = YAML(typ="safe", pure=True).load(path.read_text("utf-8"))
    if found != settings:
        raise ParetronError(Problem(Code.GATE_RELOAD, f"reads back as {found}", where=path.name))


def _of_weights(export: Export) -> Export:
    """The section for the exporter of the checkpoint: its settings alone."""
    theirs = {name: getattr(export, name) for name in _OF_WEIGHTS}
    stated = {name: value for name, value in theirs.items() if value is not None}
    return Export.model_validate({"to": hf.EXPORTER.name} | stated)


def bad_limits(config: Mapping[str, Any], export: Export) -> Iterator[Problem]:
    """RECIPE_VALUE for a server that could not hold what it is told to."""
    serving, knows = export.serving, config.get("max_position_embeddings")
    if knows is None and serving.max_seq_len is None:
        yield _limit("max_seq_len", "config.json has no max_position_embeddings", "state it")
    if knows is not None and (serving.max_seq_len or 0) > knows:
        cause = f"{serving.max_seq_len} tokens, but the model knows {knows} positions"
        yield _limit("max_seq_len", cause, f"at most {knows}")
    if serving.max_batch_size > serving.max_num_tokens:
        cause = f"{serving.max_num_tokens} tokens a step for {serving.max_batch_size} requests"
        yield _limit("max_num_tokens", cause, "at least max_batch_size")


def _limit(key: str, cause: str, fix: str) -> Problem:
    return Problem(Code.RECIPE_VALUE, cause, where=f"export.serving.{key}", fix=fix)


def _write_commands(folder: Path) -> None:
    """serve.sh and bench.sh; words behind their names are handed on."""
    needs = "Needs TensorRT-LLM 1.2 or newer and a GPU."
    serve = ("exec", "trtllm-serve", MODEL, "--config", CONFIG, '"$@"')
    write_script(folder / SERVE, [serve], about=needs)
    bench = ("trtllm-bench", "--model", MODEL, "--model_path", MODEL)
    requests, report = (f'"${{TMPDIR:-/tmp}}/paretron-bench.{end}"' for end in ("jsonl", "json"))
    prepare = (
        *(*bench, "prepare-dataset", "--output", requests, "token-norm-dist"),
        *("--input-mean", str(_TOKENS), "--input-stdev", "0"),
        *("--output-mean", str(_TOKENS), "--output-stdev", "0"),
        *("--num-requests", str(_REQUESTS)),
    )
    measure = (
        *(*bench, "throughput", "--backend", "pytorch", "--dataset", requests),
        *("--config", CONFIG, "--streaming", "--report_json", report, '"$@"'),
    )
    about = f"{needs} {_REQUESTS} requests of {_TOKENS} tokens in and {_TOKENS} out."
    write_script(folder / BENCH, [prepare, measure], about=about)


def _figures(settings: Mapping[str, Any]) -> dict[str, str]:
    return {
        key.replace("_", " "): str(value)
        for key, value in settings.items()
        if not isinstance(value, Mapping)
    }
