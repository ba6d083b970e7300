"""Small damages to a model's folder and to a recipe's text, each drawn from a random generator.

They know the formats: a changed byte seldom gets past the first check, a changed offset does.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

INDEX = "model.safetensors.index.json"
JSON_FILES = (
    "config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json", INDEX,
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**31, 2**63, 2**64 - 1, 2**64, 10**30, -(2**63), 0.0,
    -0.5, 1.5, 1e308, 1e-320, "", "x", "4096", "../x", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J",
    "ä" * 300, "silu", "full_attention", [], [0], [1, 2], [None], ["a"], [[]], [{}], {}, {"a": 1},
    {"rope_type": "llama3"}, {"rope_type": "x", "factor": 0}, [0] * 2, [-1, 2**70],
)  # fmt: skip
ODD_KEYS = (
    "auto_map", "trust_remote_code", "_attn_implementation_internal", "_x", "layer_types", "x",
    "search", "rope_scaling", "rope_parameters", "head_dim", "quantization_config",
    "added_tokens_decoder", "tie_word_embeddings", "sliding_window", "eos_token_id",
    "__metadata__", "", "\ud800",
)  # fmt: skip
ODD_TEXTS = (
    "[" * 5000, '{"a":' * 3000, "1" * 5000, "1e400", "NaN", "-Infinity", "\\u0000", "\ufeff",
    '{"a": 1, "a": 2}', "null", "[]", "0", '"x"', " " * 1000, "",
)  # fmt: skip
ODD_NAMES: tuple[Any, ...] = (
    "../x", "/etc/passwd", "a/../../x", "..\\x", "a\0b", "x" * 5000, "", ".", "..", "a/b", "~", 7,
    None, ["a"], {}, "config.json", "model.safetensors", "\ud800",
    "model-00001-of-00002.safetensors",
)  # fmt: skip
Damage = Callable[[Path, Random], None]


def damage_model(folder: Path, random: Random) -> None:
    """One to three damages to a model's folder."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        try:
            random.choice(MODEL_DAMAGES)(folder, random)
        except (*_NOTHING_LEFT, RecursionError):
            continue  # an earlier damage left nothing here to damage


_NOTHING_LEFT = (ValueError, OSError, LookupError, TypeError, AttributeError, struct.error)


def _read(path: Path) -> bytes:
    """A file's bytes; OSError for a link or a pipe, which an earlier damage may have made."""
    if path.is_symlink() or not path.is_file():
        raise OSError("not a file")
    return path.read_bytes()


def _write(path: Path, content: bytes) -> None:
    """A new file of that name: what a link leads to is never written."""
    path.unlink()
    path.write_bytes(content)


def _bytes(folder: Path, random: Random) -> None:
    path = random.choice(sorted(folder.iterdir()))
    _write(path, _damaged_bytes(_read(path), random))


def _damaged_bytes(content: bytes, random: Random) -> bytes:
    data = bytearray(content)
    start = random.randrange(len(data) + 1)
    if random.random() < 0.5:  # where headers and settings are
        start = min(start, random.randrange(300))
    end = min(len(data), start + random.choice((1, 1, 2, 8, 100)))
    match random.randrange(5):
        case 0:
            data[start:end] = random.randbytes(end - start)
        case 1:
            del data[start:end]
        case 2:
            data[start:start] = data[start:end]
        case 3:
            del data[start:]
        case _:
            data[start:start] = random.choice(ODD_TEXTS).encode("utf-8", "replace")
    return bytes(data)


def _header(folder: Path, random: Random) -> None:
    path = random.choice(sorted(folder.glob("*.safetensors")))
    content = _read(path)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    name = random.choice(sorted(header))
    entry = header[name]
    match random.randrange(8):
        case 0:
            entry["dtype"] = random.choice(("F64", "I32", "BOOL", "F8_E4M3", "F33", "", 1, None))
        case 1:
            entry["shape"] = [random.choice((0, 1, 2, 63, 2**40, -1, 2**70, True))
                              for _ in range(random.randrange(12))]  # fmt: skip
        case 2:
            moved = random.choice((-4, 4, 1, 2**63, -(2**63), 2**64))
            entry["data_offsets"] = [n + moved for n in entry["data_offsets"]]
        case 3:
            entry["data_offsets"][random.randrange(2)] = deepcopy(random.choice(ODD_VALUES))
        case 4:
            header[random.choice(ODD_KEYS) or "lm_head.weight"] = header.pop(name)
        case 5:
            header[name] = deepcopy(random.choice(ODD_VALUES))
        case 6:
            del header[name]
        case _:
            mutate_json(header, random)
    text = json.dumps(header).encode()
    if random.random() < 0.1:
        length = random.choice((0, 1, 7, len(text) - 1, len(text) + 1, 2**31, 2**63, 2**64 - 1))
    else:
        length = len(text)
    _write(path, struct.pack("<Q", length) + text + data)


def _index(folder: Path, random: Random) -> None:
    index = json.loads(_read(folder / INDEX))
    weight_map = index["weight_map"]
    name = random.choice(sorted(weight_map))
    match random.randrange(4):
        case 0:
            weight_map[name] = random.choice(ODD_NAMES)
        case 1:
            del weight_map[name]
        case 2:
            weight_map[random.choice(ODD_KEYS)] = weight_map[name]
        case _:
            index["weight_map"] = dict.fromkeys(weight_map, random.choice(ODD_NAMES))
    _write(folder / INDEX, json.dumps(index).encode())


