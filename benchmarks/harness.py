"""Times contenders for one operation side by side, after checking that each of them is right.

A benchmark file `bench_<operation>.py` yields comparisons; everything else is done here:

    from .harness import Comparison, Contender, Row, peer, run_all

    def comparisons(quick: bool = False) -> Iterator[Comparison]:
        for K in (4096,) if quick else (4096, 65536):
            x = torch.randn(160, K, requires_grad=True)

            def eager() -> tuple[Tensor, ...]:
                loss = plain_loss(x)
                return loss, *torch.autograd.grad(loss, x)     # what a call returns is what is checked

            yield Comparison(
                operation="dino_loss", shape=f"B16 V10 K{K}", dtype="float32",
                reference=lambda: exact(x.double()),            # tensors in the same order, float64
                floor_bytes=22 * 4 * 16 * K,                    # or floor_flops, or both
                output_bytes=x.nbytes,                          # results that everyone must write: not "extra" memory
                contenders=[
                    Contender("dino-fast", ours, ours=True),
                    Contender("eager", eager, baseline=True),   # its error sets the others' limit
                    peer("lightly", "lightly.loss", make_lightly),  # recorded as absent where it does not import
                ],
            )

    def run(quick: bool = False) -> list[Row]:
        return run_all(comparisons(quick), quick=quick)

    def test_speed(benchmark, contender):                       # conftest.py parametrises it
        benchmark(contender)

Names captured in closures must be bound per comparison (comparisons are run one by one, as the generator yields them,
so plain loop variables are safe). A contender that changes its inputs gives `check=`, a callable that returns the
results of one call from a fresh start, and `prepare=`, which is run untimed before every call.

How it measures. All contenders run in one process, interleaved: each round calls every one once, in rotating order,
and the medians are over rounds. `ratio` is the median over rounds of a contender's time over ours in the same round.
It is refused ("unsteady") where the first and the second half of the rounds, or the two medians' quotient, disagree by
more than AGREE, or where other programs took a share of the processors (`load`): both figures stand in the note.
The floor is the time that `floor_bytes` take at the bandwidth of a copy larger than the cache (bytes read plus
written), or `floor_flops` at the rate of a matrix product, both run in the same rounds; `floor_share` is floor / time.
Ours is timed where its error is at most twice the baseline's plus 1e-6, others up to what rounding alone can cost.
Where an operation's data fit a cache, its share can pass 100 %: the row "floor, same-size copy" is the stricter time
of a copy that moves just `floor_bytes`.
On a GPU the times are CUDA events behind a queue of work, so that launches are not what is measured.

Peak memory. On a GPU, `max_memory_allocated` over what was allocated before the call. On a CPU, the growth of the
process's resident set: freed memory is handed back to the kernel (`malloc_trim`), the high-water mark is reset through
/proc/self/clear_refs and read after one call. That counts PyTorch's and native code's memory alike, to a page (4 KiB);
a buffer that a contender keeps between calls is not counted unless named in `kept_bytes`.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dino_fast.backends import recorded_choices
from dino_fast.errors import UserError

from .load import LIMIT, Load

COPY_BYTES = 512 << 20  # source and target together exceed the largest last-level cache seen, 480 MiB
MATMUL_SIDE = {"cpu": 1536, "cuda": 8192}
# What others may be off by, in 32 and in 16 bits: beyond it they compute something else. Their rounding is their own (a
# float32 sum of 4 million products is off by 1e-4) and stands beside their time.
ROUNDING = (1e-3, 0.1)
UNSTEADY = "unsteady"  # begins the note of a ratio that is refused
AGREE = 1.2  # between figures for one ratio; beyond it there is none
NOT_REACHED = "missing: the part's time was over before it"  # the note of what a deadline leaves out


@dataclass
class Row:
    """One line of a result. `ms`, `ratio` and `floor_share` are None where the contender is absent or wrong.

    `ms` median milliseconds; `peak_bytes` extra memory at the peak of a call; `error` largest difference from the
    float64 reference over the largest reference value, worst over the results; `floor_share` floor over time;
    `ratio` this time over ours (how many times as fast ours is); `allocator` its setting; `note` the reason for what
    is missing; `role` is "ours", "baseline", "floor" or empty. `spread` half the distance between the quartiles of the
    rounds' times, over their median; `halves` the ratio by the first and by the second half of the rounds; `backend`
    what ran of ours; `others` the processors that other programs took meanwhile.
    """

    operation: str
    shape: str
    dtype: str
    contender: str
    ms: float | None = None
    peak_bytes: int | None = None
    error: float | None = None
    floor_share: float | None = None
    ratio: float | None = None
    allocator: str = ""
    note: str = ""
    role: str = ""
    spread: float | None = None
    halves: list[float] | None = None
    backend: str = ""
    others: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Contender:
    """A name and the work to time. `call()` returns a tensor or a sequence of tensors, in the reference's order."""

    name: str
    call: Callable[[], Any]
    ours: bool = False
    baseline: bool = False
    prepare: Callable[[], None] | None = None
    check: Callable[[], Any] | None = None
    peak: Callable[[], int | None] | None = None  # for work in another process, which must measure itself
    kept_bytes: int = 0
    allocator: str = ""  # where it differs from this process's
    backend: str = ""  # for what chooses it elsewhere than in this process
    absent: str = ""  # the reason, for a peer that is not there

    def __call__(self) -> Any:
        if self.prepare:
            self.prepare()
        return self.call()


