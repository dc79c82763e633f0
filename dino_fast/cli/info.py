"""`dino-fast info`: versions, devices, the instruction set in use, and which backend each operation would run on."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
from pathlib import Path
from typing import Any

from dino_fast import __version__
from dino_fast.cpus import usable_cpus

LIBRARIES = ("torch", "torchvision", "torchcodec", "triton", "xformers", "numpy", "pillow", "pyarrow", "safetensors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    found = collect()
    print(json.dumps(found, indent=2) if args.json else as_text(found))
    return 0


def collect() -> dict[str, Any]:
    """Everything that `dino-fast info` shows, as plain values."""
    import torch

    from dino_fast.backends import OPERATIONS, native_unavailable_reason

    import dino_fast.ops  # isort: skip

    for module in pkgutil.iter_modules(dino_fast.ops.__path__):
        importlib.import_module(f"dino_fast.ops.{module.name}")

    native: dict[str, Any] = {"missing": native_unavailable_reason()}
    if native["missing"] is None:
        from dino_fast import _C

        native |= {"instruction_set": _C.isa(), "instruction_sets": _C.supported_isas(), "cuda": _C.cuda_version}
    return {
        "dino_fast": __version__,
        "installed_at": str(Path(__file__).parents[1]),
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cpu": {"name": _cpu_name(), "cores": usable_cpus(), "threads": torch.get_num_threads()},
        "gpus": [
            "{}, compute capability {}.{}".format(torch.cuda.get_device_name(i), *torch.cuda.get_device_capability(i))
            for i in range(torch.cuda.device_count())
        ],
        "torch_cuda": torch.version.cuda,
        "native": native,
        "allocator": "training keeps freed memory (glibc mallopt); `--no-keep-freed-memory` leaves it as it is",
        "backend_setting": os.environ.get("DINO_FAST_BACKEND", "auto"),
        "operations": {name: _explain(name) for name in sorted(OPERATIONS)},
    }


def _explain(operation: str) -> dict[str, dict[str, Any]]:
    """For each kind of device, the backend that would run, and for every other why it would not."""
    import torch

    from dino_fast.backends import EXAMPLES, OPERATIONS, PREFERENCES, BackendError, choose

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    result = {}
    for device in devices:
        inputs = EXAMPLES[operation](torch.device(device))
        try:
            chosen, error = choose(operation, *inputs), None
        except BackendError as problem:
            chosen, error = None, str(problem)
        others = {}
        for backend in OPERATIONS[operation]:
            if backend.name != chosen:
                reason = backend.unavailable_reason() or backend.unsupported_reason(*inputs)
                others[backend.name] = reason or error or f"'{chosen}' is faster, or was asked for"
        result[device] = {"chosen": chosen, "others": others}
        if operation in PREFERENCES:
            result[device]["rule"] = PREFERENCES[operation].explain()
    return result


def as_text(found: dict[str, Any]) -> str:
    """The report for people."""
    cpu, native = found["cpu"], found["native"]
    lines = [
        f"dino-fast {found['dino_fast']}, Python {found['python']}, in {found['installed_at']}",
        "libraries: " + ", ".join(f"{name} {version or '(absent)'}" for name, version in found["libraries"].items()),
        f"cpu: {cpu['name']}, {cpu['cores']} cores, torch uses {cpu['threads']} threads",
        "gpu: " + ("; ".join(found["gpus"]) or f"none (torch was built for CUDA {found['torch_cuda']})"),
    ]
    if native["missing"]:
        lines.append(f"native code: absent. {native['missing']}")
    else:
        lines.append(
            f"native code: {native['instruction_set']} in use, of {', '.join(native['instruction_sets'])}; "
            "CUDA kernels "
            + (f"compiled with nvcc {native['cuda']}" if native["cuda"] else "not in this build (no nvcc was found)")
        )
    lines += [f"allocator: {found['allocator']}", f"backends (DINO_FAST_BACKEND: {found['backend_setting']}):"]
    for operation, devices in found["operations"].items():
        for device, choice in devices.items():
            lines.append(f"  {operation} on {device}: {choice['chosen'] or 'none can run'}")
            lines += [f"    rule: {choice['rule']}"] if "rule" in choice else []
            lines += [f"    not {name}: {reason}" for name, reason in choice["others"].items()]
    return "\n".join(lines)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
