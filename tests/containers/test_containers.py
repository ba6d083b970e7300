"""Images and compose files: one place for versions, linters, least rights, what scripts do."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML

from containers.dockerfile import arguments, environment, instructions
from paretron.versions import SAFE_FLOORS, release

TREE = Path(__file__).parents[2]
CONTAINERS = TREE / "containers"
DOCKERFILES = sorted(CONTAINERS.glob("*.Dockerfile"))
COMPOSE = sorted(CONTAINERS.glob("compose.*.yaml"))
SERVERS = ("triton-vllm", "triton-onnx", "triton-trtllm")
# Which image of versions.yaml a Dockerfile stands on.
BASE = {
    "cpu": "python", "toolkit": "pytorch", "triton-vllm": "triton_vllm",
    "triton-trtllm": "triton_trtllm",
}  # fmt: skip


def load(path: Path) -> Any:
    return YAML(typ="safe").load(path.read_text("utf-8"))


VERSIONS = load(CONTAINERS / "versions.yaml")


def services() -> dict[str, dict[str, Any]]:
    """Every service of both files; extensions and anchors are resolved."""
    return {name: s for path in COMPOSE for name, s in load(path)["services"].items()}


def test_every_file_is_looked_at() -> None:
    assert {p.name.removesuffix(".Dockerfile") for p in DOCKERFILES} == set(BASE)
    assert [p.name for p in COMPOSE] == ["compose.serve.yaml", "compose.work.yaml"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_images_and_versions_are_those_of_one_file(path: Path) -> None:
    found = dict(arguments(path))
    assert found.pop("IMAGE") == VERSIONS["images"][BASE[path.name.removesuffix(".Dockerfile")]]
    assert [i.text for i in instructions(path) if i.name == "FROM"] == ["${IMAGE}"]
    known = VERSIONS["brought"] | VERSIONS["installed"]
    stated = {k.removesuffix("_VERSION").lower(): v for k, v in found.items() if "VERSION" in k}
    assert stated == {name: known[name] for name in stated}
    # Nothing that looks like a version stands elsewhere, floors of pip's left out.
    rest = "\n".join(i.text for i in instructions(path) if i.name not in ("ARG", "FROM"))
    assert re.findall(r"\d+\.\d+(?:\.\d+)?", rest) == []


def test_every_version_is_used() -> None:
    texts = "\n".join(p.read_text("utf-8") for p in (*DOCKERFILES, *COMPOSE))
    for image in VERSIONS["images"].values():
        assert image in texts
    used = {k for path in DOCKERFILES for k, _ in arguments(path)}
    for name in VERSIONS["brought"] | VERSIONS["installed"]:
        assert f"{name.upper()}_VERSION" in used


def test_compose_names_no_other_image() -> None:
    built = {f"paretron/{path.name.removesuffix('.Dockerfile')}" for path in DOCKERFILES}
    for name, service in services().items():
        image = service["image"]
        if "build" in service:
            assert image in built, name
            folder = (CONTAINERS / service["build"]["context"]).resolve()
            assert (folder / service["build"]["dockerfile"]).is_file(), name
        else:
            assert image in VERSIONS["images"].values(), name


def test_what_is_installed_is_what_is_tested_here() -> None:
    lines = (TREE / "constraints.txt").read_text("utf-8").splitlines()
    exact = dict(line.split("==") for line in lines if not line.startswith("#"))
    for name, version in VERSIONS["installed"].items():
        assert exact[name.replace("_", "-")] == version


def test_no_version_has_a_known_vulnerability() -> None:
    assert release(VERSIONS["brought"]["vllm"]) >= release(SAFE_FLOORS["vllm"])
    for image in VERSIONS["images"].values():
        assert ":" in image
        assert "latest" not in image
        if "/tritonserver:" in image:
            assert release(image.partition(":")[2].partition("-")[0]) >= (25, 7)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_hadolint_finds_nothing(path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.is_file():
        pytest.skip("hadolint is not installed")
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_hadolint_is_no_formality(tmp_path: Path) -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.is_file():
        pytest.skip("hadolint is not installed")
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM debian:latest\nRUN pip install torch\n")
    done = subprocess.run([hadolint, str(bad)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DL3007" in done.stdout


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.name)
def test_an_image_runs_with_few_rights_and_holds_no_secret(path: Path) -> None:
    found = instructions(path)
    users = [i.text for i in found if i.name == "USER"]
    assert users, "the image would run as root"
    assert users[-1] == "1000:1000"
    assert [i for i in found if i.name == "ADD"] == []  # it may fetch from anywhere
    assert "HEALTHCHECK" in {i.name for i in found}
    # A user without a line in /etc/passwd: caches need a place and a name.
    assert environment(path)["HOME"] == "/tmp"
    assert "USER" in environment(path)
    text = path.read_text("utf-8")
    assert re.search(r"token\b|secret|password|api_?key|\bpickle\b", text, re.IGNORECASE) is None


def test_both_images_of_the_toolkit_send_the_same_files() -> None:
    ignored = [CONTAINERS / f"{n}.Dockerfile.dockerignore" for n in ("cpu", "toolkit")]
    assert ignored[0].read_text() == ignored[1].read_text()
    sent = set(re.findall(r"^!(.+)$", ignored[0].read_text(), re.MULTILINE))
    copied = {
        word
        for i in instructions(CONTAINERS / "cpu.Dockerfile")
        if i.name == "COPY"
        for word in i.text.split()[:-1]
    }
    assert sent == copied
    assert {name for name in copied if not (TREE / name).exists()} == set()


class Strict(BaseModel):
    """A part of a compose file: the keys that Compose's specification has and that we use."""

    model_config = ConfigDict(extra="forbid")


