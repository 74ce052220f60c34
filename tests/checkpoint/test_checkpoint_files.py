"""Checkpoints hold data only: nothing in them is executed, and a damaged file is refused in one line."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command import Answer, digest, gptlit, load, report, write_config

from gptlit.checkpoint.files import read_checkpoint
from gptlit.errors import UserError

HEADER = ("file", "verb", "answer (exit code 2)")
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("files")
    assert gptlit("fit", "--config", write_config(folder, trainer__max_steps=4), "--run_dir", folder / "run").code == 0
    return folder / "run"


def use(verb: str, checkpoint: Path, tmp_path: Path) -> Answer:
    """Run a subcommand on a checkpoint."""
    more = {
        "fit": ["--trainer.max_steps", 8],
        "predict": ["--max_new_tokens", 5, "--output", tmp_path / "sample.txt"],
        "export": ["--output", tmp_path / "exported"],
        "play": ["--output", tmp_path / "play.html"],
    }
    return gptlit(verb, "--ckpt_path", checkpoint, *more.get(verb, []))


VERBS = ["fit", "validate", "test", "predict", "export", "play"]


def assert_refused(answer: Answer, place: Path) -> None:
    """Exit 2, and one line that names the file."""
    assert answer.code == 2, answer.err
    assert answer.err.startswith("gptlit: ")
    assert answer.err.count("\n") == 1
    assert str(place) in answer.err
    assert answer.out == ""


# ---------------------------------------------------------------- payloads


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return open, (str(self.proof), "w")


def entire_file(checkpoint: dict[str, Any], payload: Payload) -> Any:
    return payload


def next_to_the_weights(checkpoint: dict[str, Any], payload: Payload) -> Any:
    return checkpoint | {"extra": payload}


def in_a_callback(checkpoint: dict[str, Any], payload: Payload) -> Any:
    return checkpoint | {"callbacks": checkpoint["callbacks"] | {"Unknown": {"state": [payload]}}}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
@pytest.mark.parametrize("hide", [entire_file, next_to_the_weights, in_a_callback])
@pytest.mark.parametrize("verb", VERBS)
def test_a_pickle_payload_is_refused_and_not_executed(
    run: Path, tmp_path: Path, verb: str, hide: Callable[..., Any], zipped: bool
) -> None:
    """On every path that reads a checkpoint."""
    proof, place = tmp_path / "proof", tmp_path / "evil.ckpt"
    torch.save(hide(load(run / "last.ckpt"), Payload(proof)), place, _use_new_zipfile_serialization=zipped)
    answer = use(verb, place, tmp_path)
    assert not proof.exists()
    assert_refused(answer, place)
    kind = f"pickle payload, {hide.__name__.replace('_', ' ')}, {'zip' if zipped else 'old format'}"
    report("Files that are refused", HEADER, kind, verb, answer.err.replace(str(tmp_path), "DIR"))


def test_the_payload_is_executed_by_an_unsafe_load(run: Path, tmp_path: Path) -> None:
    """Guards the tests above: with weights_only=False the payload creates its file."""
    torch.save(Payload(tmp_path / "proof"), tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt", weights_only=False).close()
    assert (tmp_path / "proof").exists()


def test_every_checkpoint_loads_as_plain_data(run: Path) -> None:
    """With weights_only=True: no dataclass, path or enum is saved."""
    for name in ("best.ckpt", "last.ckpt"):
        checkpoint = torch.load(run / name, weights_only=True)
        assert yaml.safe_load(checkpoint["gptlit"]["config"])["trainer"]["max_steps"] == 4


# ---------------------------------------------------------------- damaged files and files of other programs


def empty(run: Path, place: Path) -> None:
    place.write_bytes(b"")


def text_file(run: Path, place: Path) -> None:
    place.write_text("To be, or not to be\n" * 100, encoding="utf-8")


def cut_short(run: Path, place: Path) -> None:
    place.write_bytes((run / "last.ckpt").read_bytes()[:-1000])


def first_half(run: Path, place: Path) -> None:
    content = (run / "last.ckpt").read_bytes()
    place.write_bytes(content[: len(content) // 2])


def one_bit_flipped(run: Path, place: Path) -> None:
    content = bytearray((run / "last.ckpt").read_bytes())
    content[len(content) // 2] ^= 1
    place.write_bytes(content)


def zip_of_something_else(run: Path, place: Path) -> None:
    shutil.make_archive(str(place), "zip", run / "samples" if (run / "samples").is_dir() else GOLDEN)
    place.with_name(place.name + ".zip").rename(place)


def nanogpt_checkpoint(run: Path, place: Path) -> None:
    state = {"transformer.wte.weight": torch.zeros(65, 8)}
    torch.save({"model": state, "optimizer": {}, "model_args": {}, "iter_num": 2000, "best_val_loss": 1.9}, place)


def bare_weights(run: Path, place: Path) -> None:
    torch.save(load(run / "last.ckpt")["state_dict"], place)


def lightning_checkpoint_of_another_model(run: Path, place: Path) -> None:
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1}, "global_step": 1, "loops": {}}, place)


def a_list(run: Path, place: Path) -> None:
    torch.save([1, 2, 3], place)


def newer_version(run: Path, place: Path) -> None:
    checkpoint = load(run / "last.ckpt")
    checkpoint["hyper_parameters"]["gpt"]["hyperspace"] = True
    config = yaml.safe_load(checkpoint["gptlit"]["config"])
    config["model"]["gpt"]["hyperspace"] = True
    checkpoint["gptlit"]["config"] = yaml.safe_dump(config)
    torch.save(checkpoint, place)


def folder_without_checkpoints(run: Path, place: Path) -> None:
    place.mkdir()


def missing(run: Path, place: Path) -> None:
    pass


FILES = [
    empty,
    text_file,
    cut_short,
    first_half,
    one_bit_flipped,
    zip_of_something_else,
    nanogpt_checkpoint,
    bare_weights,
    lightning_checkpoint_of_another_model,
    a_list,
    newer_version,
    folder_without_checkpoints,
    missing,
]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("make", FILES)
def test_a_file_that_is_not_an_intact_checkpoint_is_refused_in_one_line(
    run: Path, tmp_path: Path, make: Callable[[Path, Path], None], verb: str
) -> None:
    """Exit code 2; the message names the file; no file is left."""
    place = tmp_path / "file.ckpt"
    make(run, place)
    before = set(tmp_path.rglob("*"))
    answer = use(verb, place, tmp_path)
    assert_refused(answer, place)
    assert set(tmp_path.rglob("*")) == before
    report(
        "Files that are refused",
        HEADER,
        make.__name__.replace("_", " "),
        verb,
        answer.err.replace(str(tmp_path), "DIR"),
    )


def test_every_flipped_bit_is_detected_or_harmless(run: Path, tmp_path: Path) -> None:
    """Wherever the bit is: the file is refused, or its content is equal."""
    content, place, intact = (run / "last.ckpt").read_bytes(), tmp_path / "file.ckpt", digest(run / "last.ckpt")
    chance, refused = random.Random(0), 0
    for _ in range(200):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        place.write_bytes(damaged)
        try:
            read_checkpoint(place)
        except UserError:
            refused += 1
        else:
            assert digest(place) == intact
    assert refused > 100


def test_for_a_damaged_last_checkpoint_the_error_names_the_intact_best_checkpoint(run: Path, tmp_path: Path) -> None:
    """Resuming from it, as the message says, works in the same folder."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "last.ckpt").write_bytes((run / "last.ckpt").read_bytes()[:5000])
    answer = gptlit("fit", "--ckpt_path", tmp_path / "run", "--trainer.max_steps", 6)
    assert_refused(answer, tmp_path / "run" / "last.ckpt")
    assert f"best.ckpt is intact: resume from {tmp_path / 'run' / 'best.ckpt'}" in answer.err
    again = gptlit("fit", "--ckpt_path", tmp_path / "run" / "best.ckpt", "--trainer.max_steps", 6)
    assert again.code == 0, again.err
    assert load(tmp_path / "run" / "last.ckpt")["global_step"] == 6


