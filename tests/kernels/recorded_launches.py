"""Launches on a chip that is not there: ARCH=86 python tests/kernels/recorded_launches.py prints, for each kernel, its
registers, stack and shared memory, as JSON. A process of its own: the driver that records serves one chip."""

from __future__ import annotations

import json

import recording_driver as recorder
import torch

from dino_fast import gpu

gpu.INTERPRETED = gpu.Chip(
    divmod(recorder.ARCH, 10), recorder.SHARED[recorder.ARCH], recorder.MULTIPROCESSORS[recorder.ARCH]
)

from dino_fast.kernels import dino_loss, packed_attention  # noqa: E402


def main() -> None:
    V, B, K = 10, 4, 4096
    student, teacher, center = torch.zeros(V, B, K), torch.zeros(2, B, K), torch.zeros(K)
    statistics = torch.zeros(2, V + 2, B)
    dino_loss.statistics(student, teacher, center, 0.1, 0.04, statistics)
    dino_loss.gradient(student, teacher, center, statistics, torch.ones(()), student, 0.1, 0.04)
    tokens, H, d = 197, 2, 128  # the widest heads, and as many tokens as stay on chip where they fit
    qkv, ends = torch.zeros(tokens, 3, H, d, dtype=torch.bfloat16), torch.tensor([0, tokens], dtype=torch.int32)
    out, rows = torch.zeros(tokens, H, d, dtype=torch.bfloat16), torch.zeros(H, tokens)
    packed_attention.forward(qkv, ends, tokens, out, rows, rows)
    packed_attention.backward(out, qkv, ends, tokens, out, rows, rows, qkv)
    uses = {name: [recorder.resources(kernel) for kernel in kernels] for name, kernels in recorder.COMPILED.items()}
    print(json.dumps({"launches": len(recorder.LAUNCHES), "limit": recorder.SHARED[recorder.ARCH], "uses": uses}))


if __name__ == "__main__":
    main()