class Build(Strict):
    context: str
    dockerfile: str


class Device(Strict):
    driver: Literal["nvidia"]
    count: Literal["all"]
    capabilities: list[Literal["gpu"]]


class Reservations(Strict):
    devices: list[Device]


class Resources(Strict):
    reservations: Reservations


class Deploy(Strict):
    resources: Resources


class Healthcheck(Strict):
    test: list[str]
    interval: str
    timeout: str
    start_period: str
    retries: int


class Service(Strict):
    image: str
    read_only: Literal[True]
    cap_drop: list[Literal["ALL"]]
    security_opt: list[Literal["no-new-privileges:true"]]
    tmpfs: list[str]
    user: str
    volumes: list[str]
    profiles: list[str]
    build: Build | None = None
    command: list[str] | None = None
    deploy: Deploy | None = None
    entrypoint: list[str] | None = None
    environment: dict[str, str] | None = None
    healthcheck: Healthcheck | None = None
    ipc: Literal["host"] | None = None
    ports: list[str] | None = None
    restart: Literal["unless-stopped"] | None = None
    shm_size: str | None = None
    ulimits: dict[str, int] | None = None
    working_dir: str | None = None


@pytest.mark.parametrize("path", COMPOSE, ids=lambda p: p.name)
def test_a_compose_file_has_known_keys_only(path: Path) -> None:
    content = load(path)
    assert {k for k in content if not k.startswith("x-")} == {"name", "services"}
    for service in content["services"].values():
        Service.model_validate(service)
    with pytest.raises(ValidationError):
        Service.model_validate(service | {"privileged": True})
    with pytest.raises(ValidationError):
        Service.model_validate(service | {"read_only": False})
    # A variable that must be set is asked for whichever service is started, so all use it.
    asked = set(re.findall(r"\$\{(\w+):\?", path.read_text("utf-8")))
    assert len(asked) == 1
    for service in content["services"].values():
        assert any(f"${{{name}:?" in v for name in asked for v in service["volumes"])


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_is_watched_and_local(name: str) -> None:
    service = services()[name]
    assert service["healthcheck"]["test"][-1].endswith("/v2/health/ready', timeout=4)")
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert service["volumes"][0].endswith(":/models:ro")
    # The same check as in the image.
    path = CONTAINERS / service["build"]["dockerfile"]
    (check,) = [i.text for i in instructions(path) if i.name == "HEALTHCHECK"]
    assert service["healthcheck"]["test"][-1] in check


