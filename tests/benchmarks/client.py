"""Our load client against `vllm bench serve` on one server, turn by turn: JSON.

PYTHONPATH=tests python -m benchmarks.client MODEL --python VLLM_PYTHON [--hidden 768] [--out FILE]
PYTHONPATH=tests python -m benchmarks.client MODEL --python VLLM_PYTHON --delays 0.1 0.02

With --hidden, the server gets a larger model of random weights in MODEL's form, with its tokenizer:
where a step takes long, the machine's noise is small beside it. In each round both clients send as
many requests of the same lengths, the order changing from round to round. Ratios are ours over
theirs, one a round; of each figure the median of the rounds' ratios and the ratio of the medians.
With --delays, both ask a server that only waits: so long for the first token and for each further
one. It logs when it wrote what, so that each client's own share of the times shows.

Both count from the actual sending and send random tokens as tokens. With --text theirs go as text,
as they come with the tool: the server then makes tokens of one request after the other, so that the
first of a wave runs alone and the others wait for it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from paretron.recipe import Engine as EngineSettings
from paretron_profiling import machine
from paretron_profiling.engines.engine import Limits, Pace
from paretron_profiling.engines.environment import vllm_environment
from paretron_profiling.engines.openai_server import ENGINE as OPENAI
from paretron_profiling.engines.vllm_server import ENGINE as VLLM
from paretron_profiling.models import ModelFacts
from paretron_profiling.prompts import random_prompts
from paretron_profiling.schema import CLOSED, Sample, Workload
from paretron_profiling.servers.server import ServerSession, free_port
from profiling import sseserver

LOG = "log"
FIGURES = ("output_tok_s", "ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
# The `vllm` command of the CPU build does not start; this is what its `bench serve` calls.
THEIRS = """
if __name__ == "__main__":
    import sys
    from vllm.benchmarks.datasets import RandomDataset
    from vllm.benchmarks.serve import add_cli_args, main
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    drawn = RandomDataset.sample
    def sample(self, tokenizer, *args, **kwargs):
        found = drawn(self, tokenizer, *args, **kwargs)
        for one in found:
            one.prompt = tokenizer.encode(one.prompt, add_special_tokens=False)[:one.prompt_len]
        return found
    if sys.argv[1] == "--tokens":
        del sys.argv[1]
        RandomDataset.sample = sample
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    main(parser.parse_args())
"""


def main() -> None:
    """Start the server, let both measure, print what they found."""
    asked = _arguments()
    with tempfile.TemporaryDirectory() as place:
        if asked.hidden:
            asked.model = grown(asked.model, Path(place) / "model", asked.hidden, asked.layers)
        text = json.dumps(compared(asked), indent=1)
    if asked.out:
        asked.out.write_text(text + "\n")
    print(text)


def compared(asked: argparse.Namespace) -> dict[str, object]:
    """Both clients' rounds on one server, and of one that logs also its own."""
    facts = ModelFacts.of(asked.model)
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as scratch, _server(asked, facts, Path(scratch)) as session:
        for number in range(-1, asked.rounds):  # the first is discarded
            turn = {
                "ours": lambda n=number: ours(session, facts, asked, n),
                "theirs": lambda n=number: theirs(session, asked, n, Path(scratch)),
            }
            order = list(turn) if number % 2 else list(turn)[::-1]
            found = {}
            for name in order:
                (log := Path(scratch) / LOG).write_text("")
                found[name] = turn[name]()
                if asked.delays:
                    found[f"server_of_{name}"] = logged(log, asked)
            if number >= 0:
                rounds.append(found)
                print(json.dumps({"round": number} | found), file=sys.stderr, flush=True)
        about = dict(session.about)
    return summary(rounds, asked, about) | {"weight_bytes": facts.weight_bytes}


@contextmanager
def _server(asked: argparse.Namespace, facts: ModelFacts, scratch: Path) -> Iterator[ServerSession]:
    """vLLM's, or one that only waits."""
    context_len = asked.input_len + asked.output_len + 8  # theirs may be some tokens longer
    kv_bytes = asked.concurrency * context_len * facts.kv_bytes_per_token
    limits = Limits(batch=asked.concurrency, context_len=context_len, kv_bytes=kv_bytes)
    if not asked.delays:
        settings = EngineSettings(name="vllm_server", python=asked.python, dtype=asked.dtype)
        with VLLM.open(asked.model, settings=settings, limits=limits) as session:
            yield session
        return
    first_s, gap_s = asked.delays
    plan = {"first_s": first_s, "gap_s": gap_s, "log": str(scratch / LOG)}
    port = free_port()
    waits = [sys.executable, sseserver.__file__, "--port", str(port), "--plan", json.dumps(plan)]
    with subprocess.Popen(waits, stdout=subprocess.DEVNULL) as server:
        try:
            time.sleep(2)
            url = f"http://127.0.0.1:{port}"
            settings = EngineSettings(name="openai", servers={"test": url})
            with OPENAI.open(asked.model, settings=settings, limits=limits) as session:
                yield session
        finally:
            server.kill()


def logged(log: Path, asked: argparse.Namespace) -> dict[str, float]:
    """What a server's log says of its own times, of the requests at the end of it."""
    rows = [json.loads(line) for line in log.read_text().splitlines()][-asked.requests :]
    after = asked.output_len - 1
    return {
        "ttft_ms": 1e3 * median(r["written"][0] - r["received"] for r in rows),
        "tpot_ms": 1e3 * median((r["written"][-1] - r["written"][0]) / after for r in rows),
    }


