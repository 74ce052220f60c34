"""The same run on any number of devices; when one process stops or fails, all processes end."""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from command import REPOSITORY, digest, gptlit, load, report, start, tensors, write_config
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 50
CONFIG = {"model__gpt__dropout": 0.0, "trainer__max_steps": STEPS, "trainer__val_check_interval": 10}
ONE = ("--trainer.devices", 1, "--trainer.strategy", "auto")
TWO = ("--trainer.devices", 2, "--trainer.strategy", "ddp")
HEADER = ("run", "largest relative difference of a training loss", "of a validation loss", "last validation loss")
PATIENCE = 240.0  # seconds until a process counts as hanging; far more than any of them needs


def finish(process: "subprocess.Popen[str]") -> str:
    """Wait for the end of a command and return its stderr. A hanging one is killed with its children."""
    try:
        return process.communicate(timeout=PATIENCE)[1]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the command hangs: {process.communicate()[1]}")


def rows(run: Path) -> list[dict[str, float]]:
    """Return the numbers of metrics.csv; empty cells are left out."""
    with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def difference(run: Path, other: Path, name: str) -> float:
    """Return the largest relative difference of a metric between two runs, at the same steps."""
    ours, theirs = ({row["step"]: row[name] for row in rows(path) if name in row} for path in (run, other))
    assert ours.keys() == theirs.keys()
    assert ours
    return max(abs(ours[step] / theirs[step] - 1) for step in ours)


def assert_close(name: str, run: Path, one: Path, table: str = "Any number of devices") -> None:
    """Assert that losses agree up to rounding; the validation loss is over exactly the same tokens."""
    training, validation = difference(run, one, "train/loss"), difference(run, one, "val/loss")
    report(table, HEADER, name, f"{training:.1e}", f"{validation:.1e}", f"{rows(run)[-1]['val/loss']:.7f}")
    assert training < 1e-5
    assert validation < 1e-5
    assert len(rows(run)) == STEPS + 1  # step 0: the initial weights


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Configuration and folder of the run in one process."""
    folder = tmp_path_factory.mktemp("one")
    config = write_config(folder, **CONFIG)
    assert gptlit("fit", "--config", config, "--run_dir", folder / "run").code == 0
    return config, folder / "run"


@pytest.fixture(scope="module")
def two(one: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run in two processes."""
    run = tmp_path_factory.mktemp("two") / "run"
    process = start("fit", "--config", one[0], "--run_dir", run, *TWO, start_new_session=True)
    err = finish(process)
    assert process.returncode == 0, err
    assert err.count("run folder") == 2  # messages at the start and at the end come from one process
    return run


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_gives_the_same_losses(one: tuple[Path, Path], tmp_path: Path, parts: int) -> None:
    """The batch of a step does not depend on how it is split."""
    flags = ["--trainer.accumulate_grad_batches", parts]
    assert gptlit("fit", "--config", one[0], "--run_dir", tmp_path / "run", *flags).code == 0
    assert_close(f"1 process, accumulation {parts}", tmp_path / "run", one[1])


def test_two_processes_give_the_same_losses(one: tuple[Path, Path], two: Path) -> None:
    """No batch twice, none left out, gradients averaged, each validation token counted once."""
    assert_close("2 processes (DDP)", two, one[1])


def test_two_processes_leave_one_run_folder(two: Path) -> None:
    """Guards against a second folder, and against event files of each process."""
    assert [path.name for path in two.parent.iterdir()] == ["run"]
    assert len(list(two.glob("events.*"))) == 1
    assert load(two / "last.ckpt")["global_step"] == STEPS


def test_validating_in_two_processes_counts_every_token_once(one: tuple[Path, Path], tmp_path: Path) -> None:
    """No padding and no duplicates when the windows do not divide evenly; collectives finish before the exit."""
    alone = gptlit("validate", "--ckpt_path", one[1])
    process = start_faulty(tmp_path, 0, "pass", "validate", "--ckpt_path", one[1], *TWO, stdout=subprocess.PIPE)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert LEFT not in err
    ours, theirs = (
        {line.split()[0]: float(line.split()[1]) for line in text.splitlines()} for text in (out, alone.out)
    )
    assert ours == pytest.approx(theirs, rel=1e-6)