def fake(folder: Path, name: str) -> dict[str, str]:
    """An environment whose `name` prints its arguments, one a line."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def run_sh(tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(CONTAINERS / "run.sh"), *arguments],
        env=fake(tmp_path / "bin", "docker") | env, capture_output=True, text=True, check=False,
        cwd=tmp_path,
    )  # fmt: skip


def test_run_sh_gives_the_usual_flags(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    words = run_sh(tmp_path, "triton-vllm", "served").stdout.split("\n")
    for flag in ("--read-only", "--gpus", "--ipc", "--shm-size=2g", "--ulimit"):
        assert flag in words
    assert words[words.index("--ulimit") + 1] == "memlock=-1"
    assert f"{tmp_path}/served:/models:ro" in words
    assert words[words.index("--publish") + 1].startswith("127.0.0.1:")
    assert words[-2] == "paretron/triton-vllm"
    assert "--gpus" not in run_sh(tmp_path, "triton-vllm", "served", PARETRON_GPUS="none").stdout


def test_run_sh_passes_arguments_and_owner_on(tmp_path: Path) -> None:
    (tmp_path / "a job").mkdir()
    words = run_sh(tmp_path, "cpu", "a job", "run", "recipe.yaml").stdout.split("\n")
    assert words[-4:-1] == ["paretron/cpu", "run", "recipe.yaml"]
    assert f"{tmp_path}/a job:/data" in words
    assert words[words.index("--user") + 1] == f"{os.getuid()}:{os.getgid()}"
    assert "--gpus" not in words


@pytest.mark.parametrize("arguments", [(), ("cpu",), ("gpu", "."), ("cpu", "nowhere")])
def test_run_sh_says_what_it_takes(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run_sh(tmp_path, *arguments)
    assert done.returncode in (1, 2)
    assert done.stdout == ""
    assert "run.sh toolkit|cpu FOLDER" in done.stderr or "nowhere" in done.stderr


def test_serve_trtllm_puts_the_repository_together(tmp_path: Path) -> None:
    exported, release_files = tmp_path / "models/tensorrt_llm", tmp_path / "llmapi"
    (exported / "1").mkdir(parents=True)
    (exported / "config.pbtxt").write_text('name: "tensorrt_llm"')
    (exported / "1/model.yaml").write_text("model: x")
    release_files.mkdir()
    for name in ("model.py", "helpers.py"):
        (release_files / name).write_text(name)
    env = fake(tmp_path / "bin", "tritonserver") | {
        "MODELS": str(tmp_path / "models"), "LLMAPI": str(release_files),
        "TOGETHER": str(tmp_path / "together"),
    }  # fmt: skip
    for _ in range(2):  # a container that is started again finds its old files
        done = subprocess.run(
            [str(CONTAINERS / "serve-trtllm"), "--log-verbose=1"],
            env=env, capture_output=True, text=True, check=True,
        )  # fmt: skip
    assert done.stdout.split() == [
        f"--model-repository={tmp_path}/together", "--model-control-mode=none", "--log-verbose=1",
    ]  # fmt: skip
    made = tmp_path / "together/tensorrt_llm"
    assert sorted(str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()) == [
        "1/helpers.py", "1/model.py", "1/model.yaml", "config.pbtxt",
    ]  # fmt: skip
    shutil.rmtree(tmp_path / "models")
    (tmp_path / "models").mkdir()
    refused = subprocess.run(
        [str(CONTAINERS / "serve-trtllm")], env=env, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "holds no repository" in refused.stderr


def test_scripts_can_be_run() -> None:
    for name in ("run.sh", "serve-trtllm"):
        path = CONTAINERS / name
        assert path.stat().st_mode & stat.S_IXUSR
        assert path.read_text().splitlines()[0] in ("#!/bin/sh", "#!/usr/bin/env bash")