def grown(source: Path, place: Path, hidden: int, layers: int) -> Path:
    """A model of random weights with the source's tokenizer, heads of 64, an MLP of 8/3 hidden."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source)
    config.update(
        {
            "hidden_size": hidden, "intermediate_size": hidden * 8 // 3, "head_dim": 64,
            "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
            "num_hidden_layers": layers,
        }
    )  # fmt: skip
    shutil.copytree(source, place, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(place)
    return place


def ours(
    session: ServerSession, facts: ModelFacts, asked: argparse.Namespace, number: int
) -> dict[str, float]:
    """A closed loop of our client."""
    prompts = random_prompts(
        batch=asked.requests,
        input_len=asked.input_len,
        vocab_size=facts.vocab_size,
        avoid=facts.special_ids,
        seed=f"{asked.seed}/{number}",
    )
    pace = Pace(CLOSED, asked.concurrency, 0)
    sample = session.serve(prompts, asked.output_len, pace=pace)
    work = Workload("vllm_server", CLOSED, asked.concurrency, asked.input_len, asked.output_len)
    latencies = {
        "ttft_ms": Sample.ttfts_ms,
        "tpot_ms": Sample.tpots_ms,
        "itl_ms": Sample.itls_ms,
        "e2e_ms": Sample.e2es_ms,
    }
    found = {name: median(of(sample, work)) for name, of in latencies.items()}
    return {
        **found,
        "output_tok_s": sample.output_tok_s(work) or 0.0,
        "completed": sample.completed,
        "chunks": len(sample.gaps_s) + sample.completed,
    }


def theirs(
    session: ServerSession, asked: argparse.Namespace, number: int, scratch: Path
) -> dict[str, float]:
    """The same by vLLM's own, in a process of its own."""
    served = session.model
    subprocess.run(
        [
            str(asked.python), "-I", "-c", THEIRS, *([] if asked.text else ["--tokens"]),
            "--backend", "openai",
            "--base-url", session.url, "--model", served, "--tokenizer", str(asked.model),
            "--dataset-name", "random", "--random-input-len", str(asked.input_len),
            "--random-output-len", str(asked.output_len), "--random-range-ratio", "0",
            "--num-prompts", str(asked.requests), "--max-concurrency", str(asked.concurrency),
            "--ignore-eos", "--temperature", "0", "--seed", str(number + 1000),
            "--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm",
            "--save-result", "--result-dir", str(scratch), "--result-filename", "theirs.json",
        ],
        env={**vllm_environment(), "OMP_NUM_THREADS": "1"}, cwd=scratch, check=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    said = json.loads((scratch / "theirs.json").read_text())
    return {
        "ttft_ms": said["median_ttft_ms"],
        "tpot_ms": said["median_tpot_ms"],
        "itl_ms": said["median_itl_ms"],
        "e2e_ms": said["median_e2el_ms"],
        "output_tok_s": said["output_throughput"],
        "completed": said["completed"],
        "input_tokens": said["total_input_tokens"],
        "output_tokens": said["total_output_tokens"],
    }


def summary(
    rounds: Sequence[Mapping[str, Mapping[str, float]]],
    asked: argparse.Namespace,
    about: Mapping[str, str],
) -> dict[str, object]:
    """Medians of both, and how far they agree."""

    def of(who: str, figure: str) -> list[float]:
        return [r[who][figure] for r in rounds]

    compared: dict[str, dict[str, object]] = {}
    for figure in FIGURES:
        mine, other = of("ours", figure), of("theirs", figure)
        ratios = sorted(a / b for a, b in zip(mine, other, strict=True))
        compared[figure] = {
            "ours": median(mine),
            "theirs": median(other),
            "ratio_of_medians": median(mine) / median(other),
            "median_ratio": median(ratios),
            "ratios": ratios,
            "spread_ours": (max(mine) - min(mine)) / median(mine),
            "spread_theirs": (max(other) - min(other)) / median(other),
        }
        if asked.delays and figure in ("ttft_ms", "tpot_ms"):
            compared[figure] |= {
                f"{who}_above_server": median(
                    r[who][figure] - r[f"server_of_{who}"][figure] for r in rounds
                )
                for who in ("ours", "theirs")
            }
    keys = (
        "hidden",
        "layers",
        "input_len",
        "output_len",
        "requests",
        "concurrency",
        "rounds",
        "seed",
        "dtype",
        "text",
    )
    return {
        "settings": {"model": asked.model.name} | {k: getattr(asked, k) for k in keys},
        "compared": compared,
        "rounds": list(rounds),
        "about": dict(about),
        "hardware": machine.hardware(),
        "load_after": os.getloadavg()[0],
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--python", type=Path, default=os.environ.get("PARETRON_VLLM_PYTHON"))
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--delays", type=float, nargs=2, metavar=("FIRST_S", "GAP_S"))
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--text", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.python is None:
        parser.exit(0, "PARETRON_VLLM_PYTHON names no interpreter: nothing measured\n")
    asked.python = Path(asked.python).absolute()
    return asked


if __name__ == "__main__":
    main()
