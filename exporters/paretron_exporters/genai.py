"""ONNX Runtime GenAI: its model builder and its runtime; the only file here that imports it."""

from __future__ import annotations

import contextlib
import gc
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np

from paretron.artifacts.companions import write_companions
from paretron.artifacts.reader import Checkpoint
from paretron.errors import Code, ParetronError, Problem
from paretron.evaluate.parity import Logits, Prompt
from paretron_exporters.onnx_precision import Precision
from paretron_exporters.quiet import quiet, told_of

KEPT = ("genai_config.json", "model.onnx", "model.onnx.data")


def build(
    checkpoint: Checkpoint, folder: Path, *, config: Mapping[str, Any], precision: Precision
) -> None:
    """Run the model builder; only its graph and its config stay in `folder`.

    `config` is what the builder is told instead of the checkpoint's own config.json. ENGINE when
    the builder fails.
    """
    scratch = folder / "builder"
    told, made, cache = scratch / "told", scratch / "made", scratch / "cache"
    for path in (told, made, cache):
        path.mkdir(parents=True)
    write_companions(told, config=config, source=checkpoint.path)
    for file in {e.file for e in checkpoint.entries.values()}:
        (told / file.name).symlink_to(file.resolve())
    for index in checkpoint.path.glob("*.index.json"):
        shutil.copyfile(index, told / index.name)
    with _builder() as builder:
        # Caches cut to the window refuse to run where less than a window is asked for.
        extra = ["hf_token=false", "windowed_kv_cache=false", *precision.options]
        places = ("", str(told), str(made), precision.builder, precision.device, str(cache))
        options = builder.parse_extra_options(*places, extra)
        builder.create_model(*places, **options)
    for name in KEPT:
        (made / name).rename(folder / name)
    shutil.rmtree(scratch)
    gc.collect()


@contextlib.contextmanager
def _builder() -> Iterator[Any]:
    """The builder's module, silenced, offline, and with its import path only while it runs."""
    _runtime()
    online, path = huggingface_hub.constants.HF_HUB_OFFLINE, list(sys.path)
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    other = f"try another version of onnxruntime-genai than {builder_version()}"
    try:
        with told_of("onnxruntime-genai's model builder", fix=other), quiet():
            from onnxruntime_genai.models import builder

            # It imports its own modules as top-level ones, some of them only while it builds.
            sys.path.append(str(Path(builder.__file__).parent))
            yield builder
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = online
        sys.path[:] = path


def builder_version() -> str:
    """The installed version of the builder."""
    return version("onnxruntime-genai")


def _runtime() -> Any:
    try:
        import onnxruntime_genai
    except ImportError as error:
        raise ParetronError(
            Problem(
                Code.OPTIONAL_MISSING,
                f"onnxruntime-genai cannot be imported: {error}",
                fix='pip install "paretron[onnx]"',
            )
        ) from error
    return onnxruntime_genai


class GenaiEngine:
    """A folder with genai_config.json in ONNX Runtime GenAI, on the CPU whatever it is made for."""

    name = "onnxruntime-genai on the CPU"

    def __init__(self, folder: Path, *, max_length: int) -> None:
        self._og = _runtime()
        self._max_length = max_length
        try:
            config = self._og.Config(str(folder))
            config.clear_providers()
            self._model = self._og.Model(config)
        except RuntimeError as error:  # og raises nothing more specific
            raise _reload_error(error) from error

    def start(self) -> _Session:
        """An empty sequence."""
        return _Session(self._generator())

    def generate(self, prompt: Prompt, *, steps: int) -> Prompt:
        """What the engine's own greedy loop gives: at most `steps` tokens, fewer at an EOS."""
        generator = self._generator()
        generator.append_tokens(np.array([prompt], dtype=np.int32))
        for _ in range(steps):
            if generator.is_done():
                break
            generator.generate_next_token()
        return tuple(int(t) for t in generator.get_sequence(0)[len(prompt) :])

    def _generator(self) -> Any:
        params = self._og.GeneratorParams(self._model)
        params.set_search_options(do_sample=False, batch_size=1, max_length=self._max_length)
        return self._og.Generator(self._model, params)


class _Session:
    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def feed(self, ids: Sequence[int]) -> Logits:
        """Append tokens; logits (len(ids), vocab)."""
        try:
            self._generator.append_tokens(np.array([list(ids)], dtype=np.int32))
            # A view of the engine's buffer, which the next step overwrites.
            logits: Logits = np.array(self._generator.get_output("logits")[0], dtype=np.float32)
        except RuntimeError as error:
            raise _reload_error(error) from error
        return logits


def _reload_error(error: RuntimeError) -> ParetronError:
    line = (str(error).splitlines() or [""])[0]
    return ParetronError(
        Problem(Code.GATE_RELOAD, f"onnxruntime-genai cannot run the export: {line[:300]}")
    )
