"""Every measurement that needs a GPU, in one call of less than ten minutes on one large GPU.

    python tests/benchmarks/bench_gpu.py --text input.txt --peer path/to/nanoGPT --out FOLDER
    python tests/benchmarks/bench_gpu.py --text input.txt --peer path/to/nanoGPT --out FOLDER --reduce_overhead
    python tests/benchmarks/bench_gpu.py --text input.txt --peer path/to/nanoGPT --out FOLDER --parts runs peer
    python tests/benchmarks/bench_gpu.py --text input.txt --peer path/to/nanoGPT --out FOLDER --small

Parts: the device's peak of bfloat16 matrix multiplications; a training step and nanoGPT's at the settings of its
train_shakespeare_char.py (`steps`); whole runs of `scaled` and `best` (`runs`): time to a validation loss of 1.47, best
loss, characters per second; nanoGPT's own run (`peer`); GPT-2 124M at block 1024 (`gpt2`); the tests that need a GPU
(`tests`); more seeds (`seeds`). Rows are printed as they are known; gpu.json in --out is rewritten after each part. A
part that fails is reported and the others continue; parts beyond the time limit are left out or cut. --small tries the
script on a CPU at tiny sizes in a minute; its numbers mean nothing.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_steps import Plan, characters, gpt2
from measuring import REPOSITORY, machine, row, run_process, table
from peer import read_output, train_command, workplace
from runs import Reached, train
from subjects import matmul_peak

from gptlit.training.compiling import Mode

RUNS = (("scaled", 1337), ("best", 1337))
MORE_RUNS = (("best", 1338), ("best", 1339), ("scaled", 1338), ("scaled", 1339))
PARTS = ("steps", "runs", "peer", "gpt2", "tests", "seeds")
HEADER = ("run", "seed", "to the target, s", "at step", "best val loss", "training, s", "compiling, s", "characters/s")
TINY_RUN = (
    *("--model.gpt.n_layer", 1, "--model.gpt.n_embd", 16, "--model.gpt.n_head", 1, "--model.gpt.block_size", 16),
    *("--data.batch_size", 4, "--trainer.max_steps", 20, "--trainer.val_check_interval", 10),
    *("--trainer.limit_val_batches", 2, "--model.compile", "false"),
)


def device_tests(plan: Plan, seconds: float) -> str:
    """Return the last lines of `pytest -m gpu`; with --small, only collect these tests."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", str(REPOSITORY / "tests")]
    if plan.small:
        command.append("--collect-only")
    try:
        out = run_process(command, cwd=REPOSITORY, limit=seconds).out
    except RuntimeError as error:  # failed tests are a result
        out = str(error)
    print(out)
    return out


def runs(plan: Plan, wanted: Sequence[tuple[str, int]], deadline: float, target: float) -> list[dict[str, Any]]:
    """Train whole runs while there is time for one as long as the longest so far; print each when it is done."""
    done: list[dict[str, Any]] = []
    print(table(HEADER, []))
    for name, seed in wanted:
        if time.monotonic() + max((run["whole"] for run in done), default=0.0) > deadline:
            print(f"no time left for `{name}` with seed {seed} and later runs")
            break
        flags = [*TINY_RUN] if plan.small else []
        flags += ["--model.compile", plan.mode] if plan.mode != "default" else []
        flags += ["--sample_text.max_new_tokens", 0, "--pictures.when", "never", "--seed_everything", seed]
        run = train(name, plan.text, target, flags, "cpu" if plan.device == "cpu" else "gpu")
        print(row(row_of(name, seed, run)), flush=True)
        done.append({"config": name, "seed": seed, **vars(run)})
    return done


def row_of(name: str, seed: int, run: Reached) -> tuple[Any, ...]:
    """Return a row of the table."""
    there = (f"{run.seconds:.1f}", run.steps) if run.met else ("not reached", "")
    compiling = "" if run.compiling is None else f"{run.compiling:.0f}"
    speed = f"{run.characters_per_second:,.0f}"
    return (f"`{name}`", seed, *there, f"{run.best:.4f}", f"{run.training:.1f}", compiling, speed)


