"""Start-up time of whole processes, from the start of the interpreter, in turn.

    python tests/benchmarks/bench_startup.py --text input.txt [--threads 2] [--rounds 5] [--json FILE]

`gptlit --help` and `--version` to their end, `gptlit predict` to the first sampled character on stdout, `gptlit fit`
to the row of the first training step in metrics.csv; next to Python alone, and the imports of torch and Lightning. The
first round, which brings the libraries into the file system's cache, does not count.
"""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from measuring import begin, finish, gptlit, in_turn, parser, run_process, spread, table

IMPORTS = "python -c 'import torch, lightning.pytorch'"
PREDICT = "gptlit predict, first character"
FIT = "gptlit fit, first training step"
PATIENCE = 120.0  # seconds
TEXT_ONLY = ("--repeat_prompt", "false")  # the prompt is written before anything is sampled


def whole(*command: object) -> Callable[[], float]:
    """Return a function that runs a process and returns its seconds."""
    return lambda: run_process(command).seconds


def seconds_to_first_step(folder: Path, text: Path) -> float:
    """Return the seconds from the start of `gptlit fit --config base` to its first step in metrics.csv.

    Raises:
        RuntimeError: if there is none.
    """
    run = folder / "first"
    shutil.rmtree(run, ignore_errors=True)
    started = time.perf_counter()
    command = gptlit(*FIT_ARGUMENTS, "--data.corpus", text, "--run_dir", run)
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    rows = run / "metrics.csv"
    while not (rows.is_file() and rows.read_text(encoding="utf-8").count("\n") > 1):
        if process.poll() or time.perf_counter() - started > PATIENCE:
            process.kill()
            raise RuntimeError("gptlit fit made no step")
        time.sleep(0.002)
    seconds = time.perf_counter() - started
    process.wait()
    return seconds


FIT_ARGUMENTS = (
    *("fit", "--config", "base", "--trainer.max_steps", 1, "--trainer.log_every_n_steps", 1),
    *("--trainer.limit_val_batches", 1, "--trainer.accelerator", "cpu", "--sample_text.max_new_tokens", 0),
)


def main() -> None:
    """Print the table."""
    options = parser(__doc__, rounds=5).parse_args()
    begin(options)
    with tempfile.TemporaryDirectory() as folder:
        trained = Path(folder) / "trained"
        run_process(gptlit(*FIT_ARGUMENTS, "--data.corpus", options.text, "--run_dir", trained))
        predict = gptlit("predict", "--ckpt_path", trained, "--prompt", "\n", "--max_new_tokens", 1, *TEXT_ONLY)
        clocks = {
            "python -c pass": whole(sys.executable, "-c", "pass"),
            "gptlit --version": whole(*gptlit("--version")),
            "gptlit --help": whole(*gptlit("--help")),
            "python -c 'import torch'": whole(sys.executable, "-c", "import torch"),
            IMPORTS: whole(sys.executable, "-c", "import torch, lightning.pytorch"),
            PREDICT: lambda: run_process(predict).first_byte or float("nan"),
            FIT: lambda: seconds_to_first_step(Path(folder), options.text),
        }
        times = in_turn(clocks, options.rounds)
    imports = statistics.median(times[IMPORTS])
    rows = [
        (f"`{name}`", *spread(values, 1, 2), f"{statistics.median(values) - imports:+.2f}")
        for name, values in times.items()
    ]
    print(table(("process", "median, s", "min", "max", "beyond the imports, s"), rows))
    finish(options, seconds=times)


if __name__ == "__main__":
    main()
