"""Changes of a recipe, each trained with several seeds: losses, and differences paired by seed.

    python tests/benchmarks/bench_recipe.py --text input.txt --runs trials --config minute --rounds 3 --jobs 2 \\
        --change="--model.optimizer.head_lr null" --change="--model.gpt.n_head 2 --trainer.max_steps 1690"

The first row is the recipe itself, with the options of --flag, which hold for all rows. Seeds are 1337, 1338, …, one
for each round. Runs stay in the folder of --runs, and a second call resumes or reuses them: changes and seeds can be
added later. A run that fails is left out of the table. Times are comparable only with --jobs 1 on a quiet machine.
"""

import hashlib
import re
import shlex
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from measuring import begin, finish, gptlit, parser, run_process, table

from gptlit.cli.compare import read_run
from gptlit.cli.settings import find_config
from gptlit.errors import UserError

FIRST_SEED = 1337
LAST_STEPS = 100  # of which the training loss is the mean
LONGEST_NAME = 60
OWN = ("--seed_everything", "--run_dir", "--ckpt_path", "--config", "-c")
HEADER = ("change", "steps", "val loss", "difference", "lowest", "training loss", "training, s")


@dataclass(frozen=True)
class Trial:
    """One run of one change."""

    change: str
    """Options of `gptlit fit`, as typed; empty for the recipe itself."""
    seed: int
    folder: Path


@dataclass(frozen=True)
class Result:
    """What a run reached. Losses in nats per token."""

    steps: int
    last: float
    """Validation loss after the last step."""
    lowest: float
    train: float
    """Mean training loss of the last steps."""
    seconds: float
    """Training time, without validation."""


def make_trials(
    runs: Path, files: Sequence[Path], flags: Sequence[str], changes: Sequence[str], seeds: int
) -> list[Trial]:
    """Return the runs seed by seed, so that a call that is stopped early has complete rounds.

    The name of a folder holds the change, and a digest of everything that the run depends on.

    Args:
        runs: folder of the runs.
        files: the configuration and the text.
        flags: options of all runs.
        changes: options of each row; equal ones are one row.
        seeds: number of seeds.
    """
    contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    trials = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        for change in dict.fromkeys(changes):
            digest = hashlib.sha256(repr((contents, list(flags), change)).encode()).hexdigest()[:8]
            words = re.sub(r"[^\w.]+", "-", change).strip("-")[-LONGEST_NAME:].strip("-")
            trials.append(Trial(change, seed, runs / "-".join(filter(None, [words, digest, str(seed)]))))
    return trials


def command_of(trial: Trial, config: str, flags: Sequence[object]) -> list[object]:
    """Return the command that starts a run, or resumes it; it does nothing for a finished one.

    A folder without a checkpoint is removed.
    """
    if any(trial.folder.glob("*.ckpt")):
        return gptlit("fit", "--ckpt_path", trial.folder)
    if trial.folder.is_dir():
        shutil.rmtree(trial.folder)
    own = ("--seed_everything", trial.seed, "--run_dir", trial.folder)
    return gptlit("fit", "--config", config, *flags, *shlex.split(trial.change), *own)


def refuse_own_options(options: Sequence[str]) -> None:
    """Refuse what this script sets for each run.

    Raises:
        SystemExit: names the option.
    """
    for option in (word.partition("=")[0] for text in options for word in shlex.split(text)):
        if option in OWN:
            raise SystemExit(f"{option} belongs to each run: leave it out of --change and --flag")


def read_result(folder: Path) -> Result:
    """Read a finished run."""
    run = read_run(folder)
    train = [loss for step, loss in run.train.items() if step > run.steps - LAST_STEPS]
    return Result(run.steps, run.val[max(run.val)], min(run.val.values()), statistics.fmean(train), run.seconds)


def rows_of(results: Mapping[str, Mapping[int, Result]]) -> list[tuple[str, ...]]:
    """Return a row for each change; differences are to the first change, with the same seed.

    Args:
        results: by change and seed; failed runs are missing.
    """
    reference = next(iter(results.values()))
    rows = []
    for change, by_seed in results.items():
        name = f"`{change}`" if change else "none"
        found = by_seed.values()
        if not found:
            rows.append((name, *["failed"] * (len(HEADER) - 1)))
            continue
        differences = [result.last - reference[seed].last for seed, result in by_seed.items() if seed in reference]
        rows.append(
            (
                name,
                ", ".join(sorted({f"{result.steps:,}" for result in found})),
                mean_and_deviation([result.last for result in found]),
                mean_and_deviation(differences, sign="+") if differences and by_seed is not reference else "",
                mean_and_deviation([result.lowest for result in found]),
                f"{statistics.fmean(result.train for result in found):.3f}",
                f"{statistics.median(result.seconds for result in found):.0f}",
            )
        )
    return rows


def mean_and_deviation(values: Sequence[float], sign: str = "") -> str:
    """Return `1.5230 ± 0.0007`: mean and standard deviation over the seeds; of one seed its value."""
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.4f}"


def main() -> None:
    """Print the table."""
    options_of = parser(__doc__, rounds=3)
    options_of.set_defaults(threads=1)
    options_of.add_argument("--config", default="base", help="configuration of gptlit")
    options_of.add_argument("--change", action="append", default=[], help='options of a row: --change="--name value"')
    options_of.add_argument("--flag", action="append", default=[], help="options of every row: --flag=--name=value")
    options_of.add_argument("--runs", type=Path, default=Path("trials"), help="folder of the runs")
    options_of.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = options_of.parse_args()
    if options.rounds < 1:
        raise SystemExit("--rounds must be 1 or more")
    refuse_own_options([*options.change, *options.flag])
    begin(options)
    changes = ["", *options.change]
    given = [word for text in options.flag for word in shlex.split(text)]
    flags = ["--data.corpus", str(options.text.resolve()), "--threads", str(options.threads), *given]
    trials = make_trials(options.runs, [find_config(options.config), options.text], flags, changes, options.rounds)

    def train(trial: Trial) -> Result | None:
        try:
            run_process(command_of(trial, options.config, flags))
            result = read_result(trial.folder)
        except (RuntimeError, UserError) as error:
            print(f"{trial.folder.name}: {error}", file=sys.stderr)
            return None
        print(f"{trial.folder.name}: {result.last:.4f}", file=sys.stderr)
        return result

    results: dict[str, dict[int, Result]] = {change: {} for change in changes}
    with ThreadPoolExecutor(options.jobs) as pool:
        for trial, result in zip(trials, pool.map(train, trials), strict=True):
            if result is not None:
                results[trial.change][trial.seed] = result
    print(table(HEADER, rows_of(results)))
    if failed := len(trials) - sum(map(len, results.values())):
        print(f"{failed} of {len(trials)} runs failed", file=sys.stderr)
    finish(options, results={c: {s: asdict(result) for s, result in by.items()} for c, by in results.items()})
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