@dataclass
class Comparison:
    """Contenders for one operation at one shape and dtype; see the module's text for the fields."""

    operation: str
    shape: str
    dtype: str
    contenders: list[Contender]
    reference: Callable[[], Any] | None = None
    floor_bytes: int = 0
    floor_flops: int = 0
    output_bytes: int = 0
    error_limit: float | None = None  # for ours, instead of twice the baseline's error plus 1e-6
    device: str = "cpu"
    seconds: float = 15.0  # time box of the rounds
    floors: dict[str, float] = field(default_factory=dict)  # filled in: measured GB/s and GFLOP/s


def peer(name: str, module: str, make: Callable[[Any], Callable[[], Any]], **options: Any) -> Contender:
    """A contender from another package: `make(module)` builds its call; where the import fails, it is absent."""
    try:
        imported = importlib.import_module(module)
    except ImportError as error:
        return Contender(name, lambda: None, absent=f"not installed ({error})")
    return Contender(name, make(imported), **options)


def keep_freed_memory() -> str:
    """Sets glibc's allocator to keep what is freed, for every contender alike; returns the setting's name."""
    from dino_fast import _C

    return "keeps freed memory" if _C.keep_freed_memory() else "default"


def run_all(
    comparisons: Iterable[Comparison], *, quick: bool = False, allocator: str | None = None, only: str = ""
) -> list[Row]:
    """Runs comparisons one after the other. `quick` shortens the time box to 2 s each; `allocator` names a setting
    already made ("default" to leave glibc as it is); `only` leaves out those whose name does not contain it."""
    setting = allocator or keep_freed_memory()
    rows: list[Row] = []
    left_out: list[str] = []
    for comparison in comparisons:
        name = f"{comparison.operation}, {comparison.shape}, {comparison.dtype}"
        if only not in name:
            left_out.append(name)
            continue
        if quick:
            comparison.seconds = min(comparison.seconds, 2.0)
        rows += compare(comparison, allocator=setting)
    if left_out and not rows:
        raise no_such_row(only, left_out)
    return rows


def no_such_row(only: str, names: Sequence[str]) -> UserError:
    """The error for a part of a name that no comparison has."""
    return UserError(f"--only '{only}' is in no name of these comparisons: " + "; ".join(names))


def compare(comparison: Comparison, *, allocator: str = "") -> list[Row]:
    """Checks, measures memory, then times; returns a row per contender and one per measured floor."""
    rows = {c.name: _row(comparison, c, allocator) for c in comparison.contenders}
    present = [c for c in comparison.contenders if not c.absent]
    right = _check(comparison, present, rows)
    for contender in right:
        rows[contender.name].peak_bytes = _peak(comparison, contender)
    load = Load()
    times, floors = _interleave(comparison, right)
    others = load.others() if comparison.device == "cpu" else None
    floor_ms = _floor(comparison, floors)
    ours = next((c.name for c in right if c.ours), None)
    for contender in right:
        row = rows[contender.name]
        set_times(row, times[contender.name], times[ours] if ours else None, others)
        row.floor_share = floor_ms / row.ms if floor_ms and row.ms else None
    result = list(rows.values())
    if floor_ms:
        mine = rows[ours].ms if ours else None
        note = ", ".join(f"{name} {value:.4g}" for name, value in comparison.floors.items())
        result.append(_floor_row(comparison, "floor", floor_ms, floor_ms, mine, note))
        if "same-size copy" in floors:
            strict = max(floors["same-size copy"], comparison.floors.get("matmul ms", 0.0))
            result.append(_floor_row(comparison, "floor, same-size copy", strict, floor_ms, mine, ""))
    return result


