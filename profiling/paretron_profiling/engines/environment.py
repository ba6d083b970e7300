"""What a process that serves may know of ours: its environment, without secrets and surprises."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

# Whole words of a name: TOKENIZERS_PARALLELISM is no secret.
_SECRET = re.compile(
    r"(^|_)(TOKENS?|KEYS?|APIKEY|SECRETS?|PASSWORDS?|PASSWD|PASSPHRASE|CREDENTIALS?|AUTH)(_|$)",
    re.IGNORECASE,
)
_PYTHONS_OWN = "PYTHON"


def clean_environment(*, drop: tuple[str, ...] = ()) -> dict[str, str]:
    """Ours without what looks like a secret, Python's own settings, and the prefixes to `drop`.

    Offline: nothing that is measured may fetch anything.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith((_PYTHONS_OWN, *drop)) and not _SECRET.search(name)
    }
    return kept | {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}


def vllm_environment() -> Mapping[str, str]:
    """That of a process that runs vLLM.

    Threads that wait sleep (OMP_WAIT_POLICY, unless it is set already): by default they spin, and
    where anything else wants the cores, a step of a small model was seen to take fifty times as
    long.
    """
    return (
        {"OMP_WAIT_POLICY": "PASSIVE"}
        | clean_environment(drop=("VLLM_",))
        | {"VLLM_NO_USAGE_STATS": "1"}
    )
