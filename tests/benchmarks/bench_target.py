"""Time and steps to a validation loss, compared with nanoGPT's own train.py: whole runs, one after the other.

    python tests/benchmarks/bench_target.py --text input.txt --peer path/to/nanoGPT --config fast --target 1.88

nanoGPT runs with the settings of its README for a CPU (`configs/nanogpt_cpu.yaml`), in a temporary folder. Its time is
that of its training steps as it prints them, without evaluation; ours excludes validation too. Its loss is its own
estimate, and the loss of its last checkpoint over the whole validation part, which is how ours is measured. Without
--peer, only gptlit runs.
"""

import statistics
from pathlib import Path

import torch
from measuring import begin, finish, parser, run_process, spread, table
from peer import PeerRun, read_output, train_command, workplace
from runs import train
from subjects import read_config

from gptlit import LitGPT, TextDataModule
from gptlit.data import ValidationWindows

HEADER = ("run", "val loss", "steps", "training, s (median)", "min", "max", "validation and start, s", "time / this")


def train_peer(peer: Path, text: Path) -> tuple[PeerRun, float, float]:
    """Return nanoGPT's run, the loss of its last checkpoint over the whole validation part, and its total seconds."""
    config = read_config("nanogpt_cpu")
    with workplace(peer, text) as place:
        done = run_process(train_command(config, always_save_checkpoint=True), cwd=place)
        module = LitGPT(init_from=str(place / "out" / "ckpt.pt"))
        data = TextDataModule(str(text), block_size=config["model"]["gpt"]["block_size"])
        data.setup()
        module.tokenizer = data.tokenizer
        module.configure_model()
        return read_output(done.out), whole_validation_loss(module, data), done.seconds


@torch.no_grad()
def whole_validation_loss(module: LitGPT, data: TextDataModule) -> float:
    """Return the loss over the whole validation part in windows that do not overlap, in nats per token."""
    network = module.network.eval()
    assert data.val_tokens is not None
    total, count = 0.0, 0
    for inputs, targets in ValidationWindows(data.val_tokens, data.block_size, 256):
        losses = torch.nn.functional.cross_entropy(network(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
        total, count = total + losses.item(), count + int((targets >= 0).sum())
    return total / count


def main() -> None:
    """Print the table."""
    options_of = parser(__doc__, rounds=1)
    options_of.add_argument("--peer", type=Path, help="a checkout of nanoGPT")
    options_of.add_argument("--config", default="fast", help="configuration of gptlit")
    options_of.add_argument("--target", type=float, default=1.88, help="validation loss")
    options_of.add_argument("--flag", action="append", default=[], help="option of gptlit fit: --flag=--name=value")
    options = options_of.parse_args()
    begin(options)
    seeds = [("--seed_everything", 1337 + number) for number in range(options.rounds)]
    ours = [train(options.config, options.text, options.target, [*options.flag, *seed]) for seed in seeds]
    seconds = [run.seconds for run in ours]
    rows: list[tuple[object, ...]] = []
    result: dict[str, object] = {"ours": [vars(run) for run in ours]}
    ratio = ""
    if options.peer:
        peer, exact, whole = train_peer(options.peer, options.text)
        theirs = sum(peer.step_seconds.values())
        steps, estimate = max(peer.val_losses), peer.val_losses[max(peer.val_losses)]
        cells = (f"{theirs:.1f}", "", "", f"{whole - theirs:.1f}", "1.00")
        rows.append((f"nanoGPT, to its end (its estimate {estimate:.4f})", f"{exact:.4f}", steps, *cells))
        result["peer"] = {"seconds": theirs, "exact": exact, "val_losses": peer.val_losses, "whole": whole}
        ratio = f"{theirs / statistics.median(seconds):.2f}"
    label = f"gptlit `{options.config}`, to {options.target}"
    if not all(run.met for run in ours):
        label += f" ({sum(run.met for run in ours)} of {len(ours)} reached it)"
    losses = ", ".join(f"{run.loss:.4f}" for run in ours)
    steps_made = ", ".join(sorted({str(run.steps) for run in ours}))
    rest = f"{statistics.median(run.whole - run.training for run in ours):.1f}"
    rows.append((label, losses, steps_made, *spread(seconds), rest, ratio))
    print(table(HEADER, rows))
    finish(options, **result)


if __name__ == "__main__":
    main()
