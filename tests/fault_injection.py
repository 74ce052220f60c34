"""Kill runs at random moments, resume each, and compare the result with an undisturbed run.

    python tests/fault_injection.py --kills 20 --seed 1

prints a Markdown table. A run is killed with SIGKILL during training, while it writes a checkpoint, or during start-up,
and resumed with `gptlit fit --ckpt_path RUN`; some runs are killed again after that. At the end the weights, the whole
optimizer state, best.ckpt and every metric except the speed must equal the undisturbed run's bit by bit.
"""

import argparse
import csv
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from command import digest, load, start, write_config

MAX_STEPS = 300
VARIANTS = {
    "Muon, dropout, noise, average": {"model__gpt__token_noise": 0.1, "average__decay": 0.98},
    "AdamW, dropout, accumulation 2": {
        "model__optimizer__name": "adamw",
        "trainer__accumulate_grad_batches": 2,
    },
}
COMMON = {
    "trainer__max_steps": MAX_STEPS,
    "trainer__val_check_interval": 40,
    "save_every_n_steps": 25,
    "sample_text__max_new_tokens": 60,
}
HANGING = 600.0  # seconds before a process is given up


@dataclass
class Trial:
    """A run, its kills and its result."""

    variant: str
    killed: list[str] = field(default_factory=list)
    """Steps in metrics.csv at each kill, and whether a checkpoint was being written."""
    resumed_from: list[str] = field(default_factory=list)
    """Step of the newest checkpoint after each kill."""
    equal: bool = False


def metrics_digest(run: Path) -> str:
    """Return the SHA-256 of metrics.csv without the speed."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in csv.DictReader(file)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def fingerprint(run: Path) -> tuple[str, str, str]:
    """Return the digests that must be equal at the end."""
    return digest(run / "last.ckpt"), digest(run / "best.ckpt"), metrics_digest(run)


def steps_logged(run: Path) -> int:
    """Return the number of rows of metrics.csv."""
    path = run / "metrics.csv"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.is_file() else 0


def finish(process: "subprocess.Popen[str]") -> None:
    _, err = process.communicate(timeout=HANGING)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {err}")


def kill(process: "subprocess.Popen[str]", run: Path, moment: str, step: int, delay: float) -> bool:
    """Kill a process and its children; return whether it was still alive.

    Args:
        process: leader of its own session.
        run: its folder.
        moment: `start` kills `delay` seconds after the start. The others wait until metrics.csv has the row of `step`;
            then `write` kills as soon as a file is half-written, and `step` after `delay`.
        step: see `moment`.
        delay: seconds.
    """
    deadline = time.monotonic() + HANGING
    if moment != "start":
        while steps_logged(run) < step and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
    if moment == "write":
        while not any(run.glob(".*.ckpt.*.partial")) and process.poll() is None and time.monotonic() < deadline:
            pass
    else:
        time.sleep(delay)
    alive = process.poll() is None
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return alive


def newest_step(run: Path) -> int:
    """Return the step of the newest checkpoint of a run."""
    return max((load(path)["global_step"] for path in run.glob("*.ckpt")), default=0)


def trial(variant: str, config: Path, run: Path, undisturbed: tuple[str, str, str], kills: int, seed: int) -> Trial:
    """Start a run, kill it `kills` times, let it end, and compare it with the undisturbed digests."""
    chance = random.Random(seed)
    done = Trial(variant)
    process = start("fit", "--config", config, "--run_dir", run, start_new_session=True)
    for number in range(kills):
        begun = newest_step(run) if run.is_dir() else 0
        moment = chance.choice(["step", "step", "write", "start"] if number else ["step", "step", "write"])
        step = begun + chance.randrange(1, max(2, (MAX_STEPS - begun) // 2))
        if not kill(process, run, moment, step, chance.random() * (5.0 if moment == "start" else 0.05)):
            break
        half_written = any(run.glob(".*.ckpt.*.partial"))
        done.killed.append(f"{steps_logged(run)}{' (writing)' if half_written else ''}")
        if not any(run.glob("*.ckpt")):  # before the first checkpoint: start again
            done.resumed_from.append("from the start")
            run = run.with_name(f"{run.name}-again")
            process = start("fit", "--config", config, "--run_dir", run, start_new_session=True)
        else:
            done.resumed_from.append(str(newest_step(run)))
            process = start("fit", "--ckpt_path", run, start_new_session=True)
    finish(process)
    done.equal = fingerprint(run) == undisturbed
    return done


def inject(folder: Path, kills: int, seed: int, at_once: int = 2) -> list[Trial]:
    """Distribute the kills over runs of both variants."""
    configs, undisturbed = {}, {}
    for number, (variant, changes) in enumerate(VARIANTS.items()):
        (folder / str(number)).mkdir()
        configs[variant] = write_config(folder / str(number), **COMMON, **changes)
        finish(start("fit", "--config", configs[variant], "--run_dir", folder / f"{number}-undisturbed"))
        undisturbed[variant] = fingerprint(folder / f"{number}-undisturbed")
    chance = random.Random(seed)
    plans, left = [], kills
    while left:
        count = min(left, chance.choice([1, 1, 2, 3]))
        plans.append(count)
        left -= count
    with ThreadPoolExecutor(at_once) as pool:
        futures = []
        for number, count in enumerate(plans):
            variant = list(VARIANTS)[number % len(VARIANTS)]
            arguments = (variant, configs[variant], folder / f"run-{number}", undisturbed[variant], count)
            futures.append(pool.submit(trial, *arguments, seed * 1000 + number))
        return [future.result() for future in futures]


def table(trials: list[Trial]) -> str:
    """Return the trials as a Markdown table."""
    lines = ["| run | killed after step | resumed after step | weights, optimizer state, best.ckpt, metrics |"]
    lines.append("|---|---|---|---|")
    for result in trials:
        killed, resumed = ", ".join(result.killed), ", ".join(result.resumed_from)
        lines.append(f"| {result.variant} | {killed} | {resumed} | {'equal' if result.equal else 'DIFFERENT'} |")
    kills = sum(len(result.killed) for result in trials)
    lines.append("")
    lines.append(f"{kills} kills, {sum(result.equal for result in trials)} of {len(trials)} runs equal.")
    return "\n".join(lines)


def main() -> int:
    """Return 0 if every run equals the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at_once", type=int, default=2, help="runs at the same time")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trials = inject(Path(folder), options.kills, options.seed, options.at_once)
    print(table(trials))
    return 0 if all(result.equal for result in trials) else 1


if __name__ == "__main__":
    sys.exit(main())
