"""Check an installation without the sources: modules, entry points, recipes, templates."""

import importlib
import pkgutil
import sys
from importlib import metadata, resources
from pathlib import Path

PACKAGES = ("paretron", "paretron_exporters", "paretron_profiling", "paretron_recipes")
# These need a component that only some installations have, and say so when asked to work.
ENTRY_POINTS = {
    "paretron.exporters": {"hf", "onnx", "gguf", "trtllm", "trtllm_engine", "triton"},
    "paretron.engines": {"ortgenai", "transformers", "vllm", "vllm_server", "trtllm", "openai"},
}


def main(prefix: Path) -> None:
    """Import every module from `prefix`, load every entry point, look at the data files."""
    count = 0
    for name in PACKAGES:
        package = importlib.import_module(name)
        if not Path(str(package.__file__)).is_relative_to(prefix):
            sys.exit(f"{name} comes from {package.__file__}, not from {prefix}")
        for module in pkgutil.walk_packages(package.__path__, name + "."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
                count += 1
    for group, names in ENTRY_POINTS.items():
        found = {e.name: e for e in metadata.entry_points(group=group)}
        if names - set(found):
            sys.exit(f"{group}: {sorted(names - set(found))} are not registered")
        for entry in found.values():
            entry.load()
    recipes = [
        f.name for f in resources.files("paretron_recipes").iterdir() if f.name.endswith("yaml")
    ]
    templates = list((resources.files("paretron_profiling") / "templates").iterdir())
    triton = list((resources.files("paretron_exporters") / "triton_files").iterdir())
    if not recipes or not templates or len(triton) != 3:
        sys.exit(f"data files are missing: {recipes=} {templates=} {triton=}")
    print(f"{count} modules, {len(recipes)} recipes, {len(templates)} templates")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
