"""What several processes save: wall time of the stages that share documents, from one process to many.

    python -m benchmarks.scaling_cost data/model

Strong scaling: the same documents for every number of processes. Weak scaling: one process with its share of them, which
is as much work for each only where documents divide evenly; other numbers are refused. Rounds take
turns between the numbers, so that a machine busy with other things is busy for all; ratios are medians of the rounds'.
Timed is the work, from the moment all processes have met and loaded the model until all have the result; importing and
loading are reported beside it. On a CPU every process has one thread: more processes than cores show nothing.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.scaling_run import UNIT
from kvcompress.core.artifacts import write_json
from kvcompress.core.errors import InputError, KVCompressError, said_in_a_sentence

app = typer.Typer(add_completion=False)
Folder = Annotated[Path, typer.Argument(help="Folder of a model in safetensors.")]
Tokens = Annotated[int, typer.Option(min=128, help="Tokens of each document.")]
Documents = Annotated[int, typer.Option(help=f"Documents in all, a multiple of {UNIT} for every process.")]


def measured(folder: Path, processes: int, documents: int, tokens: int) -> dict[str, Any]:
    """What one run of fresh processes reports. Raises `KVCompressError` where it fails."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch, "seconds.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "benchmarks.scaling_run", str(folder), str(documents), str(tokens)]
        done = subprocess.run([*command, str(output)], capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise KVCompressError(f"a run of {processes} processes failed: {(said or [done.stderr.strip()[-300:]])[0]}")
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
    return found


@app.command()
def main(
    folder: Folder,
    documents: Documents = 8,
    tokens: Tokens = 512,
    processes: Annotated[int, typer.Option(min=2, help="Compared with one process.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each, in turns.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Also write the results as JSON.")] = None,
) -> None:
    """Seconds of every stage in one process and in several, and what the several save."""
    with said_in_a_sentence():
        share, rest = divmod(documents, processes)
        if rest or share < UNIT or share % UNIT:
            raise InputError(
                f"--documents is {documents}, expected a multiple of {UNIT * processes}: each of {processes} processes gets "
                f"equal work with {UNIT}, {2 * UNIT}, ... documents"
            )
        kinds = {"one": (1, documents), "several": (processes, documents), "share": (1, share)}
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(rounds):
            for kind, (count, many) in kinds.items():
                runs[kind].append(measured(folder, count, many, tokens))
        rows = []
        for stage in runs["one"][0]["seconds"]:  # loading, which every process does, among them
            seconds = {kind: np.array([run["seconds"][stage] for run in found]) for kind, found in runs.items()}
            rows.append(
                {"stage": stage}
                | {f"{kind}_s": round(float(np.median(values)), 2) for kind, values in seconds.items()}
                | {
                    "faster": round(float(np.median(seconds["one"] / seconds["several"])), 2),
                    "weak_efficiency": round(float(np.median(seconds["share"] / seconds["several"])), 2),
                }
            )
        table = Table(title=f"{documents} documents of {tokens} tokens, 1 and {processes} processes")
        for column in rows[0]:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console().print(table)
        if output:
            about = {"model": folder.resolve().name, "cores": os.cpu_count(), "documents": documents, "tokens": tokens}
            about |= {"processes": processes, "documents_of_a_share": share, "rounds": rounds}
            write_json(output, {**about, "environment": runs["one"][0]["environment"], "rows": rows})


if __name__ == "__main__":
    app()