# ---------------------------------------------------------------- stopped during training


def wait_for_step(process: "subprocess.Popen[str]", run: Path, step: int) -> None:
    """Wait until metrics.csv has the row of a step."""
    deadline = time.monotonic() + PATIENCE
    while not (run / "metrics.csv").is_file() or rows(run)[-1:] == [] or rows(run)[-1]["step"] < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def way_on_of(err: str) -> str:
    """Return the last line, without the folder of this test."""
    return err.strip().splitlines()[-1].partition("resume with")[0] + "resume with: …"


def test_sigterm_to_the_first_process_stops_all_after_the_same_step(one: tuple[Path, Path], tmp_path: Path) -> None:
    """Exit code 143, an intact checkpoint, and the run can be resumed with another number of processes."""
    run = tmp_path / "run"
    flags = ["--trainer.max_steps", 100_000, "--trainer.val_check_interval", 1000, "--save_every_n_steps", 100_000]
    process = start("fit", "--config", one[0], "--run_dir", run, *TWO, *flags, start_new_session=True)
    wait_for_step(process, run, 3)
    process.terminate()
    err = finish(process)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM after step" in err
    assert "Traceback" not in err
    step = load(run / "last.ckpt")["global_step"]
    assert rows(run)[-1]["step"] == step
    resumed = gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", step + 2, *ONE)
    assert resumed.code == 0, resumed.err
    assert "changed: trainer.devices 2 -> 1" in resumed.err
    report("Faults", FAULTS, "SIGTERM to the first of 2 processes", 143, way_on_of(err), "resumed on 1")


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_after_the_same_step(one: tuple[Path, Path], tmp_path: Path) -> None:
    """The terminal sends SIGINT to the process group; exit code 130."""
    run = tmp_path / "run"
    process = start(
        "fit", "--config", one[0], "--run_dir", run, *TWO, "--trainer.max_steps", 100_000, start_new_session=True
    )
    wait_for_step(process, run, 3)
    os.killpg(process.pid, signal.SIGINT)
    err = finish(process)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert load(run / "last.ckpt")["global_step"] == rows(run)[-1]["step"]
    report("Faults", FAULTS, "Ctrl-C with 2 processes", 130, way_on_of(err), "checkpoint intact")


FAULTS = ("what happens", "exit code", "last line", "then")
LEFT = "threads left"
# A program whose processes run the command with an injected fault; the second process runs it again. It reports
# threads that still exchange tensors after all exit handlers: one that calls Python during its shutdown aborts the
# process.
FAULTY = """
import atexit
import sys
from pathlib import Path
from unittest import mock
import torch
from gptlit.model.gpt import GPT
head, calls = GPT.head, 0

def faulty(self, x):
    global calls
    logits = head(self, x)
    if self.training:
        calls += 1
        if calls == 8 and torch.distributed.get_rank() == RANK:
            FAULT
    return logits

def look():
    if "gloo" in " ".join(name.read_text() for name in Path("/proc/self/task").glob("*/comm")):
        print("LEFT", file=sys.stderr)

if __name__ == "__main__":
    from gptlit.__main__ import main
    atexit.register(look)  # the last one to run
    with mock.patch.object(GPT, "head", faulty):
        sys.exit(main())
"""


def start_faulty(folder: Path, rank: int, fault: str, *arguments: Any, **options: Any) -> "subprocess.Popen[str]":
    """Start two processes; one of them fails in step 8."""
    program = folder / "faulty.py"
    text = FAULTY.replace("RANK", str(rank)).replace("FAULT", fault).replace("LEFT", LEFT)
    program.write_text(text, encoding="utf-8")
    command = [sys.executable, str(program), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    settings = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True, **options}
    return subprocess.Popen(command, env=environment, **settings)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_non_finite_loss_on_one_process_stops_all(one: tuple[Path, Path], tmp_path: Path, rank: int) -> None:
    """Before any weights change; exit code 1, no hang, the earlier checkpoint stays."""
    run = tmp_path / "run"
    fault = "return logits * float('nan')"
    process = start_faulty(tmp_path, rank, fault, "fit", "--config", one[0], "--run_dir", run, *TWO)
    err = finish(process)
    assert process.returncode == 1, err
    assert err.count("the training loss is nan at step 8") == 1
    assert "Traceback" not in err
    assert LEFT not in err
    assert load(run / "last.ckpt")["global_step"] == 5
    assert "last.ckpt (step 5) is intact" in err
    assert err.strip().splitlines()[-1].startswith("resume with: gptlit fit --ckpt_path")
    report("Faults", FAULTS, f"nan in process {rank} of 2", 1, way_on_of(err), "all stop")


