"""Builds and loads _native.c with the system's C compiler: optional, one process-wide library, plain ctypes.

Its absence costs speed, not results. It is compiled once per source, compiler and CPU into a per-user cache
folder. The object is linked without an OpenMP runtime of its own, so that it finds the one torch brought
along: two pools of spinning threads on the same cores would slow each other down. LDMQ_NATIVE=0 turns it off.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..errors import BackendError

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("_native.c")
# no contraction and no -ffast-math: codes must equal affine.quantize's
FLAGS = [
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
    "-fopenmp",
    "-fPIC",
]
BUILD_SECONDS = 120


class Quantizer(ctypes.Structure):
    """The C side's constants of one layer's quantize step; see _native.c."""

    _fields_ = (
        ("pre", ctypes.c_void_p),
        ("reciprocal", ctypes.c_float),
        ("zero", ctypes.c_float),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("columns", ctypes.c_int64),
    )


class NativeStatus(NamedTuple):
    """library: None where torch operators do the work; reason: why, or where it was loaded from."""

    library: ctypes.CDLL | None
    reason: str


@lru_cache(maxsize=1)
def native_status() -> NativeStatus:
    """The compiled quantize step, built on the first call; `cache_clear()` makes the next call look again."""
    if os.environ.get("LDMQ_NATIVE", "1") == "0":
        return _without("LDMQ_NATIVE=0 turns it off")
    try:
        path = _built()
        library = ctypes.CDLL(str(path))
    except (OSError, BackendError) as error:
        return _without(str(error))
    _declare(library)
    return NativeStatus(library, str(path))


def _without(reason: str) -> NativeStatus:
    logger.info("native quantize step: not used (%s); torch operators do the work, more slowly", reason)
    return NativeStatus(None, reason)


def _built() -> Path:
    """Path of the shared object, compiled if the cache has none. Raises BackendError or OSError."""
    words = shlex.split(os.environ.get("CC", "cc"))
    compiler = shutil.which(words[0]) if words else None
    if compiler is None:
        raise BackendError(f"no C compiler: {words[0] if words else 'CC'!r} is not on the path")
    path = _cache_folder() / f"native-{_key([compiler, *words[1:]])}.so"
    if not path.exists():
        _compile([compiler, *words[1:]], path)
    return path


def _cache_folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusers_ldmq"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _key(compiler: list[str]) -> str:
    """Hash of everything that the object file depends on."""
    stat = os.stat(os.path.realpath(compiler[0]))
    parts = [SOURCE.read_bytes(), repr((compiler, FLAGS, stat.st_size, stat.st_mtime_ns)).encode(), _cpu()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:20]


def _cpu() -> bytes:
    """-march=native means another instruction set on another CPU, and home folders travel."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(next((x for x in lines if x.startswith(key)), b"") for key in (b"model name", b"flags"))
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()


def _compile(compiler: list[str], path: Path) -> None:
    """Compile beside the target, then rename: another process sees a whole file or none."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, built = Path(folder) / "native.o", Path(folder) / "native.so"
        _run([*compiler, *FLAGS, "-c", str(SOURCE), "-o", str(made)])
        # linked without -fopenmp and without libraries: all symbols come from what the process holds
        _run([*compiler, "-shared", "-nostdlib", str(made), "-o", str(built)])
        os.replace(built, path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise BackendError(f"the C compiler took more than {BUILD_SECONDS} s") from None
    if done.returncode:
        raise BackendError(f"the C compiler failed: {' '.join(done.stderr.split())[:300]}")


def _declare(library: ctypes.CDLL) -> None:
    pointer, number, count, real = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
    arguments = {
        "ldmq_quantize_rows": (pointer, pointer, number, pointer, count, pointer, count, number),
        "ldmq_quantize_planes": (pointer, pointer, number, pointer, count, count, pointer, number),
        "ldmq_quantize_tokens": (pointer, pointer, number, pointer, count, pointer, real, number),
        "ldmq_absmax": (pointer, number, count, count, pointer, count, number),
        "ldmq_scale_rows": (pointer, pointer, number, count, count, pointer, count, pointer, number),
        "ldmq_dequantize_rows": (pointer, pointer, number, count, count, pointer, count, pointer, number),
        "ldmq_unpack_rows": (pointer, pointer, count, count, count, number),
        "ldmq_unpack_columns": (pointer, pointer, count, count, count, number),
        "ldmq_softmax_codes": (pointer, pointer, pointer, pointer, pointer, count, count, number),
    }
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