def set_times(row: Row, times: Sequence[float], ours: Sequence[float] | None, others: float | None) -> None:
    """Fills in what the rounds' milliseconds tell: median, spread, and the ratio to ours in the same rounds, or why
    there is none. `others` is what `load` saw of other programs."""
    row.ms = statistics.median(times)
    row.others = others
    if len(times) > 1:
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        row.spread = (high - low) / 2 / row.ms
    if ours is None:
        return
    ratios = [theirs / mine for theirs, mine in zip(times, ours, strict=True)]
    ratio, half = statistics.median(ratios), len(ratios) // 2
    row.halves = [statistics.median(ratios[:half]), statistics.median(ratios[half:])] if half else [ratio]
    figures = [*row.halves, row.ms / statistics.median(ours)]
    reasons = []
    if max(figures) > AGREE * min(figures):
        reasons.append(UNSTEADY + ": {} by the first and second half of the rounds, {} by medians".format(
            " and ".join(f"{value:.3g}x" for value in row.halves), f"{figures[-1]:.3g}x"
        ))  # fmt: skip
    if others is not None and others > LIMIT and row.role != "ours":
        reasons.append(f"{UNSTEADY}: the machine is loaded, other programs took {others:.1f} of its processors; "
                       f"measured {ratio:.3g}x")  # fmt: skip
    row.ratio = None if reasons else ratio
    row.note = "; ".join(filter(None, [row.note, *reasons]))


def _floor_row(comparison: Comparison, name: str, ms: float, floor: float, ours: float | None, note: str) -> Row:
    row = Row(comparison.operation, comparison.shape, comparison.dtype, name, ms=ms, floor_share=floor / ms, note=note)
    row.role = "floor"
    row.ratio = ms / ours if ours else None
    return row


def _row(comparison: Comparison, contender: Contender, allocator: str) -> Row:
    row = Row(comparison.operation, comparison.shape, comparison.dtype, contender.name)
    row.role = "ours" if contender.ours else "baseline" if contender.baseline else ""
    row.allocator = contender.allocator or allocator
    row.note = f"absent: {contender.absent}" if contender.absent else ""
    return row


def _check(comparison: Comparison, contenders: list[Contender], rows: dict[str, Row]) -> list[Contender]:
    """Runs each contender once against the reference; those that are wrong or fail are noted and left out."""
    reference = _tensors(comparison.reference()) if comparison.reference else None
    failed = set()
    for contender in contenders:
        try:
            if contender.check is None and contender.prepare:
                contender.prepare()
            with recorded_choices() as choices:
                got = _tensors((contender.check or contender.call)())
            if contender.ours:
                rows[contender.name].backend = contender.backend or described(choices)
            rows[contender.name].error = relative_error(got, reference) if reference is not None else None
        except Exception as error:
            rows[contender.name].note = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
            failed.add(contender.name)
    limit = comparison.error_limit
    if limit is None:
        base = next((rows[c.name].error for c in contenders if c.baseline), None)
        limit = 2 * (base or 0.0) + 1e-6
    right = []
    for contender in contenders:
        row = rows[contender.name]
        allowed = limit if contender.ours else max(limit, ROUNDING[comparison.dtype in ("bfloat16", "float16")])
        if row.error is not None and not row.error <= allowed:  # NaN is wrong too
            row.note = f"wrong: error {row.error:.2e}, at most {allowed:.2e} is right"
        elif contender.name not in failed:
            right.append(contender)
    return right


def described(choices: dict[str, set[str]]) -> str:
    """Which backends ran, by operation; "PyTorch" is the reference."""
    parts = []
    for operation, names in choices.items():
        told = " and ".join("PyTorch" if name == "reference" else name for name in sorted(names))
        parts.append(told if len(choices) == 1 else f"{operation}: {told}")
    return ", ".join(parts)


