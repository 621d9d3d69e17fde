"""What the audio of a shard is made of, in JSON, so that a later run can tell whether it changed.

That is: of each record a hash of `load` and `metadata` with all their arguments, and the size and
modification time of the files that these name; the code of plug-ins; the versions of libraries.
"""

import hashlib
import io
import os
import pickle
import sys
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import distributions
from pathlib import Path
from types import FunctionType
from typing import Any

import soundfile

from sepdist.data.records import Mixture, Utterance

SAMPLES_VERSION = 1  # raised when sepdist changes the samples of some corpus
LIBRARIES = ("numpy", "scipy", "soxr", "soundfile", "pyloudnorm", "espeakng-loader")


def describe(records: Sequence[Utterance | Mixture], identity: str = "") -> dict[str, Any] | None:
    """Describe the inputs of a shard; None if a `load` cannot be pickled, such as a lambda."""
    stream, made_of = io.BytesIO(), dict[str, Any]()
    pickler = _Pickler(stream, protocol=4)
    try:
        for record in records:
            stream.truncate(stream.seek(0))
            pickler.dump((record.load, getattr(record, "metadata", None)))
            digest = hashlib.sha256(stream.getvalue()).hexdigest()[:16]
            made_of[record.id] = {"hash of load's arguments": digest} | pickler.named_files()
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError):
        return None
    code = {name: _code(name) for name in sorted(pickler.modules)}
    made_of |= {f"module.{name}": digest for name, digest in code.items() if digest}
    made_of |= {"corpus.identity": identity} if identity else {}
    return {"versions": _versions(), "inputs": made_of}


class _Pickler(pickle.Pickler):
    """Notes the files, folders and modules that it meets; equal content gives equal bytes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.modules, self._texts, self._folders = set[str](), list[str](), set[str]()

    def persistent_id(self, value: Any) -> bytes | None:
        """Replace strings and sets by bytes, whatever objects are shared or how they are sorted."""
        if isinstance(value, FunctionType | type):
            self.modules.add(str(value.__module__))
        if isinstance(value, str | Path):
            self._texts.append(os.path.expanduser(value))
            return str(value).encode(errors="backslashreplace")
        unsorted = isinstance(value, set | frozenset)
        return repr(sorted(map(repr, value))).encode() if unsorted else None

    def named_files(self) -> dict[str, list[int]]:
        """Return [bytes, mtime_ns] of files named since the last call, also in known folders."""
        texts, self._texts = list(dict.fromkeys(self._texts)), []
        self._folders |= set(filter(os.path.isdir, texts))
        places = {os.path.join(folder, text) for text in texts for folder in ("", *self._folders)}
        found = [(path, os.stat(path)) for path in sorted(places) if os.path.isfile(path)]
        return {path: [status.st_size, status.st_mtime_ns] for path, status in found}


@lru_cache
def _code(module: str) -> str:
    """Hash the file of a plug-in's module; "" for sepdist and the libraries."""
    path = str(getattr(sys.modules.get(module), "__file__", ""))
    known = {"sepdist", "torch", *LIBRARIES, *sys.stdlib_module_names}
    plugin = module.partition(".")[0] not in known and path.endswith(".py")
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16] if plugin else ""


@lru_cache
def _versions() -> dict[str, str]:
    found = {one.name: one.version for name in LIBRARIES for one in distributions(name=name)}
    return found | {"libsndfile": soundfile.__libsndfile_version__, "sepdist": str(SAMPLES_VERSION)}
