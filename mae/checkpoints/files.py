"""What a file is, by its bytes; what torch.save or safetensors wrote is read, and nothing in it is run."""

import argparse
import codecs
import contextlib
import datetime
import pathlib
import re
import sys
import types
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from mae.checkpoints.layouts import CheckpointError

# What the first bytes of a file say that is none of ours.
_SIGNATURES = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; git lfs pull fetches it",
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a rar archive; unpack it",
    b"\x89HDF": "an HDF5 file, which is not read",
    b"\x93NUMPY": "a NumPy array, not a state dict",
    b"GGUF": "a GGUF file, which is not read",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF document",
}
_ZIP, _LEGACY = b"PK\x03\x04", b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # as torch.save begins, now and before 1.6


def read_file(file: Path) -> Any:
    """What ``torch.save`` or safetensors wrote, on the CPU.

    Of classes, a pickle may hold those that a command line or a record of training holds, and that cannot run code.

    Raises:
        CheckpointError: what the file is, and what would help.
    """
    try:
        with file.open("rb") as opened:
            head = opened.read(1024)
        if kind := _other_kind(head):
            raise CheckpointError(f"it is {kind}")
        if _is_safetensors(head):
            return load_file(file)
        if head.startswith(_ZIP):
            _check_zip(file)
        return _unpickled(file)
    except CheckpointError as error:
        raise CheckpointError(f"{file} is not a readable checkpoint: {error}") from error
    except Exception as error:  # damaged files raise anything from EOFError to IndexError
        raise CheckpointError(f"{file} is not a readable checkpoint: {_reason(file, error)}") from error


def _is_safetensors(head: bytes) -> bool:
    """Whether it begins with the length of a JSON header, and that header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def _other_kind(head: bytes) -> str | None:
    """What the first bytes of a file say that is neither safetensors nor, as far as they tell, of torch.save."""
    if not head:
        return "empty; copy or download it again"
    if _is_safetensors(head) or head.startswith(_ZIP) or _LEGACY in head[:64]:
        return None
    if head.startswith(b"\x80"):
        return "a pickle that torch.save did not write; load it as it was saved, and write it with torch.save"
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    for signature, kind in _SIGNATURES.items():
        if head.startswith(signature):
            return kind
    return _kind_of_text(head) or f"of no format known here, its first bytes are {head[:8].hex(' ')}"


def _kind_of_text(head: bytes) -> str | None:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head).lstrip("\ufeff\0 \r\n\t")
    except UnicodeDecodeError:
        return None
    if not text:
        return "nothing but zeros or blanks; copy or download it again"
    if not all(x.isprintable() or x.isspace() for x in text):
        return None
    if re.search(r"<(!doctype html|html|head|body)\b", text, re.IGNORECASE):
        return "a web page (HTML), not the file itself; download the file that the page links to"
    kind = {"<": "an XML text", "{": "a JSON text", "[": "a JSON text"}.get(text[0], "a text")
    return f"{kind} that begins {shorten(text.splitlines()[0], 40)!r}"


def _unpickled(file: Path) -> Any:
    # Given a path, torch.load would go by the end of its name.
    with _harmless_allowed(), warnings.catch_warnings(), file.open("rb") as opened:
        warnings.simplefilter("ignore")  # about protocols and old storages, which end in an error or in nothing
        return torch.load(opened, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _harmless_allowed() -> Iterator[None]:
    known = torch.serialization.get_safe_globals()  # leaving the context would take those of the user away too
    with torch.serialization.safe_globals([x for x in _harmless() if x not in known]):
        yield


def _check_zip(file: Path) -> None:
    try:
        names = zipfile.ZipFile(file).namelist()
    except zipfile.BadZipFile:
        raise CheckpointError("it is cut short; copy or download it again") from None
    if any(name.endswith("/constants.pkl") for name in names):
        raise CheckpointError(
            "it is a TorchScript program; this line saves its weights: "
            f"import torch; torch.save(torch.jit.load({str(file)!r}).state_dict(), 'weights.pth')"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise CheckpointError(f"it is a zip archive of {listed(names, 4) or 'nothing'}; unpack it")


def _harmless() -> list[Any]:
    """What a command line or a record of training holds, none of which can run code; names are those in pickles."""
    pure = {"Posix": pathlib.PurePosixPath, "Windows": pathlib.PureWindowsPath}  # either system reads both
    paths = [
        (kind, f"{module}.{name}")
        for module in ("pathlib", "pathlib._local")
        for system, kind in pure.items()
        for name in (f"{system}Path", f"Pure{system}Path")
    ]
    functions: list[Any] = [np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]]
    arrays = [
        (function, f"numpy.{core}.multiarray.{function.__name__}")
        for core in ("core", "_core")
        for function in functions
    ]
    dtypes = [type(np.dtype(code)) for code in np.typecodes["All"] if code != "O"]
    dates = [datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone]
    # PyTorch fills no defaultdict, so it becomes a plain dictionary.
    defaults = [(lambda *_: {}, "collections.defaultdict"), dict, list, int, float]
    others = [
        argparse.Namespace,
        types.SimpleNamespace,
        OrderedDict,
        range,
        frozenset,
        torch.torch_version.TorchVersion,
    ]
    return [*paths, *arrays, np.dtype, np.ndarray, *dtypes, *dates, *defaults, *others]


def _reason(file: Path, error: Exception) -> str:
    """Why a file cannot be read, in our words: those of PyTorch advise to run whatever the file says."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    if isinstance(error, OSError):
        return error.strerror or text
    if needed := re.search(r"GLOBAL (\S+)|got <class '([^']+)'>|function <\S+ (\S+)", text):
        return _about_class(file, next(x for x in needed.groups() if x))
    if needed := re.search(r"``([\w.]+)``.* must be imported", text):
        return f"its weights are no plain tensors but those of {needed[1]}; gather them before they are saved"
    if (operand := re.search(r"Unsupported operand (\d+)", text)) and int(operand[1]) in _LATER_OPERANDS:
        return "its pickle_protocol is later than the one that torch.save takes by itself; write it without that option"
    if not isinstance(error, RuntimeError) or re.search("PytorchStreamReader|EOF", text):
        return "it is cut short or damaged; copy or download it again"
    lines = [line.strip() for line in text.splitlines() if line.strip() and "weights_only" not in line]
    return shorten(lines[0], 200) if lines else type(error).__name__


