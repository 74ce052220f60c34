"""Kills runs at random moments, resumes each, and compares where they end with a run that was never disturbed.

    python tests/fault_injection.py --kills 20 --seed 1

prints a table in Markdown. A run is killed with SIGKILL while it trains, while it writes a checkpoint or while it
starts, and resumed with `gptlit fit --ckpt_path RUN`; a part of the runs is killed again after that. At the end the
weights, the whole state of the optimizer, best.ckpt and every metric but the speed must be the undisturbed run's, bit
for bit.
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
HANGING = 600.0  # seconds after which a process is given up


@dataclass
class Trial:
    """One run and what was done to it."""

    variant: str
    killed: list[str] = field(default_factory=list)
    """Steps in metrics.csv when the kills came, and whether a checkpoint was half-written."""
    resumed_from: list[str] = field(default_factory=list)
    """Steps in the newest checkpoint."""
    equal: bool = False


def metrics_digest(run: Path) -> str:
    """SHA-256 of metrics.csv without the speed."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in csv.DictReader(file)]
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def fingerprint(run: Path) -> tuple[str, str, str]:
    """What must be equal at the end."""
    return digest(run / "last.ckpt"), digest(run / "best.ckpt"), metrics_digest(run)


def steps_logged(run: Path) -> int:
    """Rows of metrics.csv."""
    path = run / "metrics.csv"
    return max(0, path.read_bytes().count(b"\n") - 1) if path.is_file() else 0


def finish(process: "subprocess.Popen[str]") -> None:
    _, err = process.communicate(timeout=HANGING)
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {err}")


def kill(process: "subprocess.Popen[str]", run: Path, moment: str, step: int, delay: float) -> bool:
    """Kills a process and all that it started; whether it was still alive.

    Args:
        process: leads a session of its own.
        run: its folder.
        moment: `start`, `delay` seconds after it was started; else not before metrics.csv has the row of `step`, and
            then `write`, as soon as there is a half-written file, or `step`, after `delay`.
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
    """Steps in the newest file of a run."""
    return max((load(path)["global_step"] for path in run.glob("*.ckpt")), default=0)


def trial(variant: str, config: Path, run: Path, whole: tuple[str, str, str], kills: int, seed: int) -> Trial:
    """Starts a run, kills it so many times, lets it end, and compares."""
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
        if not any(run.glob("*.ckpt")):  # too early for a first file: the command says so, and one starts again
            done.resumed_from.append("anew")
            run = run.with_name(f"{run.name}-again")
            process = start("fit", "--config", config, "--run_dir", run, start_new_session=True)
        else:
            done.resumed_from.append(str(newest_step(run)))
            process = start("fit", "--ckpt_path", run, start_new_session=True)
    finish(process)
    done.equal = fingerprint(run) == whole
    return done


def inject(folder: Path, kills: int, seed: int, at_once: int = 2) -> list[Trial]:
    """So many kills over as many runs as it takes, half of each variant."""
    configs, whole = {}, {}
    for number, (variant, changes) in enumerate(VARIANTS.items()):
        (folder / str(number)).mkdir()
        configs[variant] = write_config(folder / str(number), **COMMON, **changes)
        finish(start("fit", "--config", configs[variant], "--run_dir", folder / f"{number}-whole"))
        whole[variant] = fingerprint(folder / f"{number}-whole")
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
            arguments = (variant, configs[variant], folder / f"run-{number}", whole[variant], count)
            futures.append(pool.submit(trial, *arguments, seed * 1000 + number))
        return [future.result() for future in futures]


def table(trials: list[Trial]) -> str:
    """Markdown."""
    lines = ["| run | killed after step | went on after step | weights, optimizer state, best.ckpt, metrics |"]
    lines.append("|---|---|---|---|")
    for result in trials:
        killed, resumed = ", ".join(result.killed), ", ".join(result.resumed_from)
        lines.append(f"| {result.variant} | {killed} | {resumed} | {'equal' if result.equal else 'DIFFERENT'} |")
    kills = sum(len(result.killed) for result in trials)
    lines.append("")
    lines.append(f"{kills} kills, {sum(result.equal for result in trials)} of {len(trials)} runs equal.")
    return "\n".join(lines)


def main() -> int:
    """Exit code 0 when every run ended like the undisturbed one."""
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
