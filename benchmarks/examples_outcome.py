"""What the examples give when they are run whole: ``python -m benchmarks.examples_outcome``.

Each example runs as its user runs it, in a process of its own on one thread. Those that compare optimizers do so on
several seeds, which set the weights and the order of the batches; the others run once, to see that they succeed and how
long they take. A run is a piece: interrupted, the command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.contest.pieces import parser_of_pieces
from benchmarks.contest.report import lists_on_one_line, measured_with
from benchmarks.paths import ROOT

EXAMPLES = ROOT / "examples"
SEEDS = (0, 1, 2)
#: The examples that compare optimizers, with the metric that is reported: the less, the better.
COMPARISONS: Mapping[str, str] = {
    "deep_autoencoder": "held-out nats",
    "resnet20": "held-out loss",
    "segmentation_unet": "held-out nats",
    "vit_tiny": "held-out loss",
    "language_model": "held-out bits a byte",
    "gan": "Frechet distance",
    "regression": "training error",
}
#: The others, with their arguments.
OTHERS: Mapping[str, Sequence[str]] = {
    "mnist_demo": (),
    "digits_cli": ("fit", "--config", str(EXAMPLES / "digits_cli.yaml")),
    "fabric_loop": (),
    "ddp": (),
    "resume": (),
}

#: By example and seed: wall seconds of the whole process and, of a comparison, what each optimizer's run gave.
Found = dict[str, dict[str, dict[str, Any]]]


def record(example: str, seed: int, path: Path) -> None:
    """Run an example in this process with a seed, and write the histories of the runs that it compares.

    Args:
        example: Its file's name, without ``.py``.
        seed: Of weights and batches.
        path: The JSON file that is written: for each run the validated ``steps``, the ``metrics`` at each, and the
            CPU ``seconds`` of the fit, with its validations.
    """
    sys.path.insert(0, str(EXAMPLES))
    import _shared

    compare = _shared.compare

    def recording(runs: Any, fit: Callable[..., object]) -> Any:
        seconds: list[float] = []

        def timed(*arguments: Any) -> None:
            started = time.process_time()
            fit(*arguments)
            seconds.append(time.process_time() - started)

        histories = compare(runs, timed)
        kept = {
            name: {
                "seconds": round(spent, 2),
                "steps": [step for step, _ in history.rows],
                "metrics": {m: [round(row[m], 5) for _, row in history.rows] for m in history.rows[0][1]},
            }
            for (name, history), spent in zip(histories.items(), seconds, strict=True)
        }
        path.write_text(json.dumps(kept))
        return histories

    _shared.SEED, _shared.compare = seed, recording
    sys.argv = [f"{example}.py"]
    runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")


def measure(example: str, seed: int) -> dict[str, Any]:
    """Run an example whole in a new process.

    Raises:
        RuntimeError: If it fails, with what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        histories = Path(folder) / "histories.json"
        if example in COMPARISONS:
            command = ["-m", "benchmarks.examples_outcome", "--record", example, str(seed), str(histories)]
        else:
            command = [str(EXAMPLES / f"{example}.py"), *OTHERS[example]]
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder,
            env={**environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
        )
        wall = round(time.perf_counter() - started, 1)
        if done.returncode:
            raise RuntimeError(f"{example} with seed {seed} ended with status {done.returncode}:\n{done.stdout}")
        print(done.stdout, flush=True)
        return {"wall": wall, "runs": json.loads(histories.read_text()) if histories.exists() else {}}


def pieces() -> list[tuple[str, int]]:
    """All examples, seed by seed; those that do not compare have one."""
    compared = [(name, seed) for seed in SEEDS for name in COMPARISONS]
    return compared[: len(COMPARISONS)] + [(name, 0) for name in OTHERS] + compared[len(COMPARISONS) :]


def markdown(found: Found) -> str:
    """The compared metric at the first validation, in the middle and at the end; then the seconds of all."""
    names = ["KFC", "SGD", "Adam"]
    seeds = min((len(found[name]) for name in COMPARISONS if name in found), default=0)
    lines = [
        f"Medians of {seeds} seed{'s' * (seeds > 1)}, lowest and highest in parentheses; the best median is bold. "
        "*CPU seconds*: those of the whole run with its validations on one thread, as a multiple of SGD's.",
        "",
        f"| example | what | step | {' | '.join(names)} | CPU seconds: KFC / SGD |",
        "|---|---|---|" + "---|" * (len(names) + 1),
    ]
    for example, metric in COMPARISONS.items():
        runs = [
            list(found[example][str(seed)]["runs"].values()) for seed in SEEDS if str(seed) in found.get(example, {})
        ]
        if not runs:
            continue
        steps = runs[0][0]["steps"]
        ratio = median(of_seed[0]["seconds"] / of_seed[1]["seconds"] for of_seed in runs)
        for moment in (0, len(steps) // 2, len(steps) - 1):
            # A run that diverged counts as the worst there is.
            values = [[_finite(of_seed[i]["metrics"][metric][moment]) for of_seed in runs] for i in range(len(names))]
            best = min(median(own) for own in values)
            cells = [_spread(own, bold=median(own) == best) for own in values]
            last = f"{ratio:.1f}" if moment == len(steps) - 1 else ""
            lines.append(f"| `{example}` | {metric} | {steps[moment]} | {' | '.join(cells)} | {last} |")
    lines += ["", "| example | seconds of the whole command, on one thread |", "|---|---|"]
    for example, of_seeds in found.items():
        lines.append(f"| `{example}` | {median(entry['wall'] for entry in of_seeds.values()):.0f} |")
    return "\n".join(lines)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _spread(values: Sequence[float], bold: bool) -> str:
    middle, lowest, highest = (_number(value) for value in (median(values), min(values), max(values)))
    # A blank and a dash at which no line breaks in a narrow column.
    return f"{f'**{middle}**' if bold else middle}\u00a0({lowest}\u2060\u2013\u2060{highest})"


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "diverged"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, and write the table.

    Returns:
        The exit status: 0 when all is done, 3 when pieces are left.
    """
    parser = parser_of_pieces(__doc__, plots=False)
    parser.add_argument("--again", nargs="+", choices=[*COMPARISONS, *OTHERS], default=(), help="forget these runs")
    parser.add_argument("--record", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.record:
        example, seed, path = options.record
        record(example, int(seed), Path(path))
        return 0
    saved = options.results / "examples.json"
    found: Found = json.loads(saved.read_text())["found"] if saved.exists() else {}
    found = {name: seeds for name, seeds in found.items() if name not in options.again}
    missing = [(name, seed) for name, seed in pieces() if str(seed) not in found.get(name, {})]
    now = missing[: options.pieces]
    for name, seed in now:
        print(f"==> {name}, seed {seed}", flush=True)
        found.setdefault(name, {})[str(seed)] = measure(name, seed)
        ordered = {name: found[name] for name in [*COMPARISONS, *OTHERS] if name in found}
        text = json.dumps({"measured_with": measured_with(), "found": ordered}, indent=1)
        saved.write_text(lists_on_one_line(text) + "\n")
        (options.results / "examples.md").write_text(markdown(ordered) + "\n")
    return 0 if len(now) == len(missing) else 3


if __name__ == "__main__":
    raise SystemExit(main())
