"""What changes when the bundled play replaces a corpus that cannot be downloaded: a shorter run."""

from dataclasses import asdict

import yaml
from jsonargparse import Namespace

from gptlit.cli.fit.plan import Plan
from gptlit.cli.settings import as_yaml
from gptlit.errors import require

VALIDATIONS = 8  # of a shortened run


def shorten_run(plan: Plan, objects: Namespace) -> str | None:
    """Shorten a run whose corpus was replaced by `data.fallback`, so that it does not memorise that small text.

    The run makes `fallback_epochs` passes over the text and at least `trainer.min_steps`, unless `--trainer.max_steps`
    is given as a flag. Its configuration then names the text that it really uses, so that it resumes with it.

    Args:
        plan: of a new run.
        objects: made of the plan; the text is loaded. Trainer settings and `model.run_config` are changed in place.

    Returns:
        The line that says so; None if nothing changes.
    """
    data, trainer, passes = objects.data, objects.trainer, plan.settings["fallback_epochs"]
    require(passes >= 0, "fallback_epochs", passes, "0 (do not shorten) or more")
    if plan.start is not None or not data.corpus.used_fallback:
        return None
    settings = yaml.safe_load(objects.model.run_config)
    settings["data"] |= asdict(data.text.of_fallback())
    line = None
    steps = round(passes * len(data.train_tokens) / (data.batch_size * data.block_size))
    steps = max(steps, trainer.min_steps or 0)
    if passes and "trainer.max_steps" not in plan.flags and 0 < steps < trainer.max_steps:
        changed = {"max_steps": steps}
        interval = max(1, steps // VALIDATIONS)
        given = "trainer.val_check_interval" in plan.flags
        if not given and isinstance(trainer.val_check_interval, int) and trainer.val_check_interval > interval:
            changed["val_check_interval"] = interval
        what = ", ".join(f"trainer.{name} {trainer[name]:,} -> {value:,}" for name, value in changed.items())
        times = "1 pass over the short text is" if passes == 1 else f"{passes:g} passes over the short text are"
        line = f"{times} enough (fallback_epochs): {what}"
        settings["trainer"] |= changed
        for name, value in changed.items():
            trainer[name] = value
    objects.model.run_config = as_yaml(settings)
    return line
