"""The CPU image without a container engine: its own build steps, then work with few rights.

RUN lines are executed as they stand in a fresh folder, COPY is done as cp, and a virtual
environment stands for the image's Python; it borrows the packages of this one, so nothing is
downloaded. As root the rest is as in a locked container: another user, every file system read-only
but /data, no network. Without root, only what needs none is checked.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from containers.dockerfile import environment, instructions
from paretron.artifacts.manifest import verify
from picorun import write_pico_recipe

TREE = Path(__file__).parents[2]
DOCKERFILE = TREE / "containers/cpu.Dockerfile"
PACKAGES = sysconfig.get_paths()["purelib"]
NOBODY = "65534"
# A container's root is read-only, /data is not, and there is no way out. What is borrowed is
# mounted where everybody may pass.
LOCKED = """
set -e
root="$1" packages="$2"
shift 2
mount --make-rprivate /
mount --bind "$root/data" "$root/data"
mount --bind "$packages" "$root/borrowed"
mount -o remount,bind,ro "$root/borrowed"
mount -o remount,bind,ro /
cd "$root/data"
exec setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs --bounding-set=-all "$@"
"""


# Where nothing may be written, and where nobody answers: the numbers of the errors.
PROBE = """
import os, socket, pathlib
print(os.getuid(), end=" ")
for place in ({own!r}, "/tmp", "/var/tmp"):
    try:
        (pathlib.Path(place) / "probe").write_text("x")
        print("written", place)
    except OSError as error:
        print(error.errno, end=" ")
try:
    socket.create_connection(("192.0.2.1", 80), timeout=2)
    print("connected")
except OSError as error:
    print(error.errno)
"""


@dataclass(frozen=True)
class Image:
    """What was built: the folder that stands for `/`, and the environment of its processes."""

    root: Path
    env: dict[str, str]


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """Build as the Dockerfile says; only absolute paths are moved below a folder."""
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        Path(folder).chmod(0o755)  # another user shall pass
        yield built(Path(folder))


def built(root: Path) -> Image:
    python = root / "python"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(python)], check=True)
    (packages,) = python.glob("lib/python3*/site-packages")
    # A .pth inside of it is not followed, so this tree's own editable installation is not seen.
    borrowed = packages / "borrowed.pth"
    borrowed.write_text(f"{PACKAGES}\n")
    env = {
        "PATH": f"{python}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "HOME": str(root),
    }  # fmt: skip
    here = root
    for step in instructions(DOCKERFILE):
        if step.name == "WORKDIR":
            here = root / step.text.lstrip("/")
            here.mkdir(parents=True, exist_ok=True)
        elif step.name == "COPY":
            copy(step.text.split(), here)
        elif step.name == "RUN":
            done = subprocess.run(
                ["/bin/sh", "-e", "-c", step.text], cwd=here, env=env,
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    borrowed.write_text(f"{root}/borrowed\n")
    (root / "borrowed").mkdir()
    return Image(root, env | moved(environment(DOCKERFILE), root))


def copy(words: list[str], here: Path) -> None:
    """As COPY does: a folder's content into the target, files into the target folder."""
    *sources, target = words
    for source in sources:
        if (TREE / source).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(TREE / source, here / target, ignore=ignored)
        else:
            shutil.copy(TREE / source, here / target)


def moved(env: dict[str, str], root: Path) -> dict[str, str]:
    """The image's environment with its absolute paths below `root`; /tmp is in /data here."""
    to = {"/tmp": f"{root}/data/tmp", "/data": f"{root}/data"}
    out = {}
    for name, value in env.items():
        start = next((path for path in to if value.startswith(path)), None)
        out[name] = to[start] + value.removeprefix(start) if start else value
    return out | {"TMPDIR": f"{root}/data/tmp"}


def test_what_was_built_is_a_copy_of_its_own(image: Image) -> None:
    code = "from importlib.util import find_spec; print(find_spec('paretron').origin)"
    done = subprocess.run(
        ["python", "-c", code], env=image.env, capture_output=True, text=True, check=True, cwd="/"
    )
    assert done.stdout.startswith(f"{image.root}/python/lib")


def test_E13_doctor_and_a_run_with_few_rights(image: Image) -> None:  # noqa: N802
    if os.getuid() != 0 or not can_lock():
        pytest.skip("only root may mount and change the user: the locked part is not checked")
    data = image.root / "data"
    (data / "tmp").mkdir()
    recipe = write_pico_recipe(
        data, correct=None, profile=None, students={"width": {"hidden": 48}}, export=[{"to": "hf"}]
    )
    for path in (data, *data.rglob("*")):
        os.chown(path, int(NOBODY), int(NOBODY))

    doctor = locked(image, "paretron", "doctor", "--json")
    assert doctor.returncode == 0, doctor.stderr
    facts = json.loads(doctor.stdout)
    assert facts["interpreter"].startswith(str(image.root))
    assert facts["below_floor"] == []

    probe = PROBE.format(own=str(image.root / "opt/paretron"))
    # EROFS three times, and ENETUNREACH: there is not even a route.
    assert locked(image, "python", "-c", probe).stdout.split() == [NOBODY, "30", "30", "30", "101"]

    done = locked(image, "paretron", "run", recipe.name, "--out", "made", "--offline")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    verify(data / "made/stages/width.export-hf")


def can_lock() -> bool:
    """Whether this root may make namespaces; one in a container often may not."""
    if shutil.which("unshare") is None or shutil.which("setpriv") is None:
        return False
    return subprocess.run(["unshare", "-n", "-m", "true"], check=False).returncode == 0


def locked(image: Image, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["unshare", "-n", "-m", "/bin/sh", "-c", LOCKED, "sh", str(image.root), PACKAGES, *command],
        env=image.env, capture_output=True, text=True, check=False,
    )  # fmt: skip