@pytest.mark.parametrize("verb", ["validate", "predict", "export", "play"])
def test_for_a_damaged_best_checkpoint_the_error_names_the_intact_last_checkpoint(
    run: Path, tmp_path: Path, verb: str
) -> None:
    """The verbs that read best.ckpt; what the message says works."""
    shutil.copytree(run, tmp_path / "run")
    best, last = tmp_path / "run" / "best.ckpt", tmp_path / "run" / "last.ckpt"
    one_bit_flipped(run, best)
    answer = use(verb, tmp_path / "run", tmp_path)
    assert_refused(answer, best)
    assert answer.err.endswith(f"last.ckpt is intact: give --ckpt_path {last}\n")
    assert use(verb, last, tmp_path).code == 0


def test_a_new_run_from_a_damaged_checkpoint_is_told_of_the_intact_one(run: Path, tmp_path: Path) -> None:
    """`--model.init_from`."""
    shutil.copytree(run, tmp_path / "run")
    one_bit_flipped(run, tmp_path / "run" / "best.ckpt")
    config = write_config(tmp_path, trainer__max_steps=1)
    answer = gptlit("fit", "--config", config, "--run_dir", tmp_path / "new", "--model.init_from", tmp_path / "run")
    assert_refused(answer, tmp_path / "run" / "best.ckpt")
    assert answer.err.endswith(f"last.ckpt is intact: give {tmp_path / 'run' / 'last.ckpt'}\n")


