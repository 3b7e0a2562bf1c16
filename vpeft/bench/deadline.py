"""The time that a measurement may take."""

import time


class Deadline:
    """When to stop.

    Args:
        minutes: from now on; None for ever.
        outer: one that ends it too.
    """

    def __init__(self, minutes: float | None, outer: "Deadline | None" = None):
        ends = [] if minutes is None else [time.monotonic() + 60 * minutes]
        self.minutes = minutes if minutes is not None or outer is None else outer.minutes
        self.end = min([*ends, *([] if outer is None or outer.end is None else [outer.end])], default=None)

    def over(self) -> bool:
        """Whether the time is spent."""
        return self.end is not None and time.monotonic() >= self.end

    def __str__(self) -> str:
        return f"the budget of {self.minutes:g} minutes was spent"