def relative_error(got: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    """Largest difference over the largest reference value, worst over the tensors; infinite where shapes disagree."""
    if len(got) != len(reference):
        raise ValueError(f"{len(got)} results, but the reference has {len(reference)}")
    worst = 0.0
    for ours, exact in zip(got, reference, strict=True):
        if ours.shape != exact.shape:
            raise ValueError(f"a result of shape {tuple(ours.shape)}, but the reference has {tuple(exact.shape)}")
        exact = exact.to(torch.float64)
        difference = (ours.detach().to(torch.float64) - exact).abs().max()
        error = float(difference / exact.abs().max().clamp_min(1e-300)) if difference != 0 else 0.0
        worst = error if error != error else max(worst, error)
        if worst != worst:
            return worst
    return worst


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _interleave(comparison: Comparison, contenders: list[Contender]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Rounds of one call each, in rotating order, until the time box is used: at least 5, at most 50."""
    if not contenders:
        return {}, {}
    probes = _floor_probes(comparison)
    order = [*contenders, *probes]
    times: dict[str, list[float]] = {c.name: [] for c in order}
    host_ms = {}
    for contender in order:
        contender()
        host_ms[contender.name] = _host_ms(contender, comparison.device)
    gc.collect()
    gc.disable()
    try:
        end = time.perf_counter() + comparison.seconds
        rounds = 0
        while rounds < 5 or (rounds < 50 and time.perf_counter() < end):
            shift = rounds % len(order)
            for contender in order[shift:] + order[:shift]:
                times[contender.name].append(_time(contender, comparison.device, host_ms[contender.name]))
            rounds += 1
    finally:
        gc.enable()
    floors = {probe.name: statistics.median(times.pop(probe.name)) for probe in probes}
    return times, floors


def _host_ms(contender: Contender, device: str) -> float:
    """Milliseconds that the host takes to queue a call on a GPU; 0 on a CPU."""
    if contender.prepare:
        contender.prepare()
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    contender.call()
    return 0.0 if device == "cpu" else 1e3 * (time.perf_counter() - start)


def queue_cycles(host_ms: float) -> int:
    """Clock cycles, of at most 2 GHz, for which a GPU sleeps while a call's launches queue up behind: twice what the
    host took for them, at least a millisecond and at most a fifth of a second."""
    return int(2e6 * min(max(1.0, 2 * host_ms), 200.0))


def _time(contender: Contender, device: str, host_ms: float) -> float:
    """Milliseconds of one call, whose launches take the host `host_ms`."""
    if contender.prepare:
        contender.prepare()
    if device == "cpu":
        start = time.perf_counter()
        contender.call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(queue_cycles(host_ms))
    begin.record()
    contender.call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def _floor_probes(comparison: Comparison) -> list[Contender]:
    """The copy and the matrix product that the floors are computed from."""
    probes = []
    if comparison.floor_bytes:
        for name, size in (("copy", COPY_BYTES), ("same-size copy", comparison.floor_bytes // 2)):
            source = torch.ones(max(1, size // 4), device=comparison.device)  # touched, so that its pages are real
            probes.append(Contender(name, functools.partial(torch.ones_like(source).copy_, source)))
    if comparison.floor_flops:
        side = MATMUL_SIDE[torch.device(comparison.device).type]
        dtype = getattr(torch, comparison.dtype, torch.float32)
        matrix = torch.randn(side, side, device=comparison.device).to(dtype)
        out = torch.empty_like(matrix)
        probes.append(Contender("matmul", lambda: torch.mm(matrix, matrix, out=out)))
    return probes


def _floor(comparison: Comparison, probes: dict[str, float]) -> float:
    """Milliseconds below which the operation cannot go here, or 0 where no floor was asked for."""
    floor = 0.0
    if "copy" in probes:
        rate = 2 * COPY_BYTES / probes["copy"]  # bytes a millisecond, read plus written
        comparison.floors["copy GB/s"] = rate / 1e6
        floor = max(floor, comparison.floor_bytes / rate)
    if "matmul" in probes:
        rate = 2 * MATMUL_SIDE[torch.device(comparison.device).type] ** 3 / probes["matmul"]
        comparison.floors["matmul GFLOP/s"] = rate / 1e6
        comparison.floors["matmul ms"] = comparison.floor_flops / rate
        floor = max(floor, comparison.floor_flops / rate)
    return floor


def _peak(comparison: Comparison, contender: Contender) -> int | None:
    if contender.peak:
        return contender.peak()
    contender()  # warm: what is allocated once and for all is not the call's
    if contender.prepare:
        contender.prepare()
    grown = (peak_cuda if comparison.device != "cpu" else peak_cpu)(contender.call)
    return None if grown is None else max(0, grown - comparison.output_bytes) + contender.kept_bytes


def peak_cuda(call: Callable[[], Any]) -> int:
    """Bytes of GPU memory that `call` allocates at its peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_cpu(call: Callable[[], Any]) -> int | None:
    """Bytes by which the resident set grows at the peak of `call`; None where the kernel does not tell."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return None
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", text).group(1)) << 10  # type: ignore[union-attr]
