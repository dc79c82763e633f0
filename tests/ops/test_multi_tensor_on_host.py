"""The CUDA kernels without a GPU: their block bodies and their tables, compiled for the host and compared with the
reference. What this cannot show (launch geometry, memory ordering between blocks) needs the GPU tests."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dino_fast.ops import multi_tensor
from dino_fast.ops.multi_tensor import cuda as multi_tensor_cuda
from dino_fast.optim import AdamWEMA

ROOT = Path(__file__).parents[2]
CHUNK = 8192
# Either side of a vector, of a block's stride and of a chunk; nothing; several chunks with a remainder.
SIZES = (1, 2, 3, 4, 5, 7, 0, 1023, 1024, 1027, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 6)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


class HostKernels:
    """What `dino_fast._C` offers, over the host library."""

    cuda_multi_tensor_chunk = CHUNK

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.backwards = False
        self.capturing = False
        self.uploads = 0
        library.take_bytes_moved.restype = ctypes.c_uint64
        library.chunk_elements.restype = ctypes.c_int64

    def cuda_multi_tensor_offsets(self, tensors: int, chunks: int) -> tuple[int, ...]:
        out = (ctypes.c_uint64 * 4)()
        self.library.table_offsets(ctypes.c_uint32(tensors), ctypes.c_uint32(chunks), out)
        return tuple(out)

    def cuda_upload(self, address: int, data: bytes, stream: int) -> None:
        assert len(data) % 8 == 0
        self.uploads += 1
        self.library.upload(ctypes.c_uint64(address), data, ctypes.c_uint64(len(data)))

    def cuda_multi_tensor_fill_chunks(self, base: int, tensors: int, chunks: int, stream: int) -> None:
        self.library.fill_chunks(*self._plan(base, tensors, chunks))

    def cuda_multi_tensor_norms(self, base: int, tensors: int, chunks: int, to: int, stream: int) -> None:
        self.library.norms(*self._plan(base, tensors, chunks), ctypes.c_uint64(to), int(self.backwards))

    def cuda_multi_tensor_adamw_ema(self, base, tensors, chunks, multipliers, found_inf, stream) -> None:
        plan = self._plan(base, tensors, chunks)
        self.library.adamw_ema(*plan, ctypes.c_uint64(multipliers), ctypes.c_uint64(found_inf))

    def cuda_multi_tensor_ema_update(self, base: int, tensors: int, chunks: int, found_inf: int, stream: int) -> None:
        self.library.ema_update(*self._plan(base, tensors, chunks), ctypes.c_uint64(found_inf))

    @staticmethod
    def _plan(base: int, tensors: int, chunks: int) -> tuple:
        return ctypes.c_uint64(base), ctypes.c_uint32(tensors), ctypes.c_uint32(chunks)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("host") / "multi_tensor.so"
    source = Path(__file__).with_name("multi_tensor_on_host.cpp")
    # Undefined behaviour (an unaligned vector access, an index past an int) ends the process with a message.
    checks = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan"]
    command = [compiler, "-std=c++17", "-O2", "-Wall", "-Wno-unknown-pragmas", *checks, "-shared", "-fPIC"]
    subprocess.run([*command, f"-I{ROOT / 'csrc'}", str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


@pytest.fixture
def kernels(library, monkeypatch) -> HostKernels:
    host = HostKernels(library)
    library.take_bytes_moved()
    monkeypatch.setattr(multi_tensor_cuda, "_plans", type(multi_tensor_cuda._plans)())
    monkeypatch.setattr(multi_tensor_cuda, "_kernels", lambda: host)
    monkeypatch.setattr(multi_tensor_cuda, "_stream", lambda tensor: 0)
    monkeypatch.setattr(multi_tensor_cuda, "_capturing", lambda tensor: host.capturing)
    return host


def drawn(generator: torch.Generator, size: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> Tensor:
    """Random numbers, `offset` elements behind a 64-byte boundary, NaN on either side."""
    memory = torch.full((size + offset + 16,), torch.nan, dtype=dtype)
    lead = (-memory.data_ptr() // memory.element_size()) % 16 if memory.data_ptr() % 64 else 0
    memory = torch.cat([memory, memory])[lead:]
    tensor = memory[offset : offset + size]
    tensor.copy_(torch.randn(size, generator=generator).to(dtype))
    return tensor


def make_step(seed: int, grad_dtype=torch.float32, offsets=(0,) * 7, copies=True, teacher=True) -> dict:
    generator = torch.Generator().manual_seed(seed)
    n = len(SIZES)
    column = lambda k, dtype=torch.float32: [drawn(generator, size, dtype, offsets[k]) for size in SIZES]  # noqa: E731
    none = torch.empty(0, dtype=torch.bfloat16)
    arguments = {
        "params": column(0),
        "grads": column(1, grad_dtype),
        "exp_avgs": column(2),
        "exp_avg_sqs": [x.abs_() for x in column(3)],
        "steps": [torch.tensor(float(3 * i)) for i in range(n)],
        "teachers": column(4) if teacher else [],
        "param_copies": column(5, torch.bfloat16) if copies else [],
        "teacher_copies": column(6, torch.bfloat16) if copies and teacher else [],
        "multipliers": torch.rand(n, generator=generator),
        "found_inf": torch.zeros(()),
        "lrs": [1e-3 * (1 + i % 2) for i in range(n)],
        "weight_decays": [0.04 * (i % 3) for i in range(n)],
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "momentum": 0.996,
    }
    if copies:
        arguments["param_copies"][3] = none  # of this one no copy is kept
    return arguments


def clone(arguments: dict) -> dict:
    copy = lambda v: v.clone() if isinstance(v, Tensor) else [copy(x) for x in v] if isinstance(v, list) else v  # noqa: E731
    return {name: copy(value) for name, value in arguments.items()}


WRITTEN = ("params", "exp_avgs", "exp_avg_sqs", "steps", "teachers", "param_copies", "teacher_copies")


def assert_step_right(arguments: dict) -> None:
    """The kernels' error against float64 is at most twice the float32 reference's, plus 1e-6 (1 + |reference|)."""
    eager = clone(arguments)
    exact = {
        name: [x.double() if x.dtype == torch.float32 and name != "steps" else x for x in value]
        if isinstance(value, list) and value and isinstance(value[0], Tensor) else value
        for name, value in clone(arguments).items()
    }  # fmt: skip
    multi_tensor.adamw_ema_reference(**eager)
    multi_tensor.adamw_ema_reference(**exact)
    multi_tensor_cuda.adamw_ema(**arguments)
    for name in WRITTEN:
        for i, (ours, theirs, right) in enumerate(zip(arguments[name], eager[name], exact[name], strict=True)):
            error, allowed = (ours.double() - right.double()).abs(), (theirs.double() - right.double()).abs()
            bound = 2 * allowed.amax() + 1e-6 * (1 + right.double().abs()) if right.numel() else allowed
            if ours.dtype == torch.bfloat16:  # a sum that falls beside a tie may round the other way: one place
                bound = bound + right.double().abs() * 2**-8
            assert torch.all(error <= bound), (name, i, SIZES[i])


@pytest.mark.parametrize("grad_dtype", FLOATS)
@pytest.mark.parametrize("offsets", [(0,) * 7, (1,) * 7, (3,) * 7, (0, 1, 2, 3, 1, 2, 3), (0, 0, 0, 0, 0, 0, 1)])
def test_step_equals_the_reference(kernels, grad_dtype, offsets):
    assert_step_right(make_step(1, grad_dtype, offsets))


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("teacher", [False, True])
def test_step_without_teacher_or_copies(kernels, copies, teacher):
    assert_step_right(make_step(2, copies=copies, teacher=teacher))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 1.0])
def test_momentum_at_its_ends(kernels, momentum):
    assert_step_right(make_step(3) | {"momentum": momentum})


def test_an_overflow_keeps_weights_and_moves_the_teacher(kernels):
    arguments = make_step(4) | {"found_inf": torch.ones(())}
    arguments["grads"][-1].fill_(torch.inf)
    before = clone(arguments)
    assert_step_right(arguments)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
        assert all(map(torch.equal, arguments[name], before[name])), name
    assert not torch.equal(arguments["teachers"][-1], before["teachers"][-1])


def test_where_found_inf_is_infinite_nothing_is_written(kernels):
    arguments = make_step(4) | {"found_inf": torch.tensor(torch.inf)}
    arguments["grads"][-1].fill_(torch.nan)
    for copies in ("param_copies", "teacher_copies"):  # already what the step before wrote
        sources = arguments["params" if copies == "param_copies" else "teachers"]
        for copy, source in zip(arguments[copies], sources, strict=True):
            copy.copy_(source[: copy.numel()])
    before = clone(arguments)
    kernels.library.take_bytes_moved()
    assert_step_right(arguments)
    assert kernels.library.take_bytes_moved() == 0
    for name in WRITTEN:
        assert all(map(torch.equal, arguments[name], before[name])), name
    for value, moves in ((torch.inf, False), (1.0, True), (0.0, True)):
        teachers = [t.clone() for t in before["teachers"]]
        found_inf = torch.tensor(value)
        multi_tensor_cuda.ema_update(teachers, before["params"], 0.9, [], found_inf)
        assert any(not torch.equal(t, b) for t, b in zip(teachers, before["teachers"], strict=True)) == moves


@pytest.mark.parametrize("clip", [{}, {"clip_grad": 0.5}, {"clip_grad": 0.5, "clip_mode": "global"}])
def test_a_grad_scaler_s_numbers_stay_tensors_all_the_way(kernels, monkeypatch, clip):
    """The whole optimizer over the CUDA code: `grad_scale` divides, `found_inf` keeps the weights, nothing is read."""
    for table, name in (("_EMA_UPDATE", "ema_update"), ("_GRAD_NORMS", "grad_norms"), ("_ADAMW_EMA", "adamw_ema")):
        monkeypatch.setitem(getattr(multi_tensor, table), "native", getattr(multi_tensor_cuda, name))
    generator = torch.Generator().manual_seed(12)
    drawn_once = [torch.randn(n, generator=generator) for n in (5, 0, 8193, 40)]
    made = []
    for scale in (1.0, 1024.0):
        params = [torch.nn.Parameter(x.clone()) for x in drawn_once]
        teacher = [x.clone() for x in drawn_once]
        optimizer = AdamWEMA(params, teacher, lr=1e-2, **clip)
        for step, overflow in enumerate((0.0, 1.0, 0.0)):
            for p in params:
                p.grad = scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            if overflow:
                before = [p.detach().clone() for p in params]
                params[-1].grad[0] = torch.inf
            optimizer.found_inf = torch.tensor(overflow)
            if scale != 1.0:
                optimizer.grad_scale = torch.tensor(scale)
            with monkeypatch.context() as reading:
                reading.setattr(Tensor, "item", lambda tensor: pytest.fail("the host looked at a tensor"))
                optimizer.step(momentum=0.9)
            if overflow:
                assert all(map(torch.equal, [p.detach() for p in params], before))
                assert not torch.equal(teacher[-1], params[-1])
        made.append([*(p.detach() for p in params), *teacher])
    for unscaled, scaled in zip(*made, strict=True):
        torch.testing.assert_close(scaled, unscaled, rtol=1e-6, atol=1e-7)


def test_nothing_beside_the_tensors_is_written(kernels):
    arguments = make_step(5, offsets=(1, 2, 3, 1, 2, 3, 1))
    memories = [x._base for name in WRITTEN for x in arguments[name] if x._base is not None]
    known = [torch.isnan(m).sum() for m in memories]
    multi_tensor_cuda.adamw_ema(**arguments)
    assert all(torch.isnan(m).sum() == k for m, k in zip(memories, known, strict=True))


@pytest.mark.parametrize("student_dtype", FLOATS)
@pytest.mark.parametrize("teacher_dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 2])
def test_ema_equals_the_reference(kernels, student_dtype, teacher_dtype, offset):
    generator = torch.Generator().manual_seed(6)
    student = [drawn(generator, size, student_dtype) for size in SIZES]
    teacher = [drawn(generator, size, teacher_dtype, offset) for size in SIZES]
    copies = [torch.full((size,), torch.nan, dtype=torch.bfloat16) for size in SIZES]
    expected, expected_copies = [t.clone() for t in teacher], [c.clone() for c in copies]
    multi_tensor.ema_update_reference(expected, student, 0.9, expected_copies)
    multi_tensor_cuda.ema_update(teacher, student, 0.9, copies)
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[teacher_dtype]
    for t, e, c in zip(teacher, expected, copies, strict=True):
        torch.testing.assert_close(t, e, rtol=rtol, atol=1e-6)
        # The copy is the float32 result rounded once, the reference's of a 16-bit teacher rounded twice.
        torch.testing.assert_close(c.float(), e.float(), rtol=2**-8 + rtol, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [0, 1])
def test_norms_equal_the_reference_whichever_block_comes_last(kernels, dtype, offset):
    generator = torch.Generator().manual_seed(7)
    grads = [drawn(generator, size, dtype, offset) for size in (*SIZES, 300 * CHUNK + 5)]
    norms = multi_tensor_cuda.grad_norms(grads)
    exact = multi_tensor.grad_norms_reference([g.double() for g in grads])
    torch.testing.assert_close(norms.double(), exact, rtol=1e-6, atol=0)
    kernels.backwards = True
    assert torch.equal(multi_tensor_cuda.grad_norms(grads), norms)
    grads[3][0] = torch.inf
    grads[4][0] = torch.nan
    norms = multi_tensor_cuda.grad_norms(grads)
    assert norms[3] == torch.inf and norms[4].isnan() and torch.isfinite(norms[5:]).all()


def test_tables_are_written_again_only_when_they_change(kernels):
    arguments = make_step(8)
    multi_tensor_cuda.adamw_ema(**arguments)
    first = kernels.uploads
    multi_tensor_cuda.adamw_ema(**arguments)
    assert kernels.uploads == first
    multi_tensor_cuda.adamw_ema(**arguments | {"momentum": 0.5})
    assert kernels.uploads == first + 1
    assert_step_right(arguments | {"grads": [g.clone() for g in arguments["grads"]]})
    assert_step_right(arguments | {"lrs": [0.1] * len(SIZES)})
    assert len(multi_tensor_cuda._plans) == 1


def test_a_captured_step_sees_hyper_parameters_written_between_replays(kernels):
    """A graph is the list of its kernel calls; replaying is calling them again."""
    arguments = make_step(9)
    multi_tensor_cuda.adamw_ema(**arguments)  # the tables
    calls = []
    launch, kernels.cuda_multi_tensor_adamw_ema = kernels.cuda_multi_tensor_adamw_ema, lambda *a: calls.append(a)
    kernels.capturing = True
    multi_tensor_cuda.adamw_ema(**arguments | {"momentum": 0.1})  # recorded, its momentum is not
    kernels.capturing = False
    (call,) = calls
    for momentum in (0.25, 0.75):
        changed = arguments | {"momentum": momentum, "lrs": [momentum] * len(SIZES)}
        expected = clone(changed)
        multi_tensor.adamw_ema_reference(**expected)
        with multi_tensor_cuda.writing_hyper_only():
            multi_tensor_cuda.adamw_ema(**changed)
        assert len(calls) == 1
        launch(*call)
        for ours, theirs in zip(arguments["teachers"], expected["teachers"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_capture_without_a_step_before_it_says_what_to_do(kernels):
    kernels.capturing = True
    with pytest.raises(RuntimeError, match="run one step"):
        multi_tensor_cuda.adamw_ema(**make_step(10))


def test_plans_that_are_not_used_are_dropped(kernels):
    for _ in range(multi_tensor_cuda.MAX_PLANS + 5):
        student = [torch.ones(5)]
        multi_tensor_cuda.ema_update([torch.zeros(5)], student, 0.5, [])
    assert len(multi_tensor_cuda._plans) <= multi_tensor_cuda.MAX_PLANS


@pytest.mark.parametrize("grad_dtype", FLOATS)
def test_bytes_moved_are_those_of_the_formula(kernels, grad_dtype):
    arguments = make_step(11, grad_dtype)
    arguments["param_copies"] = [torch.empty_like(p, dtype=torch.bfloat16) for p in arguments["params"]]
    elements, size = sum(SIZES), grad_dtype.itemsize
    multi_tensor_cuda.adamw_ema(**arguments)
    assert kernels.library.take_bytes_moved() == elements * (size + 24 + 8 + 2 + 2)
    multi_tensor_cuda.adamw_ema(**arguments | {"found_inf": torch.ones(())})
    assert kernels.library.take_bytes_moved() == elements * (4 + 8 + 2 + 2)
    multi_tensor_cuda.grad_norms(arguments["grads"])
    assert kernels.library.take_bytes_moved() == elements * size
    multi_tensor_cuda.ema_update(arguments["teachers"], arguments["grads"], 0.9, [])
    assert kernels.library.take_bytes_moved() == elements * (size + 8)


def test_the_chunk_is_the_kernels(kernels):
    assert kernels.library.chunk_elements() == CHUNK