_LATER_OPERANDS = {*b"BC", *range(0x8C, 0x99)}  # of protocols 3 to 5
_SAVES = "torch.save(model.state_dict(), 'weights.pth')"


def _about_class(file: Path, name: str) -> str:
    """What a pickle wants to be run, and a line that gets at its weights; none that would run what it may not."""
    try:
        allowed_by_hand = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        with _harmless_allowed():
            unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file) or [name]
    except Exception:  # a file from before torch 1.6 names one at a time
        allowed_by_hand = unknown = [name]
    if any(x.startswith("torch.nn.") for x in unknown):
        parts = listed(sorted(unknown), 3)
        return f"it holds a whole model ({parts}); where its code is, this line saves the weights: {_SAVES}"
    if untrusted := sorted(x for x in unknown if not _is_foreign_class(x)):
        return f"it calls {listed(untrusted)}, which no weights need; have the weights alone saved by {_SAVES}"
    names = sorted(allowed_by_hand)
    modules = {"torch", *(x.rpartition(".")[0] for x in names)}
    if any(x.startswith("numpy.") for x in names):  # no pickle names the classes of the dtypes that it needs
        modules.add("numpy")
        names.append("*{type(numpy.dtype(x)) for x in numpy.typecodes['All']}")
    return (
        f"it needs the class {listed(sorted(unknown))}, and a class is never taken from a file. Where you trust it and "
        f"have that class, this line keeps the weights: import {', '.join(sorted(modules))}; "
        f"torch.serialization.add_safe_globals([{', '.join(names)}]); "
        f"torch.save({{k: x for k, x in torch.load({str(file)!r}, map_location='cpu').items() "
        "if type(x).__name__ in ('dict', 'OrderedDict', 'Tensor', 'Parameter')}, 'weights.pth')"
    )


def _is_foreign_class(name: str) -> bool:
    """Neither a function, by its name, nor one of those of Python's own classes that open files and start programs."""
    module, _, last = name.rpartition(".")
    package = module.partition(".")[0]
    return last[:1].isupper() and (package in ("__main__", "enum", "typing") or package not in _PYTHONS_OWN)


_PYTHONS_OWN = {"", "builtins", *sys.stdlib_module_names}


def listed(names: Iterable[str], most: int = 8) -> str:
    """``"a, b and 3 more"``."""
    names = [shorten(name) for name in names]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shorten(value: Any, most: int = 60) -> str:
    """One printable line of at most so many characters, for a sentence to the user."""
    text = "".join(x if x.isprintable() else " " for x in str(value)[: 2 * most])
    return text if len(text) <= most else f"{text[:most]}..."
