"""Refitting a wide MLP within less memory than its second moments and one copy of them take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from makers import PicoMaker

TREE = Path(__file__).parents[2]
WIDE = 4096  # whose second moments are 128 MiB in fp64
LIMIT = 200 << 20

# RLIMIT_DATA counts what a process allocates for itself; it is set once the libraries are there.
PROGRAM = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from picocompensated import compensated
import paretron.compensate.stage, transformers.models.llama.modeling_llama

model, out, limit = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.linalg.cholesky(torch.eye(64, dtype=torch.float64))
used = int(next(l for l in open("/proc/self/status") if l.startswith("VmData")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + limit, used + limit))
compensated(model, out, new={"layers": 1}, count=2)
"""


def test_second_moments_are_kept_once_and_by_half(pico: PicoMaker, tmp_path: Path) -> None:
    model = pico(num_hidden_layers=2, intermediate_size=WIDE)

    def run(limit: int) -> subprocess.CompletedProcess[str]:
        roots = [TREE / r for r in ("toolkit", "tests")]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, roots))}
        command = [sys.executable, "-c", PROGRAM, str(model), str(tmp_path / str(limit)),
                   str(limit)]  # fmt: skip
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    assert run(LIMIT // 4).returncode != 0  # else the limit limits nothing
    done = run(LIMIT)
    assert done.returncode == 0, done.stderr
