"""The model card of an artifact: README.md, with every value quoted for where it stands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from paretron.artifacts.manifest import Provenance

_TEMPLATE = """\
---
library_name: {{ library | tojson }}
pipeline_tag: text-generation
tags: [paretron]
---
# {{ title | text }}
{% if provenance.stamp %}

> **{{ provenance.stamp | text }}**: made to try a recipe out; of no other use.
{% endif %}

{{ about | text }}

{% if numbers %}
| figure | value |
|---|---|
{% for name, value in numbers.items() %}
| {{ name | text }} | {{ value | text }} |
{% endfor %}
{% endif %}

{% for engine in engines %}
## {{ engine | text }}

```python
{{ snippets[engine] }}
```

{% endfor %}
## Where it comes from

{% for role, identity in provenance.parents.items() %}
- {{ role | text }}: `{{ identity | code }}`
{%- if role in provenance.unverified %} (unverified: no checksum is known of it){% endif %}

{% endfor %}
{% if provenance.seed is not none %}
- seed: {{ provenance.seed | text }}
{% endif %}

```json
{{ provenance.settings | tojson(indent=2) }}
```

`manifest.json` holds the sha256 of every file and the versions that wrote them; `paretron verify`
compares.
"""

# The reader puts the folder's path; nothing of the model is pasted into code.
SNIPPETS: Mapping[str, str] = {
    "transformers": """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("PATH")
ids = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=40)[0]))""",
    "vLLM": """\
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM("PATH")
    out = llm.generate("Once upon a time", SamplingParams(max_tokens=40))
    print(out[0].outputs[0].text)""",
    "SGLang": """\
import sglang

if __name__ == "__main__":
    engine = sglang.Engine(model_path="PATH")
    print(engine.generate("Once upon a time", {"max_new_tokens": 40})["text"])""",
    "TensorRT-LLM": """\
from tensorrt_llm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(model="PATH")
    out = llm.generate("Once upon a time", SamplingParams(max_tokens=40))
    print(out.outputs[0].text)""",
    "onnxruntime-genai": """\
import onnxruntime_genai as og

model = og.Model("PATH")
tokenizer = og.Tokenizer(model)
params = og.GeneratorParams(model)
params.set_search_options(max_length=100)
generator = og.Generator(model, params)
generator.append_tokens(tokenizer.encode("Once upon a time"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))""",
    "onnxruntime": """\
import numpy as np
import onnxruntime as ort
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("PATH")
prefill, decode = (ort.InferenceSession(f"PATH/{name}.onnx") for name in ("prefill", "decode"))
ids, new, session, cache = tokenizer("Once upon a time")["input_ids"], [], prefill, {}
for _ in range(40):
    chunk = ids if session is prefill else new[-1:]
    last = len(ids) + len(new)
    positions = np.arange(last - len(chunk), last)[None]
    out = session.run(None, {"input_ids": [chunk], "position_ids": positions, **cache})
    named = dict(zip((o.name for o in session.get_outputs()), out))
    new.append(int(named.pop("logits")[0, -1].argmax()))
    cache = {name.replace("output", "input", 1): value for name, value in named.items()}
    session = decode
print(tokenizer.decode(ids + new))""",
    "llama.cpp": """\
from llama_cpp import Llama

llm = Llama("PATH/model.gguf")
print(llm("Once upon a time", max_tokens=40)["choices"][0]["text"])""",
}


def write_card(
    folder: Path,
    *,
    title: str,
    about: str,
    provenance: Provenance,
    numbers: Mapping[str, Any],
    engines: Sequence[str] = ("transformers", "vLLM"),
    library: str = "transformers",
) -> None:
    """Write README.md: what it is, its numbers, how each engine loads it, parents and settings.

    `engines` are keys of SNIPPETS. Values may be anything a user typed: text is escaped for
    Markdown and HTML, identities for code spans, settings are JSON.
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["text"] = _text
    environment.filters["code"] = _code
    environment.policies["json.dumps_kwargs"] = {"sort_keys": True}
    card = environment.from_string(_TEMPLATE).render(
        title=title,
        about=about,
        provenance=provenance,
        numbers=numbers,
        engines=engines,
        snippets={k: Markup(v) for k, v in SNIPPETS.items()},
        library=library,
    )
    (folder / "README.md").write_text(card, "utf-8")


def _text(value: object) -> Markup:
    """One line of plain text: no HTML, no Markdown that opens anything."""
    line = " ".join(str(value).split())
    special = "\\`*_[]|#"
    return Markup("".join(f"\\{c}" if c in special else str(escape(c)) for c in line))


def _code(value: object) -> Markup:
    """The inside of a code span, which only a backtick ends."""
    return Markup(" ".join(str(value).replace("`", "'").split()))
