"""Detects steps during which the process was suspended: by Ctrl-Z, a debugger, a paused container."""

from dataclasses import dataclass

SECONDS, USUAL = 60.0, 20.0  # a step that takes longer than so many seconds and so many usual steps is long


@dataclass
class Suspensions:
    """Counts a long step only after another long one: the machine has become slow.

    Args:
        long: whether the latest step was long.
    """

    long: bool = False

    def counts(self, seconds: float, usual: float | None) -> bool:
        """Return whether the time of a step counts.

        Args:
            seconds: time of the step.
            usual: seconds that such a step takes; None while unknown.
        """
        before, self.long = self.long, usual is not None and seconds > max(SECONDS, USUAL * usual)
        return before or not self.long
