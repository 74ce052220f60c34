"""Flags that change nothing: options of another verb, and settings that another setting makes meaningless.

Only flags are refused: a configuration file may hold settings of both kinds, since a later file or flag switches
between them, as in `--config base --model.optimizer.name adamw`.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gptlit.errors import UserError
from gptlit.model.config import REGULARISATION

MUON = ("muon_lr", "muon_momentum", "muon_weight_decay", "muon_interval")
OF_BLOCKS = (
    "n_head",
    "dropout",
    "attention_dropout",
    "qkv_bias",
    "residual",
    "mlp_ratio",
    "activation",
    "token_shift",
    "qk_norm",
)
SAMPLE = ("prompt", "temperature", "top_k", "seed", "show")
OF_A_NEW_RUN = {  # what a run that is resumed or evaluated cannot change, and why
    "model.tokenizer": "is that of the checkpoint",
    "fallback_epochs": "shortens new runs only",
}
# Options that `validate` and `test` do not have, since they change nothing there; for the Trainer's, see
# `trainer_settings.ONLY_FIT`.
MODEL_OF_FIT = {"optimizer", "schedule", "init_from", "compile", "checkpoint_activations", "teachers", "teacher_weight"}
DATA_OF_FIT = {"validate": {"estimate_batches"}, "test": {"estimate_batches", "batch_size"}}
Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """Settings that have an effect only together with a value of another one."""

    names: tuple[str, ...]
    depends_on: str
    used_with: Callable[[Any], bool]
    """Whether the settings have an effect with this value of `depends_on`."""
    reason: str
    """What is missing, for the message."""


CONDITIONS = (
    Condition(
        ("data.vocab_size",),
        "data.tokenizer",
        lambda value: value == "bpe",
        "it is the size of a vocabulary that data.tokenizer bpe learns",
    ),
    Condition(
        ("data.split_seed",), "data.split", lambda value: value == "documents", "it chooses documents for documents"
    ),
    Condition(
        tuple(f"model.optimizer.{name}" for name in MUON),
        "model.optimizer.name",
        lambda value: value == "muon",
        "it is a setting of muon",
    ),
    Condition(
        ("model.schedule.decay_fraction",), "model.schedule.shape", lambda value: value == "wsd", "only wsd has it"
    ),
    Condition(
        ("model.schedule.final_fraction",),
        "model.schedule.shape",
        lambda value: value != "constant",
        "only a rate that decays has it",
    ),
    Condition(("model.gpt.rope_base",), "model.gpt.position", lambda value: value == "rope", "it is a setting of rope"),
    Condition(("model.gpt.activation",), "model.gpt.mlp_ratio", bool, "it is a setting of the MLP, which 0 removes"),
    Condition(
        (*(f"model.gpt.{name}" for name in OF_BLOCKS), *(f"model.optimizer.{name}" for name in MUON)),
        "model.gpt.n_layer",
        bool,
        "it is a setting of the blocks, of which there are none",
    ),
    Condition(
        ("trainer.gradient_clip_algorithm",), "trainer.gradient_clip_val", bool, "without that value nothing is clipped"
    ),
    Condition(
        tuple(f"sample_text.{name}" for name in SAMPLE), "sample_text.max_new_tokens", bool, "0 turns samples off"
    ),
    Condition(("pictures.text",), "pictures.when", lambda value: value != "never", "no picture is drawn"),
    Condition(
        ("save_every_n_steps",),
        "trainer.enable_checkpointing",
        lambda value: value is not False,
        "nothing is saved",
    ),
    Condition(
        ("trainer.val_check_interval", "data.eval_batch_size", "data.estimate_batches"),
        "trainer.limit_val_batches",
        lambda value: value is None or value > 0,
        "nothing is validated",
    ),
    Condition(("fallback_epochs",), "data.fallback", lambda value: value is not None, "nothing can replace the corpus"),
    Condition(("report_stride",), "report", lambda value: value == "full", "it is a setting of --report full"),
)


def unused(given: Collection[str], settings: Settings) -> Iterator[UserError]:
    """Yield an error for each flag that has no effect with the other settings.

    Args:
        given: names of the flags.
        settings: all settings, flat.
    """
    for condition in CONDITIONS:
        if condition.depends_on not in settings or condition.used_with(settings[condition.depends_on]):
            continue
        for name in condition.names:
            if name in given:
                yield UserError(
                    f"is given, but {condition.depends_on} is {in_yaml(settings[condition.depends_on])}: "
                    f"{condition.reason}: leave it out",
                    name,
                )
    if "data.val_fraction" in given and settings.get("data.val_corpus") and not settings.get("data.fallback"):
        yield UserError(
            "is given, but data.val_corpus is a validation text of its own: leave one of them out", "data.val_fraction"
        )
    if settings.get("report") == "none" and "data.batch_size" in given:
        yield UserError("changes nothing without --report full: leave it out", "data.batch_size")


def refuse_flags_of_a_new_run(given: Collection[str]) -> None:
    """Refuse flags that change nothing in a run that is resumed or evaluated.

    Raises:
        UserError: names the flag.
    """
    for name, reason in OF_A_NEW_RUN.items():
        if name in given:
            raise UserError(f"{reason}: leave it out", name)


def refuse_options_of_fit(verb: str, given: Collection[str], of_fit: Collection[str], prefix: str = "") -> None:
    """Refuse options of `fit` that change nothing in an evaluation.

    Args:
        verb: validate or test.
        given: names of the flags, or of the settings in a file.
        of_fit: names of the options that only `fit` has.
        prefix: names the file.

    Raises:
        UserError: names the first one.
    """
    for name in sorted(given):
        if name in of_fit:
            advice = f"is for training: leave it out of gptlit {verb}"
            raise UserError(f"{prefix}{name} {advice}") if prefix else UserError(advice, name)


def refuse_regularisation(verb: str, given: Collection[str]) -> None:
    """Refuse flags of `model.gpt` that act in training only.

    Raises:
        UserError: names the first one.
    """
    refuse_options_of_fit(verb, given, {f"model.gpt.{name}" for name in REGULARISATION})


def refuse_other_architecture(given: Collection[str], wanted: Settings, gpt: Settings, source: str) -> None:
    """Refuse flags under `model.gpt` that contradict the model of `model.init_from`, which gives the architecture.

    Args:
        given: names of the flags.
        wanted: the settings under `model.gpt`.
        gpt: architecture of the run, made from that model.
        source: name of that model.

    Raises:
        UserError: names the first one, with both values.
    """
    for name, value in wanted.items():
        if f"model.gpt.{name}" in given and value != gpt[name] and (name, value) != ("vocab_size", 0):
            raise UserError(
                f"is {in_yaml(value)}, but the model of model.init_from ({source}) has {in_yaml(gpt[name])}: leave one "
                "of them out",
                f"model.gpt.{name}",
            )


def in_yaml(value: Any) -> str:
    """Return a value as the user types it: null, true."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
