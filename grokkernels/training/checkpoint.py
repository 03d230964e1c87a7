"""Checkpoints: one safetensors file per saved step, complete or absent.

`step-00000300.safetensors` holds everything that the run needs to go on bit for bit: the weights (`model/NAME`), the
optimizer's tensors (`optimizer/NAME/KEY`), torch's random state (`rng`), the tokenizer's file (`tokenizer`), and, as
JSON in the header, the settings, the model's configuration, the step, the time used and a CRC-32 of every tensor.
One file is the unit because one rename can make it appear whole.
"""

from __future__ import annotations

import json
import re
import reprlib
import sys
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import UserError
from .files import open_replacing, parse_json, remove_temporaries

if TYPE_CHECKING:
    import torch

_FORMAT = "grokkernels checkpoint 1"
_KEY = "grokkernels"
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
# What the header must have, and of which kinds; bool counts as none of them.
_FIELDS: dict[str, tuple[tuple[type, ...], str]] = {
    "step": ((int,), "a number of steps"),
    "elapsed": ((int, float), "a number of seconds"),
    "tokenizer": ((str,), "a tokenizer's kind"),
    "data": ((str,), "the name of the text"),
    "settings": ((dict,), "an object"),
    "config": ((dict,), "an object"),
    "optimizer": ((dict,), "an object"),
    "crc32": ((dict,), "an object"),
}
_NAME = re.compile(r"step-(\d{8,})\.safetensors")


@dataclass
class Checkpoint:
    """What one file holds: tensors by name, and a JSON-ready description."""

    tensors: dict[str, torch.Tensor]
    about: dict[str, Any]
    path: Path | None = None

    def part(self, prefix: str) -> dict[str, torch.Tensor]:
        """The tensors whose names start with `prefix/`, without it."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + "/")}


def file_name(step: int) -> str:
    """The name of the checkpoint of `step`."""
    return f"step-{step:08d}.safetensors"


def save(directory: Path, step: int, tensors: dict[str, torch.Tensor], about: dict[str, Any], keep: int = 2) -> Path:
    """Write the checkpoint of `step` into `directory`, then delete all but the newest `keep`.

    Tensors may be on any device; the file does not tell. `about` holds what `load` asks for but step and crc32.
    Whenever the process dies, every file with a checkpoint's name is complete. Call it from one process at a time.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_temporaries(directory)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {**about, "format": _FORMAT, "step": step, "crc32": {name: _crc(t) for name, t in tensors.items()}}
    path = directory / file_name(step)
    with open_replacing(path) as file:
        _write(file, tensors, json.dumps(header))
    for number, other in _all(directory):
        # A later step than this one is left over from a run that is being repeated from an earlier point.
        if number > step:
            other.unlink(missing_ok=True)
    for _, other in sorted(_all(directory))[: -max(keep, 1)]:
        other.unlink(missing_ok=True)
    return path


def latest(directory: Path) -> Path | None:
    """The checkpoint with the highest step in `directory`, None if there is none."""
    found = max(_all(directory), default=None)
    return found[1] if found else None


def resolve(path: str | Path) -> Path:
    """The checkpoint file that `path` means: itself, or the latest in that folder."""
    path = Path(path)
    if path.is_dir():
        found = latest(path)
        if found is None:
            raise UserError(f"there is no checkpoint in {path}: train one with `grokkernels train --out {path}`")
        return found
    if not path.exists():
        raise UserError(f"there is no checkpoint at {path}: give a file or folder that `grokkernels train` wrote")
    return path


def load(path: Path, prefixes: Iterable[str] = ("",)) -> Checkpoint:
    """Read a checkpoint, or only the tensors whose names start with one of `prefixes`, and check every byte of it.

    The header has all its fields, of their kinds; what is inside of settings, config and optimizer is their readers'.
    Tensors are on the CPU.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = _checked(parse_json((file.metadata() or {}).get(_KEY, "null")), path)
            names = [name for name in file.keys() if name.startswith(tuple(prefixes))]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except UserError:
        raise
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{path} is not a complete checkpoint ({error})") from None
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    for name, tensor in tensors.items():
        if about["crc32"].get(name) != _crc(tensor):
            raise UserError(f"{path} is damaged: the checksum of {name} does not match; use an earlier checkpoint")
    return Checkpoint(tensors, about, path)


def _checked(about: Any, path: Path) -> dict[str, Any]:
    if not isinstance(about, dict):
        raise UserError(f"{path} is a safetensors file but not a checkpoint of `grokkernels train`")
    if about.get("format") != _FORMAT:
        found = reprlib.repr(about.get("format"))
        raise UserError(f"{path} has the format {found} and this version of grokkernels reads {_FORMAT!r}")
    for name, (kinds, words) in _FIELDS.items():
        if name not in about:
            raise UserError(f"{path} is not a complete checkpoint (its header has no {name})")
        value = about[name]
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if fits and isinstance(value, (int, float)):
            fits = 0 <= value <= sys.float_info.max
        if not fits:
            raise UserError(
                f"{path} is not a complete checkpoint (its header has {reprlib.repr(value)} where {name}, {words}, "
                f"belongs)"
            )
    return about


def _write(file: IO[bytes], tensors: dict[str, torch.Tensor], about: str) -> None:
    """Write the safetensors format: a length, a JSON header with each tensor's place, then the tensors' bytes.

    The library's own `save_file` goes through a temporary file of its own, under a random name which nobody would
    clean up after a crash, and `save` holds a second copy of everything in memory.
    """
    # Wide elements first, so that each tensor is aligned, as the library writes them.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {_KEY: about}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for name in names:
        file.write(_bytes(tensors[name]))


def _all(directory: Path) -> list[tuple[int, Path]]:
    if not directory.is_dir():
        return []
    return [(int(match[1]), path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]


def _crc(tensor: torch.Tensor) -> int:
    return zlib.crc32(_bytes(tensor))


def _bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    import torch

    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy()) if tensor.numel() else memoryview(b"")
