"""User errors: each gives one line that names the flag or the file, exit code 2, and leaves no files."""

import gzip
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import PLAY, REPOSITORY, gptlit, load, report, write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptlit.cli.fit.plan import parse_fit
from gptlit.cli.settings import as_yaml, flat
from gptlit.cli.verbs import VERBS

HEADER = ("gptlit …", "answer (exit code 2)")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, a finished run, and invalid files of many kinds."""
    folder = tmp_path_factory.mktemp("bad")
    write_config(folder, trainer__max_steps=2)
    assert gptlit("fit", "--config", folder / "small.yaml", "--run_dir", folder / "run").code == 0
    files: dict[str, str | bytes] = {
        "list.yaml": "- a\n- b\n",
        "empty.yaml": "",
        "word.yaml": "hello\n",
        "broken.yaml": "trainer:\n  max_steps: [1, 2\n",
        "colon.yaml": "a: b: c\n",
        "binary.yaml": b"\xff\xfe\x00\x01",
        "typo.yaml": "model:\n  gpt:\n    n_layers: 3\n",
        "verb.yaml": "fit:\n  trainer: {max_steps: 3}\n",
        "type.yaml": "model: {gpt: {n_layer: [1]}}\n",
        "group.yaml": "trainer: 3\n",
        "code.yaml": "trainer: !!python/object/apply:os.system ['touch proof']\n",  # would leave a file if it were run
        "tab.yaml": "trainer:\n\tmax_steps: 3\n",
        "key.yaml": "3: 4\n",
        "start.yaml": f"ckpt_path: {folder / 'run'}\n",
        "empty.txt": "",
        "blank.txt": " \n\n\t ",
        "one.txt": "a",
        "short.txt": "To be, or not to be",
        "latin1.txt": "Où est la bibliothèque?".encode("latin1") * 100,
        "utf16.txt": ("To be, or not to be\n" * 100).encode("utf-16"),
        "picture.txt": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" * 100,
        "accent.txt": "Une pièce de théâtre. " * 100,
        "table.csv": "a,b\n1,2\n",
        "broken.jsonl": '{"text": "a"}\n{"text": \n',
        "broken.txt.gz": gzip.compress(PLAY.read_bytes())[:3000],
        "tokenizer.json": "{}",
        "notes.json": "no json",
        "prompts.txt": "",
        "half.jsonl": '{"prompt": "a\\ud800b"}\n',
        "prompts.jsonl": json.dumps({"text": "To be"}) + "\n",
        "latin1.prompt": "Où".encode("latin1"),
        "file": "a file, no folder",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "nothing").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "something").touch()
    return folder


# A line is a wrong use, and a text that the message must contain. {} is the prepared folder; FIT stands for
# `fit --config {}/small.yaml --run_dir {}/new`, PREDICT for `predict --ckpt_path {}/run`, SHARDED for a strategy on two
# devices, LONG for 300 letters.
SHARDED = (
    "--trainer.devices 2 --trainer.strategy.class_path ModelParallelStrategy "
    "--trainer.strategy.init_args.data_parallel_size 2 --trainer.strategy.init_args.tensor_parallel_size 1"
)
WRONG_USES = r"""
fitt                                                          | did you mean 'fit'
train                                                         | 'train' is not a verb
--config {}/small.yaml fit                                    | the verb comes first
--trainer.max_steps 3 fit                                     | the verb comes first
FIT --model.gpt.n_layers 3                                    | did you mean --model.gpt.n_layer?
FIT --n_layer 3                                               | did you mean --model.gpt.n_layer?
FIT --trainer.max_stepz=3                                     | did you mean --trainer.max_steps?
FIT --frobnicate 1                                            | --frobnicate
FIT -x                                                        | -x is not an option
FIT stray                                                     | 'stray'
FIT --model.gpt.n_layer                                       | --model.gpt.n_layer needs a value
FIT --model.gpt.n_layer 1 2                                   | '2'
FIT --config                                                  | --config needs a value
FIT --model.gpt.n_layer x                                     | --model.gpt.n_layer is x: it must be a whole number
FIT --model.gpt.n_layer 1.5                                   | --model.gpt.n_layer
FIT --model.gpt.dropout much                                  | --model.gpt.dropout is much: it must be a number
FIT --model.gpt.bias 7                                        | --model.gpt.bias is 7: it must be true or false
FIT --model.gpt.position sinus                                | one of none, learned, rope
FIT --model.gpt.norm batchnorm                                | --model.gpt.norm
FIT --model.gpt.activation swish                              | --model.gpt.activation
FIT --model.gpt 5                                             | --model.gpt is 5
FIT --model.optimizer.name sgd                                | one of adamw, muon
FIT --model.optimizer.betas [0.9]                             | --model.optimizer.betas is [0.9]: it must be a list of 2
FIT --model.optimizer.betas 0.9                               | --model.optimizer.betas
FIT --model.schedule.shape stairs                             | --model.schedule.shape
FIT --model.compile maybe                                     | --model.compile
FIT --seed_everything abc                                     | --seed_everything
FIT --trainer.max_steps ten                                   | --trainer.max_steps is ten
FIT --trainer.precision 7                                     | --trainer.precision is 7
FIT --trainer.callbacks foo.Bar                               | --trainer.callbacks
FIT --trainer.callbacks.class_path foo.Bar                    | foo.Bar
FIT --trainer.logger foo                                      | --trainer.logger
FIT --trainer.accelerator gpuu                                | gpuu
FIT --trainer.max_steps 1e12                                  | is 1e12: it must be a whole number, written in digits
FIT --model.optimizer.lr inf                                  | --model.optimizer.lr is inf: it must be a finite number
FIT --model.optimizer.lr .inf                                 | it must be above 0, and finite
FIT --trainer.devices 0                                       | trainer
FIT --trainer.devices some                                    | trainer
FIT --trainer.strategy nope                                   | nope
FIT --trainer.max_time tomorrow                               | trainer
FIT --trainer.strategy ddp_spawn                              | choose trainer.strategy ddp
FIT --trainer.devices 2 --trainer.strategy single_device      | asks for 2: choose trainer.strategy ddp
FIT --trainer.devices 2 --trainer.val_check_interval 0:0:0:9  | trainer.val_check_interval is a time
FIT --model.optimizer.name adamw SHARDED                      | init_args.save_distributed_checkpoint false
FIT --trainer.accelerator tpu                                 | torch_xla
FIT --trainer.precision transformer-engine                    | transformer_engine
FIT --trainer.profiler clock                                  | profiler
FIT --trainer.gradient_clip_algorithm value2                  | gradient_clip_algorithm
FIT --trainer.limit_val_batches 1.5                           | limit_val_batches
FIT --trainer.max_epochs 0                                    | trainer.max_epochs is 0
FIT --trainer.min_epochs 2                                    | trainer.min_epochs is 2
FIT --trainer.min_epochs 1                                    | trainer.min_epochs is 1
FIT --trainer.default_root_dir somewhere                      | trainer.default_root_dir is somewhere
FIT --trainer.min_steps 50                                    | trainer.min_steps is 50
FIT --trainer.check_val_every_n_epoch 2                       | trainer.check_val_every_n_epoch is 2
FIT --trainer.num_nodes 0                                     | num_nodes
FIT --trainer.logger.class_path os.system                     | --trainer.logger.class_path is os.system
FIT --seed_everything 99999999999999999999                    | seed_everything is 99999999999999999999
FIT --data.block_size 8                                       | --model.gpt.block_size
FIT --model.seed 3                                            | --seed_everything
FIT --model.gpt.n_head 3                                      | --model.gpt.n_embd is 16, which is not a multiple
FIT --model.gpt.n_embd 6                                      | model.gpt.position is rope
FIT --model.gpt.n_head 0                                      | model.gpt.n_head is 0
FIT --model.gpt.n_embd 0                                      | model.gpt.n_embd is 0
FIT --model.gpt.block_size 0                                  | model.gpt.block_size is 0
FIT --model.gpt.n_layer -1                                    | model.gpt.n_layer is -1
FIT --model.gpt.dropout 1                                     | model.gpt.dropout is 1.0
FIT --model.gpt.dropout -0.1                                  | model.gpt.dropout is -0.1
FIT --model.gpt.logit_softcap 0                               | model.gpt.logit_softcap is 0.0
FIT --model.gpt.vocab_size 3                                  | model.gpt.vocab_size is 3
FIT --model.optimizer.lr 0                                    | model.optimizer.lr is 0.0
FIT --model.optimizer.lr nan                                  | model.optimizer.lr is nan
FIT --model.optimizer.weight_decay -1                         | model.optimizer.weight_decay
FIT --model.optimizer.betas [0.9,1.5]                         | model.optimizer.betas
FIT --model.optimizer.muon_momentum 1                         | model.optimizer.muon_momentum
FIT --model.schedule.warmup_steps -1                          | model.schedule.warmup_steps
FIT --model.schedule.final_fraction 2                         | model.schedule.final_fraction
FIT --model.schedule.decay_fraction 0                         | model.schedule.decay_fraction
FIT --model.tokenizer hello                                   | tokenizer
FIT --data.batch_size 0                                       | data.batch_size is 0
FIT --data.batch_size 1.5                                     | --data.batch_size
FIT --data.eval_batch_size 0                                  | data.eval_batch_size is 0
FIT --data.estimate_batches -1                                | data.estimate_batches is -1
FIT --data.val_fraction 0                                     | data.val_fraction is 0.0
FIT --data.val_fraction 1                                     | data.val_fraction is 1.0
FIT --data.fallback tinyshakespeare                           | data.fallback
FIT --trainer.max_steps 0                                     | trainer.max_steps is 0
FIT --trainer.max_steps -1                                    | trainer.max_steps is -1
FIT --trainer.limit_train_batches 5                           | trainer.limit_train_batches
FIT --trainer.val_check_interval 0                            | trainer.val_check_interval
FIT --trainer.val_check_interval 1.5                          | trainer.val_check_interval
FIT --trainer.accumulate_grad_batches 0                       | trainer.accumulate_grad_batches
FIT --trainer.accumulate_grad_batches 3                       | data.batch_size is 8
FIT --trainer.log_every_n_steps 0                             | trainer.log_every_n_steps
FIT --trainer.gradient_clip_val -1                            | trainer.gradient_clip_val
FIT --save_every_n_steps 0                                    | save_every_n_steps is 0
FIT --threads 0                                               | --threads is 0
FIT --threads 1025                                            | --threads is 1025: it must be 1 to 1,024, or null
FIT --average.decay 1                                         | average.decay is 1.0: it must be 0 (off) or more
FIT --model.gpt.token_noise -0.1                              | model.gpt.token_noise is -0.1
FIT --sample_text.max_new_tokens -1                           | sample_text.max_new_tokens
FIT --sample_text.temperature -1                              | --sample_text.temperature
FIT --sample_text.top_k 0                                     | --sample_text.top_k
FIT --config {}/missing.yaml                                  | {}/missing.yaml
FIT --config {}/nothing                                       | {}/nothing is a folder
FIT --config bass                                             | --config bass
FIT --config {}/list.yaml                                     | {}/list.yaml
FIT --config {}/empty.yaml                                    | {}/empty.yaml
FIT --config {}/word.yaml                                     | {}/word.yaml
FIT --config {}/broken.yaml                                   | {}/broken.yaml, line
FIT --config {}/colon.yaml                                    | {}/colon.yaml, line 1
FIT --config {}/binary.yaml                                   | {}/binary.yaml
FIT --config {}/typo.yaml                                     | {}/typo.yaml: model.gpt.n_layers
FIT --config={}/typo.yaml                                     | {}/typo.yaml: model.gpt.n_layers
FIT --config {}/verb.yaml                                     | {}/verb.yaml: fit.trainer.max_steps
FIT --config {}/type.yaml                                     | --model.gpt.n_layer is [1]
FIT --config {}/group.yaml                                    | {}/group.yaml: trainer is 3
FIT --config {}/code.yaml                                     | {}/code.yaml, line 1: this is not YAML
FIT --config {}/tab.yaml                                      | {}/tab.yaml, line 2
FIT --config {}/key.yaml                                      | {}/key.yaml: 3 is not an option
FIT --config {}/LONG                                          | File name too long
FIT --config {}/start.yaml                                    | ckpt_path
FIT --data.corpus                                             | --data.corpus needs a value
FIT --data.corpus {}/missing.txt                              | missing.txt
FIT --data.corpus {}/short                                    | did you mean
FIT --data.corpus {}/nothing                                  | {}/nothing
FIT --data.corpus {}/*.nothing                                | matches no file
FIT --data.corpus ftp://example.com/a.txt                     | ftp://example.com/a.txt
FIT --data.corpus {}/empty.txt                                | {}/empty.txt
FIT --data.corpus {}/blank.txt                                | {}/blank.txt
FIT --data.corpus {}/one.txt                                  | {}/one.txt
FIT --data.corpus {}/short.txt                                | block_size
FIT --data.corpus {}/latin1.txt                               | {}/latin1.txt is not UTF-8
FIT --data.corpus {}/utf16.txt                                | UTF-16
FIT --data.corpus {}/picture.txt                              | {}/picture.txt
FIT --data.corpus {}/table.csv                                | data.text_column 'text'
FIT --data.corpus {}/broken.jsonl                             | {}/broken.jsonl
FIT --data.corpus {}/broken.txt.gz                            | {}/broken.txt.gz
FIT --data.val_corpus {}/missing.txt                          | missing.txt
FIT --data.val_corpus {}/one.txt                              | the validation part has 1 token,
FIT --data.tokenizer words                                    | data.tokenizer is 'words'
FIT --data.tokenizer {}/tokenizer.json                        | {}/tokenizer.json
FIT --data.tokenizer {}/notes.json                            | {}/notes.json
FIT --data.tokenizer bpe --data.vocab_size 100                | 100
FIT --run_dir /                                               | --run_dir /: give the folder a name
FIT --run_dir {}/p/q --trainer.devices 0                      | devices
FIT --run_dir {}/LONG                                         | File name too long
FIT --run_dir {}/file                                         | --run_dir {}/file
FIT --run_dir {}/file/below                                   | --run_dir {}/file/below
fit --ckpt_path {}/missing.ckpt                               | {}/missing.ckpt
fit --ckpt_path {}/LONG                                       | File name too long
fit --ckpt_path {}/run/metrics.csv                            | {}/run/metrics.csv
fit --ckpt_path {}/nothing                                    | {}/nothing
fit --ckpt_path=                                              | --ckpt_path
fit --ckpt_path                                               | --ckpt_path needs a value
fit --ckpt_path {}/run --model.gpt.n_embd 32                  | model.gpt.n_embd is 32
fit --ckpt_path {}/run --trainer.max_steps x                  | --trainer.max_steps
fit --ckpt_path {}/run --trainer.max_steps 4 --data.corpus {}/accent.txt  | data.corpus
fit --ckpt_path {}/run --trainer.max_steps 4 --model.init_from {}/run  | --model.init_from
validate                                                      | needs a --ckpt_path
validate --ckpt_path {}/missing                               | {}/missing
validate --ckpt_path {}/run --trainer.strategy ddp_spawn      | choose trainer.strategy ddp
validate --ckpt_path {}/run --run_dir {}/new                  | --run_dir is for training
validate --ckpt_path {}/run --data.corpus {}/accent.txt       | U+00E8
validate --ckpt_path {}/run --data.corpus {}/missing.txt      | missing.txt
validate --ckpt_path {}/run --trainer.limit_val_batches 0     | trainer.limit_val_batches is 0
test --ckpt_path {}/run --trainer.limit_test_batches 0        | trainer.limit_test_batches is 0
validate --ckpt_path {}/run --model.gpt.n_head 1              | model.gpt.n_head is 1
test --ckpt_path {}/file                                      | {}/file
export --ckpt_path {}/run                                     | --output
export --output {}/new                                        | --ckpt_path
export --ckpt_path {}/run --output {}/full                    | {}/full
export --ckpt_path {}/run --output {}/file/below              | {}/file/below
export --ckpt_path {}/run --output .                          | --output .
export --ckpt_path {}/run --outputt {}/new                    | did you mean --output?
play                                                          | --ckpt_path
play --ckpt_path                                              | --ckpt_path
play --ckpt_path {}/nothing                                   | {}/nothing
play --ckpt_path {}/run {}/none                               | {}/none
play --ckpt_path {}/run --output {}/file/below                | --output {}/file/below
play --ckpt_path {}/run --output {}/one.txt                   | --output {}/one.txt
play --ckpt_path {}/run --output                              | --output
play --ckpt_path {}/run --dtype float64                       | --dtype
play --ckpt_path {}/run --outputt {}/new                      | did you mean --output?
play {}/run                                                   | {}/run
predict                                                       | --ckpt_path
predict --ckpt_path {}/missing                                | {}/missing
PREDICT --trainer.accelerator gpuu                            | gpuu
PREDICT --trainer.devices 0                                   | devices
PREDICT --trainer.precision 7                                 | 7
PREDICT --trainer.strategy nope                               | nope
PREDICT --trainer.devices 2 --trainer.strategy ddp_spawn      | choose trainer.strategy ddp
PREDICT --trainer.devices 2 --trainer.strategy single_device  | asks for 2: choose trainer.strategy ddp
PREDICT --config {}/missing.yaml                              | {}/missing.yaml
PREDICT --config {}/list.yaml                                 | {}/list.yaml
PREDICT --config {}/typo.yaml                                 | {}/typo.yaml: model.gpt.n_layers
PREDICT -c {}/typo.yaml                                       | {}/typo.yaml: model.gpt.n_layers
PREDICT --config {}/code.yaml                                 | {}/code.yaml, line 1
PREDICT --prompt FILE:{}/nothing                              | --prompt FILE:{}/nothing
PREDICT --output {}/nothing                                   | --output {}/nothing
PREDICT --temprature 1                                        | did you mean --temperature?
PREDICT --temperature -1                                      | --temperature is -1
PREDICT --temperature hot                                     | --temperature is hot
PREDICT --top_k 0                                             | --top_k is 0
PREDICT --top_k 1.5                                           | --top_k is 1.5
PREDICT --top_p 0                                             | --top_p is 0
PREDICT --top_p 1.5                                           | --top_p is 1.5
PREDICT --min_p 2                                             | --min_p is 2
PREDICT --max_new_tokens 0                                    | --max_new_tokens is 0
PREDICT --max_new_tokens many                                 | --max_new_tokens is many
PREDICT --max_new_tokens 1e3                                  | is 1e3: it must be a whole number, written in digits
PREDICT --temperature inf                                     | --temperature is inf: it must be a finite number
PREDICT --temperature .inf                                    | (the most probable token) or more, and finite
PREDICT --top_k 1e1                                           | a whole number or null, written in digits
PREDICT --num_samples 0                                       | --num_samples is 0
PREDICT --seed x                                              | --seed is x
PREDICT --context all                                         | --context is all
PREDICT --weights_dtype int4                                  | --weights_dtype is int4
PREDICT --prompt ROMÉO                                        | U+00C9
PREDICT --prompt 🎭                                            | U+1F3AD
PREDICT --prompt a --unknown ignore                           | --unknown
PREDICT --prompt É --unknown replace:É                        | --unknown replace:É
PREDICT --prompt É --unknown replace:ab                       | --unknown
PREDICT --prompt a --prompts {}/prompts.txt                   | --prompts
PREDICT --prompt FILE:{}/missing                              | --prompt FILE:{}/missing
PREDICT --prompt FILE:{}/latin1.prompt                        | {}/latin1.prompt
PREDICT --prompts {}/missing                                  | {}/missing
PREDICT --prompts {}/prompts.txt                              | {}/prompts.txt
PREDICT --prompts {}/half.jsonl --unknown skip                | is an unpaired surrogate
PREDICT --prompts {}/prompts.jsonl                            | line 1
PREDICT --output {}/file                                      | --output {}/file
PREDICT --output {}/nowhere/drawn.txt                         | --output {}/nowhere/drawn.txt
PREDICT --stop=                                               | --stop
PREDICT --trainer.strategy telepathy                          | telepathy
PREDICT stray                                                 | 'stray'
completion                                                    | arguments are required: shell
completion fish                                               | invalid choice: 'fish'
ladder --rungs 99                                             | --rungs 99
ladder --config                                               | --config needs a value
ladder --trainer.logger false                                 | --trainer.logger is false
ladder --trainer.limit_val_batches 0                          | has no --trainer.limit_val_batches
ladder --seeds 0                                              | --seeds is 0
compare                                                       | arguments are required: RUN
compare nowhere                                               | nowhere is not a run folder
"""
CASES = [tuple(part.strip() for part in line.rsplit("|", 1)) for line in WRONG_USES.strip().splitlines()]


def test_there_are_more_than_sixty_wrong_uses() -> None:
    """No line is in the table twice."""
    assert len({use for use, _ in CASES}) == len(CASES) > 60


def test_the_readme_lists_these_wrong_uses_and_no_others() -> None:
    """`python tests/readme_tables.py` updates tests/README.md."""
    readme = (REPOSITORY / "tests" / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- table: Wrong uses -->")[2].partition("<!-- end of table -->")[0]
    listed = re.findall(r"^\| `(.*?)` \|", table, flags=re.MULTILINE)
    assert sorted(listed) == sorted(use.replace("{}/", "") for use, _ in CASES)


@pytest.mark.parametrize(("use", "named"), CASES, ids=[use for use, _ in CASES])
def test_a_wrong_use_gives_one_line_and_leaves_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, named: str
) -> None:
    """Exit code 2; the flag or the file is named; no run folder, no traceback, nothing on stdout."""
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in prepared.rglob("*")}
    command = use.replace("FIT", "fit --config {}/small.yaml --run_dir {}/new", 1)
    command = command.replace("PREDICT", "predict --ckpt_path {}/run", 1).replace("SHARDED", SHARDED)
    words = [word.replace("{}", str(prepared)).replace("LONG", 300 * "x") for word in command.split()]
    answer = gptlit(*words)
    assert answer.code == 2, answer
    assert answer.err.startswith("gptlit: ")
    assert answer.err.count("\n") == 1, answer.err
    assert named.replace("{}", str(prepared)) in answer.err
    assert answer.out == ""
    assert {path: path.stat().st_mtime_ns for path in prepared.rglob("*")} == before
    assert not list(tmp_path.rglob("*"))
    report(
        "Wrong uses",
        HEADER,
        f"`{use.replace('{}/', '')}`",
        answer.err.replace(f"{prepared}/", "").replace(300 * "x", "LONG"),
    )


def test_a_missing_gpu_is_refused_by_name(prepared: Path) -> None:
    """Lightning's own message has several lines."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    answer = gptlit(
        "fit", "--config", prepared / "small.yaml", "--trainer.accelerator", "gpu", "--run_dir", prepared / "n"
    )
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "gpu" in answer.err
    assert not (prepared / "n").exists()


# ---------------------------------------------------------------- unusual but valid texts


@pytest.mark.parametrize(
    ("content", "vocabulary"),
    [
        ("🎭 To be 🤔 or not\n".encode() * 60, 11),
        (b"\xef\xbb\xbf" + b"To be\n" * 200, 6),
        (b"To be\r\nor not\r" * 100, 9),
        (b"a" * 1000, 1),
        (b"To be" * 400_000, 5),
    ],
    ids=["emoji", "byte order mark", "CRLF and CR", "one character, many times", "a line of 2 MB"],
)
def test_unusual_texts_are_trained_on(prepared: Path, tmp_path: Path, content: bytes, vocabulary: int) -> None:
    """Tokens are characters, not bytes; byte order marks and carriage returns are not part of the vocabulary."""
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    arguments = ["--config", prepared / "small.yaml", "--run_dir", tmp_path / "run", "--data.corpus", text]
    answer = gptlit("fit", *arguments, "--trainer.limit_val_batches", 2)
    assert answer.code == 0, answer.err
    assert f" characters, {vocabulary} token{'s' * (vocabulary > 1)}\n" in answer.err


@pytest.mark.slow
def test_a_line_of_200_megabytes(prepared: Path, tmp_path: Path) -> None:
    """Guards against quadratic time, recursion and needless copies."""
    text = tmp_path / "text.txt"
    with text.open("wb") as file:
        for _ in range(200):
            file.write(b"0123456789abcdef" * 62_500)
    arguments = ["--config", prepared / "small.yaml", "--run_dir", tmp_path / "run", "--data.corpus", text]
    assert gptlit("fit", *arguments, "--trainer.limit_val_batches", 2).code == 0


def test_the_shortest_text_that_can_be_trained_on(prepared: Path, tmp_path: Path) -> None:
    """Each part holds one chunk; one character less is refused by name."""
    for length, code in ((161, 0), (160, 2)):  # 144 to train on, and 17 or 16 to validate on
        text = tmp_path / f"{length}.txt"
        text.write_text(PLAY.read_text(encoding="utf-8")[:length], encoding="utf-8")
        answer = gptlit(
            "fit", "--config", prepared / "small.yaml", "--run_dir", tmp_path / str(length), "--data.corpus", text
        )
        assert answer.code == code, answer.err


# ---------------------------------------------------------------- configurations are restored exactly


def parsed(path: Path, *flags: str) -> dict[str, Any]:
    """Return the settings of `gptlit fit --config PATH`, without training."""
    return dict(parse_fit(["--config", str(path), *flags]).settings)


finite = st.floats(1e-6, 1.0, allow_nan=False)
SETTINGS = st.fixed_dictionaries(
    {
        "seed_everything": st.integers(0, 2**40),
        "model.gpt.n_layer": st.integers(0, 48),
        "model.gpt.n_head": st.integers(1, 32),
        "model.gpt.dropout": st.floats(0.0, 0.99),
        "model.gpt.bias": st.booleans(),
        "model.gpt.position": st.sampled_from(["none", "learned", "rope"]),
        "model.gpt.logit_softcap": st.none() | finite,
        "model.optimizer.name": st.sampled_from(["adamw", "muon"]),
        "model.optimizer.lr": finite,
        "model.optimizer.betas": st.lists(finite, min_size=2, max_size=2),
        "data.corpus": st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1),
        "data.batch_size": st.integers(1, 4096),
        "data.val_fraction": st.floats(0.01, 0.99),
        "trainer.max_steps": st.integers(1, 10**9),
        "trainer.gradient_clip_val": st.none() | finite,
        "sample_text.prompt": st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20),
    }
)


def nested(leaves: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in leaves.items():
        *groups, last = name.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = value
    return tree


@given(leaves=SETTINGS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_dumped_configuration_is_read_back_equal(tmp_path: Path, leaves: dict[str, Any]) -> None:
    """Numbers, texts and null in config.yaml and in checkpoints are read back equal."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first.write_text(as_yaml(nested(leaves)), encoding="utf-8")
    once = parsed(first)
    assert {name: value for name, value in flat(once).items() if name in leaves} == leaves
    second.write_text(as_yaml(once), encoding="utf-8")
    assert parsed(second) == once


@pytest.mark.parametrize(
    "text", ["a\x85b", "дом\u2028家", "1e5", "-1_0.5E+3", "1.5", "null", "yes", "2024-01-01", "'", " "]
)
def test_every_string_is_read_back_equal_from_a_configuration(tmp_path: Path, text: str) -> None:
    """PyYAML reads 1e5 as a string and the parser reads it as a number; U+0085 is written as it is and read as a space.
    A run with such a prompt could not be resumed, or resumed with another prompt.
    """
    path = tmp_path / "config.yaml"
    path.write_text(as_yaml({"sample_text": {"prompt": text}}), encoding="utf-8")
    assert flat(parsed(path))["sample_text.prompt"] == text


def test_other_alphabets_are_not_escaped_in_a_configuration() -> None:
    assert as_yaml({"prompt": "дом"}) == "prompt: дом\n"


def test_the_configuration_of_a_run_reproduces_it(prepared: Path, tmp_path: Path) -> None:
    """`fit --config RUN/config.yaml` makes the same run in another folder."""
    shutil.copytree(prepared / "run", tmp_path / "run")
    answer = gptlit("fit", "--config", prepared / "run" / "config.yaml", "--run_dir", tmp_path / "again")
    assert answer.code == 0, answer.err
    ours, theirs = (load(path / "last.ckpt") for path in (tmp_path / "again", prepared / "run"))
    assert all(torch.equal(ours["state_dict"][name], weight) for name, weight in theirs["state_dict"].items())


def test_every_verb_has_wrong_uses() -> None:
    """A new verb needs wrong uses of its own."""
    verbs = {use.split()[0].replace("FIT", "fit").replace("PREDICT", "predict") for use, _ in CASES}
    assert set(VERBS) <= verbs


def test_an_empty_folder_of_the_user_survives_a_user_error(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    wrong = ("--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "nope")
    Path("mine").mkdir()
    for folder in ("mine", "new", "deep/new"):
        answer = gptlit("fit", "--config", config, "--run_dir", folder, *wrong)
        assert (answer.code, "nope" in answer.err) == (2, True)
    assert list(Path("mine").iterdir()) == []
    assert not Path("new").exists()
    assert not Path("deep").exists()
