"""Tells a step during which the process was suspended (Ctrl-Z, a debugger, a paused container) from a slow one."""

from dataclasses import dataclass

SECONDS, USUAL = 60.0, 20.0  # a longer step than so many seconds and so many usual steps


@dataclass
class Suspensions:
    """Remembers whether the latest step was left out: two such steps in a row are a slow machine, and count."""

    left_out: bool = False

    def counts(self, seconds: float, usual: float | None) -> bool:
        """Return whether the time of a step counts.

        Args:
            seconds: time of the step.
            usual: seconds that such a step takes; None while unknown.
        """
        self.left_out = usual is not None and seconds > max(SECONDS, USUAL * usual) and not self.left_out
        return not self.left_out