def running_in_session(leader: int) -> list[int]:
    """Return the processes of a session that still run."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_an_exception_on_one_process_ends_the_others(one: tuple[Path, Path], tmp_path: Path, rank: int) -> None:
    """With exit code and traceback; the checkpoint is intact."""
    run = tmp_path / "run"
    process = start_faulty(
        tmp_path, rank, "raise RuntimeError('built in')", "fit", "--config", one[0], "--run_dir", run, *TWO
    )
    err = finish(process)
    assert process.returncode != 0, err
    assert "RuntimeError: built in" in err
    assert load(run / "last.ckpt")["global_step"] in (5, 7)
    deadline = time.monotonic() + PATIENCE
    while running_in_session(process.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert gptlit("fit", "--ckpt_path", run, *ONE).code == 0
    report("Faults", FAULTS, f"an exception in process {rank} of 2", process.returncode, "traceback", "resumed on 1")


@pytest.mark.slow
def test_a_run_of_two_processes_killed_and_resumed_ends_the_same(two: Path, one, tmp_path: Path) -> None:
    """Bit-exactly, if the number of processes stays the same."""
    run = tmp_path / "run"
    process = start("fit", "--config", one[0], "--run_dir", run, *TWO, start_new_session=True)
    wait_for_step(process, run, 23)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    assert load(run / "last.ckpt")["global_step"] < STEPS
    again = start("fit", "--ckpt_path", run, start_new_session=True)
    err = finish(again)
    assert again.returncode == 0, err
    assert digest(run / "last.ckpt") == digest(two / "last.ckpt")


# ---------------------------------------------------------------- launchers and shards


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def torchrun(*arguments: Any) -> list[tuple[int, str]]:
    """Run `gptlit ARGUMENTS` with two torchrun agents on the loopback address, as for two machines."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    port, nodes = free_port(), []
    for rank in range(2):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1"]
        command += ["--node_rank", str(rank), "--master_addr", "127.0.0.1", "--master_port", str(port), "-m", "gptlit"]
        command += [*map(str, arguments), "--trainer.num_nodes", "2", "--trainer.devices", "1"]
        command += ["--trainer.strategy", "ddp"]
        nodes.append(
            subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        )
    errors = [finish(node) for node in nodes]
    return [(node.returncode, err) for node, err in zip(nodes, errors, strict=True)]


@pytest.mark.slow
def test_torchrun_on_two_nodes_gives_the_same_losses(one: tuple[Path, Path], tmp_path: Path) -> None:
    """One run folder, made by the first node."""
    run = tmp_path / "run"
    ends = torchrun("fit", "--config", one[0], "--run_dir", run)
    assert [code for code, _ in ends] == [0, 0], ends
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert_close("2 nodes (torchrun)", run, one[1])


SHARDS = (
    "--trainer.strategy.class_path=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.init_args.data_parallel_size=2",
    "--trainer.strategy.init_args.tensor_parallel_size=1",
    "--trainer.strategy.init_args.save_distributed_checkpoint=false",
)


def fit_in_shards(config: Path, run: Path) -> Path:
    """Folder of a run with weights sharded over two processes."""
    flags = ["--trainer.devices", 2, *SHARDS]
    process = start("fit", "--config", config, "--run_dir", run, *flags, start_new_session=True)
    err = finish(process)
    assert process.returncode == 0, err
    assert "no samples and pictures" in err
    return run


