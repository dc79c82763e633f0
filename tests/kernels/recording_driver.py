"""A Triton driver that records instead of launching: the kernels' own host code runs on CPU tensors, each launch is
specialised and compiled for a chip that is not there, and nothing is executed.

    ARCH=90 python -c "
    import recording_driver as r
    import torch
    from dino_fast.kernels import dino_loss as k
    ...call the host functions of the kernels with CPU tensors...
    print(r.LAUNCHES); print({n: [r.resources(c) for c in v] for n, v in r.COMPILED.items()})"

What it shows, and the interpreter and a hand-written signature do not: the specialisation that real arguments get
(an integer equal to 1, divisible by 16 or not, each its own compile), how many compiles a run of changing shapes makes,
whether the launch fits the chip's shared memory, registers and stack of the very kernel that would run, grids and the
number of launches.
Works with Triton 3.6 to 3.9. Import it before the kernels; one chip a process.
"""

import os

import cubin
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCH = int(os.environ.get("ARCH", "90"))
# Bytes of shared memory that one program may have, by compute capability.
SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376}
# Multiprocessors: T4, A100, RTX 3090, RTX 4090, H100 SXM, B200, B300, RTX 5090.
MULTIPROCESSORS = {75: 40, 80: 108, 86: 82, 89: 128, 90: 132, 100: 148, 103: 148, 120: 170}

LAUNCHES: list[tuple[str, tuple[int, int, int], int, int]] = []  # name, grid, warps, shared bytes
COMPILED: dict[str, list] = {}  # name -> compiled kernels, in order


class _Launcher:
    def __init__(self, src, metadata):
        self.metadata = metadata

    def __call__(self, x, y, z, stream, function, *rest):
        LAUNCHES.append((self.metadata.name, (x, y, z), self.metadata.num_warps, self.metadata.shared))


class _Utils:
    def load_binary(self, name, kernel, shared, device):
        return 1, 1, 0, 0, 1024

    def get_device_properties(self, device):
        return {
            "max_shared_mem": SHARED[ARCH], "multiprocessor_count": MULTIPROCESSORS[ARCH],
            "warpSize": 32, "max_num_regs": 65536,
        }  # fmt: skip

    def unload_module(self, module):
        pass


class _Recording:
    utils = _Utils()
    launcher_cls = _Launcher

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", ARCH, 32)

    def get_device_capability(self, device=None):
        return divmod(ARCH, 10)

    def map_python_to_cpp_type(self, name):
        return name

    def get_device_interface(self):
        return torch.cuda

    def get_active_torch_device(self):
        return torch.device("cpu")

    @staticmethod
    def is_active():
        return True


driver.set_active(_Recording())
_compile = JITFunction._do_compile


def _remembered(self, *args, **kwargs):
    kernel = _compile(self, *args, **kwargs)
    COMPILED.setdefault(self.__name__, []).append(kernel)
    return kernel


JITFunction._do_compile = _remembered


def resources(kernel) -> dict[str, int]:
    """Registers and stack bytes of a thread, and shared bytes of a program, of a compiled kernel."""
    return {**cubin.resources(kernel.asm["cubin"]), "shared": kernel.metadata.shared}
