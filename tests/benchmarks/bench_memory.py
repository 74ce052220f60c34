"""Peak resident memory of `gptlit fit`, next to the size of its weights, gradients and optimizer state.

    python tests/benchmarks/bench_memory.py --text input.txt --peer path/to/nanoGPT [--threads 2] [--json FILE]

A few steps and one batch of validation, on the CPU, not compiled. The first row is the import of the libraries. --peer
adds nanoGPT's train.py at the sizes that both support, in a temporary folder.
"""

import re
import sys
import tempfile
from pathlib import Path

from measuring import begin, finish, gptlit, parser, run_process, table
from peer import train_command, workplace
from subjects import read_config

CONFIGS = ("nanogpt_cpu", "base", "scaled")
COMPARABLE = {"nanogpt_cpu": "nanogpt_cpu", "scaled": "nanogpt"}  # ours -> settings that nanoGPT runs with
STEPS = 3
MB = 1e6


def fit(name: str, text: Path, folder: Path) -> tuple[int, str]:
    """Return the peak bytes of a short fit, and the size of weights, gradients and optimizer that it prints."""
    arguments = ("fit", "--config", name, "--data.corpus", text, "--run_dir", folder / name)
    limits = ("--trainer.max_steps", STEPS, "--trainer.val_check_interval", STEPS, "--trainer.limit_val_batches", 1)
    quiet = ("--sample_text.max_new_tokens", 0, "--pictures.when", "never", "--model.compile", "false")
    done = run_process(gptlit(*arguments, *limits, *quiet, "--trainer.accelerator", "cpu"))
    said = re.search(r"([\d.]+ \w?B) for weights", done.err)
    return done.peak_bytes, said.group(1) if said else ""


def main() -> None:
    """Print the table."""
    options_of = parser(__doc__, rounds=1)
    options_of.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    options = options_of.parse_args()
    begin(options)
    libraries = run_process([sys.executable, "-c", "import torch, lightning.pytorch"]).peak_bytes
    rows: list[tuple[str, str, str, str]] = [
        ("`import torch, lightning.pytorch`", "", f"{libraries / MB:,.0f}", "0"),
    ]
    numbers = {"libraries": libraries}
    with tempfile.TemporaryDirectory() as folder:
        for name in CONFIGS:
            peak, state = fit(name, options.text, Path(folder))
            numbers[name] = peak
            label = f"gptlit fit, `{name}`"
            rows.append((label, state, f"{peak / MB:,.0f}", f"{(peak - libraries) / MB:,.0f}"))
            if options.peer and name in COMPARABLE:
                with workplace(options.peer, options.text) as place:
                    command = train_command(read_config(COMPARABLE[name]), max_iters=STEPS, eval_iters=1)
                    peak = run_process(command, cwd=place).peak_bytes
                numbers[f"nanoGPT, {name}"] = peak
                label = f"nanoGPT's train.py, size of `{name}`"
                rows.append((label, "", f"{peak / MB:,.0f}", f"{(peak - libraries) / MB:,.0f}"))
    header = ("process", "weights, gradients, optimizer", "peak, MB", "beyond the libraries, MB")
    print(table(header, rows))
    finish(options, peak_bytes=numbers)


if __name__ == "__main__":
    main()