@pytest.mark.slow
def test_sharded_training_clips_in_mixed_precision_too(tmp_path: Path) -> None:
    """As `--config gpt2 --config fsdp` does; Lightning alone refuses to clip there, and the norm would be unknown."""
    mixed = {"model__optimizer__name": "adamw", "trainer__precision": "bf16-mixed", "trainer__gradient_clip_val": 0.1}
    config = write_config(tmp_path, **CONFIG | mixed | {"trainer__max_steps": 10})
    assert gptlit("fit", "--config", config, "--run_dir", tmp_path / "one").code == 0
    run = fit_in_shards(config, tmp_path / "run")
    assert difference(run, tmp_path / "one", "train/loss") < 1e-2
    assert difference(run, tmp_path / "one", "train/grad_norm") < 5e-2


def test_clipping_by_value_goes_with_mixed_precision(tmp_path: Path) -> None:
    """Guards against a fused AdamW, which Lightning does not clip by value in mixed precision."""
    mixed = {"model__optimizer__name": "adamw", "trainer__precision": "bf16-mixed", "trainer__max_steps": 2}
    config = write_config(tmp_path, **mixed, trainer__gradient_clip_algorithm="value")
    assert gptlit("fit", "--config", config, "--run_dir", tmp_path / "run").code == 0


@pytest.mark.slow
def test_sharded_training_gives_the_same_losses(tmp_path: Path) -> None:
    """FSDP2 in two processes; the checkpoint is complete, and one process can resume from it."""
    config = write_config(tmp_path, **CONFIG, model__optimizer__name="adamw")
    assert gptlit("fit", "--config", config, "--run_dir", tmp_path / "one").code == 0
    run = fit_in_shards(config, tmp_path / "run")
    assert_close("2 processes (FSDP2, AdamW)", run, tmp_path / "one")
    assert gptlit("fit", "--ckpt_path", run, "--trainer.max_steps", STEPS + 2, *ONE).code == 0