@pytest.mark.parametrize("verb", VERBS)
def test_where_no_checkpoint_of_a_run_is_intact_both_are_named(run: Path, tmp_path: Path, verb: str) -> None:
    shutil.copytree(run, tmp_path / "run")
    for name in ("best.ckpt", "last.ckpt"):
        one_bit_flipped(run, tmp_path / "run" / name)
    answer = use(verb, tmp_path / "run", tmp_path)
    assert_refused(answer, tmp_path / "run" / "best.ckpt")
    assert str(tmp_path / "run" / "last.ckpt") in answer.err
    assert answer.err.endswith("; train again\n")


@pytest.mark.parametrize("verb", ["fit", "predict"])
def test_for_the_only_checkpoint_of_a_run_the_advice_is_to_train_again(run: Path, tmp_path: Path, verb: str) -> None:
    (tmp_path / "run").mkdir()
    one_bit_flipped(run, tmp_path / "run" / "last.ckpt")
    answer = use(verb, tmp_path / "run", tmp_path)
    assert_refused(answer, tmp_path / "run" / "last.ckpt")
    assert answer.err.endswith("train again\n")


@pytest.mark.parametrize(("count", "named"), [(1, 1), (5, 5), (6, 5), (300, 5)])
def test_a_folder_of_runs_is_answered_with_a_short_list(run: Path, tmp_path: Path, count: int, named: int) -> None:
    """It says how many more there are, and does not offer a choice of one."""
    files = [tmp_path / "runs" / f"run-{number:03d}" / "best.ckpt" for number in range(count)]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    answer = use("predict", tmp_path / "runs", tmp_path)
    assert_refused(answer, tmp_path / "runs")
    listed = ", ".join(map(str, files[:named])) + (f" and {count - named} more" if count > named else "")
    assert answer.err.endswith(f"best.ckpt nor last.ckpt: name {'one of ' if count > 1 else ''}{listed}\n")


@pytest.mark.parametrize(("count", "more"), [(1, ""), (5, ""), (7, " and 2 more")])
def test_a_path_that_does_not_exist_is_answered_with_a_short_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, more: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(count):
        (tmp_path / "checkpoints" / f"run-{number}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"run-{number}" / "last.ckpt").touch()
    answer = use("predict", Path("missing"), tmp_path)
    runs = ", ".join(f"checkpoints/run-{number}" for number in range(min(count, 5)))
    assert answer.err == f"gptlit: --ckpt_path missing: no such file or run folder (runs here: {runs}{more})\n"


# ---------------------------------------------------------------- golden files


@pytest.mark.parametrize(
    "folder", sorted(path for path in GOLDEN.iterdir() if path.is_dir()), ids=lambda path: path.name
)
def test_checkpoints_of_all_versions_still_load(folder: Path, tmp_path: Path) -> None:
    """The folder's name is the version. The run has its old loss, can be sampled from and exported, and resumes."""
    shutil.copytree(folder, tmp_path / "run")
    run = tmp_path / "run"
    text = run / "text.txt"
    then = yaml.safe_load((run / "then.yaml").read_text(encoding="utf-8"))
    answer = gptlit("validate", "--ckpt_path", run / "last.ckpt", "--data.corpus", text, "--trainer.accelerator", "cpu")
    assert answer.code == 0, answer.err
    loss = float(answer.out.split("val/loss ")[1].split()[0])
    assert loss == pytest.approx(then["val_loss"], abs=1e-4)
    for verb in ("predict", "export"):
        assert use(verb, run / "last.ckpt", tmp_path).code == 0
    answer = gptlit("fit", "--ckpt_path", run, "--data.corpus", text)
    assert answer.code == 0, answer.err
    final = load(run / "last.ckpt")
    assert final["global_step"] == then["max_steps"]
    assert final["callbacks"]["RunCheckpoints"]["best_score"] == pytest.approx(then["final_val_loss"], abs=1e-3)