def _json_value(folder: Path, random: Random) -> None:
    path = folder / random.choice(JSON_FILES)
    content = json.loads(_read(path))
    mutate_json(content, random)
    text = json.dumps(content)
    if random.random() < 0.15:  # what no dump would write
        text = text.replace(": ", f": {random.choice(ODD_TEXTS)}", 1)
    if random.random() < 0.05:
        text = text[:-1] + "," + text[1:]  # every key twice
    _write(path, text.encode("utf-8", "replace"))


def mutate_json(content: Any, random: Random) -> None:
    """Replace, remove or add one value somewhere below."""
    node = content
    while True:
        if isinstance(node, dict):
            if not node or random.random() < 0.15:
                node[random.choice(ODD_KEYS)] = deepcopy(random.choice(ODD_VALUES))
                return
            key: Any = random.choice(list(node))
        elif isinstance(node, list) and node:
            key = random.randrange(len(node))
        else:
            return
        if isinstance(node[key], dict | list) and random.random() < 0.6:
            node = node[key]
            continue
        if random.random() < 0.2:
            del node[key]
        else:
            node[key] = deepcopy(random.choice(ODD_VALUES))
        return


def _file(folder: Path, random: Random) -> None:
    path = random.choice(sorted(folder.iterdir()))
    other = random.choice(sorted(folder.iterdir()))
    outside = folder.parent / "outside"
    match random.randrange(12):
        case 0:
            path.unlink()
        case 1:
            path.unlink()
            path.mkdir()
        case 2:
            path.unlink()
            os.mkfifo(path)
        case 3:
            path.unlink()
            with closing(socket.socket(socket.AF_UNIX)) as end:
                end.bind(os.path.relpath(path))
        case 4:
            shutil.move(path, outside)
            path.symlink_to(outside)
        case 5:
            shutil.move(path, outside)
            os.link(outside, path)
        case 6:
            path.unlink()
            path.symlink_to(
                random.choice(("/dev/zero", "/proc/self/mem", "/nowhere", path.name, "."))
            )
        case 7:
            path.unlink()
            path.symlink_to(other.name)
        case 8:
            _write(path, b"")
        case 9:
            _write(path, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
        case 10:
            with (folder / "model-00007-of-00002.safetensors").open("xb") as f:
                f.write(_read(path))
        case _:
            path.rename(other)


MODEL_DAMAGES: tuple[Damage, ...] = (
    _bytes, _header, _header, _header, _index, _json_value, _json_value, _json_value, _file,
)  # fmt: skip

YAML_TEXTS = (
    "null", "true", "-1", "0", "1e400", ".nan", ".inf", "-.inf", "0x10", "1_000", "''", '"\\0"',
    "!!python/object/apply:os.system [id]", "&a [*a]", "*a", "<<: *a", "{a: {b: {c: 1}}}", "[[[]]]",
    "- 1", "? a : b", "|\n  x", "2024-01-01", "99999999999999999999", "1e-999", "ä", "\ud7ff",
    "${env:HOME}", "hf_" + "a" * 30, "~", "..", "/dev/zero", "~nobody/x", "a\tb", "[1, 2", "}", "%",
)  # fmt: skip


def damage_recipe(text: str, content: Any, random: Random) -> str:
    """One to four damages to a recipe's text or to what it says: a little longer at most."""
    if random.random() < 0.6:
        changed = json.loads(json.dumps(content))
        for _ in range(random.choice((1, 1, 2, 4))):
            mutate_json(changed, random)
        return json.dumps(changed, ensure_ascii=random.random() < 0.5)  # is YAML too
    for _ in range(random.choice((1, 1, 2, 4))):
        lines = text.split("\n")
        row = random.randrange(len(lines))
        match random.randrange(9):
            case 0:
                del lines[row]
            case 1:
                lines.insert(random.randrange(len(lines)), lines[row])
            case 2:
                lines[row] = " " * random.randrange(5) + lines[row].strip()
            case 3 | 4:
                key, colon, _ = lines[row].partition(": ")
                lines[row] = key + (colon or ": ") + random.choice(YAML_TEXTS)
            case 5:
                words = lines[row].replace(":", " : ").split(" ")
                words[random.randrange(len(words))] = random.choice(YAML_TEXTS)
                lines[row] = " ".join(words)
            case 6:
                place = random.randrange(len(lines[row]) + 1)
                odd = chr(random.choice((0, 9, 27, 34, 39, 42, 58, 91, 123, 133, 0x2028, 0xFEFF)))
                lines[row] = lines[row][:place] + odd + lines[row][place:]
            case 7:
                start, end = sorted(random.randrange(len(lines) + 1) for _ in range(2))
                lines[start:end] = lines[start:end][::-1]
            case _:
                deep = random.choice("[{") * random.choice((3, 30, 300))
                lines[row] = lines[row].partition(":")[0] + ": " + deep
        text = "\n".join(lines)
    return text


def odd_override(keys: list[str], random: Random) -> str:
    """A --set argument: a real key or a broken one, with any value."""
    key = random.choice(keys)
    match random.randrange(6):
        case 0:
            key = key[: random.randrange(len(key) + 1)]
        case 1:
            key += "." + random.choice(("0", "x", "99999999999", "", "-1", "²", "__class__"))
        case 2:
            parts = key.split(".")
            parts[random.randrange(len(parts))] = random.choice(("x", "", "0", "__init__", "²"))
            key = ".".join(parts)
        case _:
            pass
    return key + random.choice(("=", "=", "=", "=", "")) + random.choice(YAML_TEXTS)