def peer_run(plan: Plan, seconds: float, target: float) -> dict[str, Any] | None:
    """Run nanoGPT's own train.py with its recipe for this text, to its end or to the time limit.

    Training time excludes evaluation and compilation.
    """
    if not plan.peer:
        return None
    config = plan.config("nanogpt")
    settings: dict[str, Any] = {"compile": not plan.small}
    if plan.small:
        settings |= {"max_iters": 20, "eval_interval": 10, "eval_iters": 2}
    with workplace(plan.peer, plan.text) as place:
        unbuffered = {"PYTHONUNBUFFERED": "1"}
        done = run_process(train_command(config, plan.device, **settings), unbuffered, cwd=place, limit=seconds)
    printed = read_output(done.out)
    training = sum(printed.step_seconds.values())
    there = [step for step, loss in sorted(printed.val_losses.items()) if loss <= target]
    best = min(printed.val_losses.values())
    until = sum(seconds for step, seconds in printed.step_seconds.items() if step < there[0]) if there else None
    reached = f"{until:.1f} s, step {there[0]}" if there else "not reached"
    print(
        f"to {target}: {reached}; its best estimate {best:.4f}; training {training:.1f} s, process {done.seconds:.1f} s"
    )
    return {"until": until, "best": best, "training": training, "val_losses": printed.val_losses, "whole": done.seconds}


def main() -> None:
    """Run the parts."""
    options_of = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options_of.add_argument("--text", type=Path, required=True, help="Tiny Shakespeare")
    options_of.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    options_of.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for gpu.json")
    options_of.add_argument("--seconds", type=float, default=540, help="time after which no further run starts")
    options_of.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure, in this order")
    options_of.add_argument("--target", type=float, default=1.47, help="validation loss")
    options_of.add_argument("--reduce_overhead", action="store_true", help="gptlit with model.compile reduce-overhead")
    options_of.add_argument("--small", action="store_true", help="on a CPU, at tiny sizes, to try the script")
    options = options_of.parse_args()
    deadline = time.monotonic() + options.seconds
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if not options.small and not torch.cuda.is_available():
        options_of.error("no GPU found: --small tries the script without one")
    mode: Mode = "reduce-overhead" if options.reduce_overhead else "default"
    plan = Plan("cpu" if options.small else "cuda", options.text.resolve(), options.peer, options.small, mode)
    device = machine() if options.small else torch.cuda.get_device_name()
    found: dict[str, Any] = {"device": device, "torch": torch.__version__}
    print(f"{device}, PyTorch {torch.__version__}")

    peak = matmul_peak(plan.device, torch.bfloat16, 256 if plan.small else 8192, tries=20)
    found["peak"] = peak
    print(f"bfloat16 matrix multiplications: {peak / 1e12:.3g} TFLOP/s")

    def left() -> float:
        return deadline - time.monotonic()

    parts: dict[str, tuple[str, Callable[[], Any]]] = {
        "steps": ("A step of Tiny Shakespeare", lambda: characters(plan, peak)),
        "runs": ("Whole runs", lambda: runs(plan, RUNS, deadline, options.target)),
        "peer": ("nanoGPT's own run", lambda: peer_run(plan, left(), options.target)),
        "gpt2": ("A step of GPT-2, 124M", lambda: gpt2(plan, peak)),
        "tests": ("Tests that need a GPU", lambda: device_tests(plan, left())),
        "seeds": ("More seeds", lambda: runs(plan, MORE_RUNS[: 1 if plan.small else None], deadline, options.target)),
    }
    for name in options.parts:
        title, measure = parts[name]
        print(f"\n## {title}\n")
        if left() <= 0:
            print("no time left for this part")
            continue
        started = time.monotonic()
        try:
            found[title] = measure()
        except Exception:  # the next part may still work
            traceback.print_exc()
            found[title] = {"failed": traceback.format_exc()}
        print(f"({time.monotonic() - started:.0f} s)")
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "gpu.json").write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