BASE = (
    "fit",
    "--config",
    "base",
    "--data.corpus",
    "sample",
    "--trainer.accelerator",
    "cpu",
    "--pictures.when",
    "never",
)
BASE += ("--trainer.max_steps", STEPS, "--trainer.val_check_interval", 10, "--trainer.log_every_n_steps", 1)
BASE += ("--model.matmul_precision", "highest", "--trainer.precision", "32-true")
CUTS = {
    "1 process, accumulation 2": ("--trainer.accumulate_grad_batches", 2),
    "2 processes (DDP)": TWO,
    "2 processes (DDP), accumulation 2": (*TWO, "--trainer.accumulate_grad_batches", 2),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 50 steps of base.yaml in one process."""
    run = tmp_path_factory.mktemp("base") / "run"
    process = start(*BASE, "--run_dir", run, start_new_session=True)
    err = finish(process)
    assert process.returncode == 0, err
    report("Devices, base size", HEADER, "1 process", "", "", f"{rows(run)[-1]['val/loss']:.7f}")
    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CUTS, "2 nodes of 1 process (torchrun, DDP)"])
def test_the_base_recipe_gives_the_same_losses_on_any_number_of_devices(base: Path, tmp_path: Path, name: str) -> None:
    """base.yaml (Muon) with other devices and length, and matmuls in full float32.

    In its own precision, which may round to bfloat16, losses differ by 1e-4 after these steps; with AdamW at base's
    rate of 0.01, rounding alone grows to 4e-4; both on one process too.
    """
    run = tmp_path / "run"
    if name in CUTS:
        process = start(*BASE, *CUTS[name], "--run_dir", run, start_new_session=True)
        err = finish(process)
        assert process.returncode == 0, err
    else:
        ends = torchrun(*BASE, "--run_dir", run)
        assert [code for code, _ in ends] == [0, 0], ends
    assert_close(name, run, base, "Devices, base size")


@pytest.mark.slow
def test_a_sharded_run_resumes(tmp_path: Path) -> None:
    """After SIGTERM all shards are saved together, and the strategy is restored from the checkpoint."""
    config, run = write_config(tmp_path, **CONFIG, model__optimizer__name="adamw"), tmp_path / "run"
    more = ["--trainer.max_steps", 100_000, "--trainer.devices", 2, *SHARDS]
    process = start("fit", "--config", config, "--run_dir", run, *more, start_new_session=True)
    wait_for_step(process, run, 3)
    process.terminate()
    err = finish(process)
    assert process.returncode == 143, err
    step = load(run / "last.ckpt")["global_step"]
    again = start("fit", "--ckpt_path", run, "--trainer.max_steps", step + 2, start_new_session=True)
    err = finish(again)
    assert again.returncode == 0, err
    assert "2 devices" in err
    assert load(run / "last.ckpt")["global_step"] == step + 2


def test_muon_refuses_shards_by_name(tmp_path: Path) -> None:
    """Muon needs whole matrices; it would silently orthogonalise slices."""
    config = write_config(tmp_path, **CONFIG)
    answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "run", "--trainer.devices", 2, *SHARDS)
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert answer.err.startswith("gptlit: --model.optimizer.name is muon, which needs whole matrices")
    assert not (tmp_path / "run").exists()


class AsOnAGpu(TorchDispatchMode):
    """Raise for operations that a GPU refuses under torch.use_deterministic_algorithms."""

    REFUSED = ("aten.cumsum.", "aten.histc.", "aten.put", "aten.median.dim", "aten.nll_loss2d_forward.")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.are_deterministic_algorithms_enabled():
            fractions = any(isinstance(a, torch.Tensor) and a.is_floating_point() for a in args)
            assert not (fractions and str(func).startswith(self.REFUSED)), f"{func} is refused on a GPU"
            assert not (str(func).startswith("aten.bincount.") and len(args) > 1 and args[1] is not None)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_deterministic_run_uses_no_operation_that_a_gpu_refuses(tmp_path: Path, optimizer: str) -> None:
    """Guards against a run with samples, histograms and pictures that fails only on a GPU."""
    watching = {"sample_text__max_new_tokens": 8, "pictures__when": "validation"}
    deterministic = {"trainer__deterministic": True, "model__optimizer__name": optimizer}
    config = write_config(tmp_path, **watching, **deterministic, trainer__max_steps=8, model__gpt__token_noise=0.1)
    with AsOnAGpu():
        assert gptlit("fit", "--config", config, "--run_dir", tmp_path / "run").code == 0
        assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
def test_sharded_training_on_two_gpus_gives_the_same_losses(tmp_path: Path) -> None:
    """As above, over NCCL."""
    if torch.cuda.device_count() < 2:
        pytest.skip("there are fewer than two GPUs")
    config = write_config(tmp_path, **CONFIG, model__optimizer__name="adamw", trainer__accelerator="gpu")
    for name, flags in (("one", ()), ("run", ("--trainer.devices", 2, *SHARDS))):
        process = start("fit", "--config", config, "--run_dir", tmp_path / name, *flags, start_new_session=True)
        err = finish(process)
        assert process.returncode == 0, err
    assert difference(tmp_path / "run", tmp_path / "one", "train/loss") < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True, "reduce-overhead"])
def test_a_run_on_a_gpu_resumes_bit_exactly(compiled: bool | str, tmp_path: Path) -> None:
    """With deterministic kernels, in separate processes."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    settings = {"trainer__accelerator": "gpu", "trainer__deterministic": True, "model__compile": compiled}
    config = write_config(tmp_path, **settings, model__schedule__shape="constant", sample_text__max_new_tokens=8)
    undisturbed, resumed = tmp_path / "undisturbed", tmp_path / "resumed"
    for command in (
        ("fit", "--config", config, "--run_dir", undisturbed),
        ("fit", "--config", config, "--run_dir", resumed, "--trainer.max_steps", 11),
        ("fit", "--ckpt_path", resumed, "--trainer.max_steps", 20),
    ):
        process = start(*command, env={"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}, start_new_session=True)
        err = finish(process)
        assert process.returncode == 0, err
        assert ("compiled in" in err) == bool(compiled), err
    assert largest_differences(undisturbed / "last.ckpt", resumed / "last.ckpt") == {}
    assert digest(resumed / "last.ckpt") == digest(undisturbed / "last.ckpt")


def largest_differences(path: Path, other: Path) -> dict[str, float]:
    """Return the largest absolute difference of each tensor that differs between two checkpoints."""
    ours, theirs = (
        dict(tensors({k: load(file)[k] for k in ("state_dict", "optimizer_states")})) for file in (path, other)
    )
    assert ours.keys() == theirs.keys()
    return {
        name: (ours[name].double() - theirs[name].double()).abs().max().item()
        for name in ours
        if not torch.equal(ours[name], theirs[name])
    }
