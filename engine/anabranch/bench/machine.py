"""What a table of times must say about the machine it was made on."""

import os
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

VECTOR_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")
PACKAGES = ("anabranch", "torch", "transformers", "llama-cpp-python", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """One machine and the software on it; `versions` holds (package, version) of what is installed."""

    cpu: str
    vector_flags: tuple[str, ...]
    cores: int
    threads: int
    last_cache_bytes: int
    memory_bytes: int
    system: str
    python: str
    versions: tuple[tuple[str, str], ...]

    def sentence(self) -> str:
        """The description in one line, for people."""
        packages = ", ".join(f"{name} {number}" for name, number in self.versions)
        return (
            f"{self.cpu}, {self.cores} cores ({', '.join(self.vector_flags) or 'no vector flags known'}), "
            f"{self.threads} threads, last cache {self.last_cache_bytes / 2**20:.0f} MiB, "
            f"memory {self.memory_bytes / 2**30:.0f} GiB, {self.system}, Python {self.python}, {packages}"
        )


def describe() -> Machine:
    """This machine, with the number of threads that torch and our kernels use at the moment."""
    cpuinfo = _lines("/proc/cpuinfo")
    flags = set(_field(cpuinfo, "flags", "Features").split())
    memory_kib = _field(_lines("/proc/meminfo"), "MemTotal").split()
    return Machine(
        cpu=_field(cpuinfo, "model name", "CPU part") or platform.processor() or platform.machine(),
        vector_flags=tuple(flag for flag in VECTOR_FLAGS if flag in flags),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        last_cache_bytes=last_cache_bytes(),
        memory_bytes=int(memory_kib[0]) * 1024 if memory_kib else 0,
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        versions=tuple((name, number) for name in PACKAGES if (number := _version(name))),
    )


def last_cache_bytes() -> int:
    """Size of the largest CPU cache, 0 where the system does not tell."""
    sizes = [_lines(str(path)) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(lines[0].removesuffix("K")) * 1024 for lines in sizes if lines), default=0)


def working_set_bytes() -> int:
    """Bytes one step must touch so that nothing is still in a cache when its turn comes again."""
    return max(288 * 2**20, 2 * last_cache_bytes())


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _field(lines: list[str], *names: str) -> str:
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
