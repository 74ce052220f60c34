"""Flags that would change nothing are refused by name; configuration files may hold settings of both kinds."""

from pathlib import Path
from typing import Any

import pytest
from command import extra_callbacks, gptlit, load, write_config
from lightning.pytorch.callbacks import LambdaCallback

from gptlit.cli.fit.plan import make_parser, names_in_flags, parse_fit
from gptlit.cli.fit.unused import CONDITIONS, MODEL_OF_FIT
from gptlit.cli.packaged import names_of_packaged_configs
from gptlit.cli.parser import option_names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and a run of two steps."""
    folder = tmp_path_factory.mktemp("unused")
    config = write_config(folder, trainer__max_steps=2)
    assert gptlit("fit", "--config", config, "--run_dir", folder / "run").code == 0
    return folder


def refused(answer: Any, said: str) -> bool:
    """Whether the answer is one line that begins in this way, with exit code 2."""
    return (answer.code, answer.out) == (2, "") and answer.err.count("\n") == 1 and answer.err.startswith(said)


# ---------------------------------------------------------------- fit

CONTRADICTIONS = [
    (("--data.vocab_size", 999), "--data.vocab_size is given, but data.tokenizer is char"),
    (("--data.split_seed", 5), "--data.split_seed is given, but data.split is tail"),
    *(
        (("--model.optimizer.name", "adamw", f"--model.optimizer.{name}={value}"), f"--model.optimizer.{name} is given")
        for name, value in (
            ("muon_lr", 0.1),
            ("muon_momentum", 0.8),
            ("muon_weight_decay", 0.2),
            ("muon_interval", 2),
        )
    ),
    (("--model.optimizer", "{name: adamw, muon_lr: 0.1}"), "--model.optimizer.muon_lr is given"),
    (("--model.schedule.decay_fraction", 0.3), "--model.schedule.decay_fraction is given, but model.schedule.shape is"),
    (
        ("--model.schedule.shape", "constant", "--model.schedule.final_fraction", 0.3),
        "--model.schedule.final_fraction is given, but model.schedule.shape is constant",
    ),
    (("--model.gpt.position", "learned", "--model.gpt.rope_base", 100), "--model.gpt.rope_base is given"),
    (("--model.gpt.mlp_ratio", 0, "--model.gpt.activation", "gelu"), "--model.gpt.activation is given"),
    *(
        (("--model.gpt.n_layer", 0, f"--model.{name}", value), f"--model.{name} is given, but model.gpt.n_layer is 0")
        for name, value in (("gpt.n_head", 2), ("gpt.dropout", 0.2), ("gpt.mlp_ratio", 2), ("optimizer.muon_lr", 0.1))
    ),
    (
        ("--trainer.gradient_clip_val", "null", "--trainer.gradient_clip_algorithm", "value"),
        "--trainer.gradient_clip_algorithm is given, but trainer.gradient_clip_val is null",
    ),
    *(
        (("--trainer.limit_val_batches", 0, f"--{name}", 3), f"--{name} is given, but trainer.limit_val_batches is 0")
        for name in ("trainer.val_check_interval", "data.eval_batch_size", "data.estimate_batches")
    ),
    (("--sample_text.top_k", 3), "--sample_text.top_k is given, but sample_text.max_new_tokens is 0"),
    (("--pictures.text", "To be"), "--pictures.text is given, but pictures.when is never"),
    (("--trainer.enable_checkpointing", "false", "--save_every_n_steps", 3), "--save_every_n_steps is given"),
    (("--fallback_epochs", 3), "--fallback_epochs is given, but data.fallback is null"),
    (("--data.val_corpus", "text.txt", "--data.val_fraction", 0.2), "--data.val_fraction is given"),
]


@pytest.mark.parametrize(("flags", "said"), CONTRADICTIONS)
def test_a_flag_that_another_setting_makes_meaningless_is_refused(
    folder: Path, tmp_path: Path, flags: tuple[Any, ...], said: str
) -> None:
    answer = gptlit("fit", "--config", folder / "small.yaml", "--run_dir", tmp_path / "run", *flags)
    assert refused(answer, f"gptlit: {said}"), answer.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--data.vocab_size", "300", "--data.tokenizer", "bpe"),
        ("--data.split", "documents", "--data.split_seed", "5"),
        ("--model.optimizer.muon_lr", "0.1"),
        ("--model.schedule.shape", "wsd", "--model.schedule.decay_fraction", "0.3"),
        ("--model.schedule.final_fraction", "0.1"),
        ("--model.optimizer.name", "adamw", "--model.optimizer.head_lr", "0.1"),
        ("--data.val_corpus", "x", "--data.val_fraction", "0.2", "--data.corpus", "y", "--data.fallback", "sample"),
    ],
)
def test_a_flag_that_has_an_effect_is_taken(folder: Path, flags: tuple[str, ...]) -> None:
    plan = parse_fit(["--config", str(folder / "small.yaml"), *flags])
    assert plan.flags == names_in_flags(flags)


@pytest.mark.parametrize("name", [name for name in names_of_packaged_configs() if "/" not in name])
def test_files_may_hold_settings_that_a_flag_switches_off(name: str) -> None:
    flags = ("--model.optimizer.name", "adamw", "--model.schedule.shape", "constant", "--data.tokenizer", "char")
    assert parse_fit(["--config", name, *flags]).settings["model"]["optimizer"]["name"] == "adamw"


def test_every_condition_names_options() -> None:
    """A renamed option would not be refused any more."""
    known = {name for verb in ("fit", "validate") for name in option_names(make_parser(verb))}
    assert {name for condition in CONDITIONS for name in (*condition.names, condition.depends_on)} <= known


def test_a_resumed_run_refuses_a_meaningless_flag_and_continues_without(folder: Path) -> None:
    resumed = ("fit", "--ckpt_path", folder / "run")
    assert refused(gptlit(*resumed, "--data.split_seed", 5), "gptlit: --data.split_seed is given")
    assert refused(gptlit(*resumed, "--model.tokenizer", "{}"), "gptlit: --model.tokenizer is that of the checkpoint")
    assert refused(gptlit(*resumed, "--fallback_epochs", 3), "gptlit: --fallback_epochs shortens new runs only")
    assert gptlit(*resumed).code == 0


# ---------------------------------------------------------------- model.init_from


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model.gpt.n_layer", 3), "--model.gpt.n_layer is 3, but the model of model.init_from ({}) has 1"),
        (("--model.gpt.norm", "none"), "--model.gpt.norm is none, but the model of model.init_from ({}) has rmsnorm"),
        (("--model.gpt", "{n_layer: 3}"), "--model.gpt.n_layer is 3, but the model of model.init_from ({}) has 1"),
        (("--data.tokenizer", "bpe"), "--data.tokenizer is bpe, but the model that the run starts from has its own"),
    ],
)
def test_a_flag_that_contradicts_the_model_to_start_from_is_refused(
    folder: Path, tmp_path: Path, flags: tuple[Any, ...], said: str
) -> None:
    start = ("fit", "--config", folder / "small.yaml", "--model.init_from", folder / "run")
    answer = gptlit(*start, "--run_dir", tmp_path / "run", *flags)
    assert refused(answer, f"gptlit: {said.format(folder / 'run')}"), answer.err
    assert not (tmp_path / "run").exists()


def test_flags_that_agree_with_the_model_to_start_from_and_regularisation_are_taken(
    folder: Path, tmp_path: Path
) -> None:
    start = ("fit", "--config", folder / "small.yaml", "--model.init_from", folder / "run")
    flags = ("--model.gpt.n_layer", 1, "--model.gpt.token_noise", 0.2, "--model.gpt.vocab_size", 0)
    answer = gptlit(*start, "--run_dir", tmp_path / "run", *flags, "--data.tokenizer", "char")
    assert answer.code == 0, answer.err
    gpt = load(tmp_path / "run" / "last.ckpt")["hyper_parameters"]["gpt"]
    assert (gpt["n_layer"], gpt["token_noise"]) == (1, 0.2)


def test_files_may_describe_another_model_than_the_one_to_start_from(folder: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, trainer__max_steps=1, model__gpt__n_layer=3)
    answer = gptlit("fit", "--config", config, "--model.init_from", folder / "run", "--run_dir", tmp_path / "run")
    assert answer.code == 0, answer.err


# ---------------------------------------------------------------- validate and test


@pytest.mark.parametrize("verb", ["validate", "test"])
@pytest.mark.parametrize(
    "flag",
    [
        "--data.estimate_batches=4",
        "--model.optimizer.lr=0.1",
        "--model.optimizer={lr: 0.1}",
        "--model.schedule.shape=cosine",
        "--model.compile=true",
        "--model.checkpoint_activations=true",
        "--model.init_from=run",
        "--model.gpt.dropout=0.5",
        "--model.gpt.token_noise=0.5",
        "--trainer.enable_model_summary=true",
        "--trainer.max_steps=3",
    ],
)
def test_an_evaluation_refuses_options_of_training(folder: Path, verb: str, flag: str) -> None:
    answer = gptlit(verb, "--ckpt_path", folder / "run", flag)
    assert refused(answer, f"gptlit: {flag.partition('=')[0]} is for training: leave it out of gptlit {verb}")


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_an_evaluation_offers_no_options_of_training(verb: str) -> None:
    """In its help and for the completion in a shell."""
    names = option_names(make_parser(verb))
    of_model = tuple(f"model.{name}" for name in MODEL_OF_FIT)
    assert not [name for name in names if name.startswith(of_model)]
    assert {"data.estimate_batches", "trainer.enable_model_summary"}.isdisjoint(names)


def test_an_evaluation_names_the_file_that_holds_a_setting_of_training(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  optimizer:\n    lr: 0.1\n", encoding="utf-8")
    answer = gptlit("validate", "--ckpt_path", folder / "run", "--config", "mine.yaml")
    assert refused(answer, "gptlit: --config mine.yaml: model.optimizer.lr is for training")


@pytest.mark.parametrize(
    ("verb", "flag", "said"),
    [
        ("validate", "--report_stride=3", "--report_stride is given, but report is none"),
        ("validate", "--data.batch_size=3", "--data.batch_size changes nothing without --report full"),
        ("test", "--data.batch_size=3", "--data.batch_size is for training"),
        ("validate", "--model.tokenizer={}", "--model.tokenizer is that of the checkpoint"),
        ("validate", "--trainer.limit_test_batches=1", "--trainer.limit_test_batches is not an option: did you mean"),
    ],
)
def test_an_evaluation_refuses_options_without_an_effect(folder: Path, verb: str, flag: str, said: str) -> None:
    assert refused(gptlit(verb, "--ckpt_path", folder / "run", flag), f"gptlit: {said}")


def test_the_report_uses_batch_size_and_stride(folder: Path) -> None:
    answer = gptlit(
        "validate", "--ckpt_path", folder / "run", "--report=full", "--report_stride=3", "--data.batch_size=3"
    )
    assert answer.code == 0, answer.err
    assert "stride 3" in answer.out
    assert "batches of 3 × 16" in answer.out


# ---------------------------------------------------------------- fast_dev_run


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_fast_dev_run_counts_optimizer_steps(folder: Path, accumulation: int) -> None:
    """Lightning counts micro-batches, which were fewer steps."""
    batches: list[int] = []
    flags = ("--trainer.fast_dev_run", 3, "--trainer.accumulate_grad_batches", accumulation)
    with extra_callbacks(LambdaCallback(on_train_batch_end=lambda trainer, *_: batches.append(trainer.global_step))):
        answer = gptlit("fit", "--config", folder / "small.yaml", *flags)
    assert answer.code == 0, answer.err
    assert (len(batches), batches[-1]) == (3 * accumulation, 3)
    assert "\ndone\n" in answer.err
    assert "stopped after" not in answer.err


def test_fast_dev_run_of_a_resumed_run_makes_its_steps(folder: Path, tmp_path: Path) -> None:
    assert gptlit("fit", "--config", folder / "small.yaml", "--run_dir", tmp_path / "run").code == 0
    before = load(tmp_path / "run" / "last.ckpt")["global_step"]
    steps: list[int] = []
    with extra_callbacks(LambdaCallback(on_train_batch_end=lambda trainer, *_: steps.append(trainer.global_step))):
        answer = gptlit("fit", "--ckpt_path", tmp_path / "run", "--trainer.fast_dev_run", 3)
    assert answer.code == 0, answer.err
    assert steps == [before + 1, before + 2, before + 3]
    assert load(tmp_path / "run" / "last.ckpt")["global_step"] == before
