"""Settings of a checkpoint: which are taken over, and which must not change."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from gptlit.checkpoint.files import ResumePoint
from gptlit.cli.settings import flat, leaves_of
from gptlit.data import TextDataModule
from gptlit.errors import UserError
from gptlit.model.config import REGULARISATION

# Settings that determine the shapes of the weights and of the optimizer state.
FIXED = (
    "model.gpt",
    "model.optimizer.name",
    "model.optimizer.decay",
    "data.tokenizer",
    "data.vocab_size",
)
FREE = tuple(f"model.gpt.{name}" for name in REGULARISATION)
HEAD_LR = "model.optimizer.head_lr"  # null or not: whether the head is a parameter group of its own
LIGHTNING = re.compile(r"(lightning\.pytorch\.(callbacks|strategies)\.\w+)?")
TEXT_ARGUMENTS = ("monitor", "dirpath", "filename")  # of callbacks; a text there names no code
NOT_TRUSTED = "it may name code: give it again, if you trust it"
# Not settings of the run, but of one start of it.
OF_ONE_START = ("ckpt_path", "run_dir", "trainer.default_root_dir", "trainer.max_time", "model.init_from")


def settings_to_take_over(
    stored: Mapping[str, Any], verb: str, known: Collection[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the stored settings that a verb starts from, and why others are left out.

    A checkpoint may come from anywhere, and nothing in it may choose which code is executed. A setting that may name
    a class or a function is left out; so is one that this version does not know.

    Args:
        stored: from `stored_config`.
        verb: fit takes over all settings, the other verbs those that the loss depends on.
        known: names of all options of the verb.

    Returns:
        Nested settings, and reasons by name.
    """
    kept: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for key, value in flat(stored, stop_at=leaves_of(known)).items():
        part = key.partition(".")[0]
        evaluated = part in ("seed_everything", "model", "data") or key == "trainer.precision"
        needed = verb == "fit" or (evaluated and key in known)
        if key in OF_ONE_START or not needed:
            continue
        if key not in known:
            left_out[key] = "this version does not know it"
            continue
        if part == "trainer":
            items = value if isinstance(value, list) else [value]
            left_out |= {f"{key} {readable(item)}": NOT_TRUSTED for item in items if not is_plain(item)}
            plain = [item for item in items if is_plain(item)]
            if items and not plain:  # the default: without `trainer.logger`, curves go to the run folder
                continue
            value = plain if isinstance(value, list) else value
        group = kept
        *groups, name = key.split(".")
        for step in groups:
            group = group.setdefault(step, {})
        group[name] = value
    return kept, left_out


def is_plain(value: Any, name: str = "") -> bool:
    """Whether a setting of the Trainer consists of numbers, switches and bare words, which name no code.

    Lightning's own callbacks and strategies count too, if their arguments are plain.

    Args:
        value: of the setting, or of an argument of a class.
        name: of the argument.
    """
    if isinstance(value, Mapping):
        known = bool(LIGHTNING.fullmatch(str(value.get("class_path", ""))))
        return known and all(is_plain(item, key) for key, item in value.items() if key != "class_path")
    if isinstance(value, list):
        return all(map(is_plain, value))
    if name in TEXT_ARGUMENTS or value is None or isinstance(value, bool | int | float):
        return True
    return bool(re.fullmatch(r"[\w:+, -]*", str(value)))


def readable(value: Any) -> str:
    """A setting for a line on the terminal: classes by their names, with the arguments that are not off."""
    if isinstance(value, list):
        return f"[{', '.join(map(readable, value))}]"
    if isinstance(value, Mapping) and "class_path" in value:
        arguments = (value.get("init_args") or {}).items()
        given = ", ".join(f"{key}={item}" for key, item in arguments if item not in (None, False))
        return f"{value['class_path'].rpartition('.')[2]}({given})"
    return "none" if value is None else str(value)


def refuse_what_is_fixed(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from those of the checkpoint, as (then, now).

    Args:
        now: flat settings of this start.
        then: flat settings of the checkpoint.

    Raises:
        UserError: for the first one that a checkpoint fixes.
    """
    if HEAD_LR in now:
        then = {HEAD_LR: None, **then}  # checkpoints of versions without it
    changes = {key: (then[key], now[key]) for key in sorted(then.keys() & now.keys()) if then[key] != now[key]}
    for key, (old, new) in changes.items():
        if is_fixed(key, old, new):
            was, is_now = ("null" if value is None else repr(value) for value in (old, new))
            raise UserError(
                f"{key} is {is_now}, but the checkpoint was trained with {was}: "
                "leave it out, or train a new model with gptlit fit, without --ckpt_path"
            )
    return changes


def is_fixed(key: str, old: Any, new: Any) -> bool:
    """Return whether a run cannot be resumed after this change of a setting."""
    if key == HEAD_LR:
        return (old is None) != (new is None)
    return key not in FREE and any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED)


def refuse_another_text(checkpoint: dict[str, Any], datamodule: TextDataModule) -> None:
    """Check that the text, and the position of its split, are those of the checkpoint.

    Raises:
        UserError: if they differ.
    """
    trained_on = checkpoint.get("gptlit", {}).get("corpus")
    if not trained_on:
        return
    now = datamodule.fingerprint()
    before, after = str(trained_on["sha256"]), str(now["sha256"])
    if before != after:
        raise UserError(
            f"data.corpus {datamodule.corpus_spec!r} is not the text that the checkpoint was trained on "
            f"({trained_on['name']}, SHA-256 {before[:12]}…, now {after[:12]}…): give that text, or start a new run "
            "without --ckpt_path"
        )
    first, now_first = trained_on["train_characters"], now["train_characters"]
    if first != now_first:
        raise UserError(
            "data.val_fraction or data.val_corpus has changed: the run was trained on the first "
            f"{first:,} characters of its text, and now it would be {now_first:,}: drop the flag"
        )


def is_finished(start: ResumePoint, max_steps: int) -> bool:
    """Return whether a run is finished: all steps, the final validation, and last.ckpt after it."""
    if start.steps != max_steps:
        return start.steps > max_steps
    state = start.checkpoint.get("callbacks", {}).get("RunCheckpoints")
    validated = state is None or state["validated_step"] == start.steps
    return validated and (start.path.name != "best.ckpt" or start.run_dir is None)
