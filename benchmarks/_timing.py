"""Timing shared by the programs of this folder: contenders in turns, device clocks, memory peaks, one table, one JSON line.

A busy machine slows all contenders of a round alike, so ratios are medians of the rounds' ratios (`times_faster` of
`kvcompress.evaluation.timing`). GPU clocks are left as they are: `machine` records the current one, because times of two
runs compare only at equal clocks.
"""

import json
import multiprocessing
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import InputError
from kvcompress.evaluation.timing import timed

Result = TypeVar("Result")


def in_turns(acts: Mapping[str, Callable[[], Result]], rounds: int, warm_up: int = 2) -> dict[str, list[Result]]:
    """Call every act once a round, in alternating order, and collect the results of `rounds` rounds after `warm_up`."""
    found: dict[str, list[Result]] = {name: [] for name in acts}
    for turn in range(rounds + warm_up):
        for name in list(acts) if turn % 2 else reversed(list(acts)):
            result = acts[name]()
            if turn >= warm_up:
                found[name].append(result)
    return found


def capture(acts: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], None]:
    """Return the replay of a CUDA graph of all acts in order; on a CPU, a plain call of all acts.

    Every act runs once before the capture, to compile and allocate.
    """

    def run() -> None:
        for act in acts:
            act()

    run()
    if device.type != "cuda":
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replay: Callable[[], None] = graph.replay
    return replay


def device_clock(acts: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Median microseconds of each act, in turns: CUDA events with a cold L2 cache, or the host's clock on a CPU."""
    other = torch.zeros(2**26 if device.type == "cuda" else 1, device=device)
    top = torch.zeros((), device=device)

    def microseconds(act: Callable[[], Any]) -> float:
        if device.type != "cuda":
            return 1000 * timed(act, [device])[1]
        torch.amax(other, dim=0, out=top)  # fills L2 by reading, so that nothing is left to write back
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        act()
        end.record()
        end.synchronize()
        return float(1000 * start.elapsed_time(end))

    bound = {name: partial(microseconds, act) for name, act in acts.items()}
    return {name: median(found) for name, found in in_turns(bound, rounds, warm_up=3).items()}


def device_copy_bandwidth(rounds: int, device: torch.device) -> float:
    """Bytes a microsecond, read and written, of a copy on the device, by `device_clock`."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / device_clock({"copy": lambda: target.copy_(source)}, rounds, device)["copy"]


def peak_above(act: Callable[[], Any], device: torch.device) -> int:
    """Peak bytes of an act above those in use before it: of the CUDA allocator, or of this process (Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        act()
        return int(torch.cuda.max_memory_allocated(device) - before)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before = resident_bytes("VmRSS")
    act()
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    """`VmRSS`, the resident set of this process in bytes, or `VmHWM`, its peak (Linux)."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def in_fresh_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function of a module in a new process, whose memory holds nothing else."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def device_of(name: str) -> torch.device:
    """The device of this name. Raises `InputError` for `cuda` without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device is cuda, but this machine has no CUDA device: pass --device cpu --tiny to try it")
    return torch.device("cuda", torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def machine(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Device, clock, precision and versions, recorded with every result."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "gpu_clock": gpu_clock() if cuda else None,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def gpu_clock() -> str | None:
    """Current and highest clock of the multiprocessors, as nvidia-smi prints them; None without nvidia-smi."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one table of rows that have the same fields; fields that hold several numbers are left out."""
    fields = [name for name, value in rows[0].items() if not isinstance(value, Mapping)]
    table = Table(*(name.replace("_", " ") for name in fields), title=title)
    for row in rows:
        cells = (
            "–" if value is None else f"{value:,.4g}" if isinstance(value, float) else str(value)
            for value in map(row.get, fields)
        )
        table.add_row(*cells)
    Console(width=160).print(table)


def publish(result: Mapping[str, Any], output: Path | None) -> None:
    """Print a result as one JSON line, the last line of the output, and write it to `output` if given."""
    typer.echo(json.dumps(result))
    if output is not None:
        write_json(output, result)
