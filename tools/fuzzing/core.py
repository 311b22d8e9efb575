"""Numbered cases until the time is over, with progress, counts, and a command for each failure."""

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

MANY = 20  # failures, after which a run ends


@dataclass
class Session:
    """One target's run.

    Attributes:
        target: its name on the command line.
        seconds: how long to go on; a case that has begun is finished, and there is at least one.
        seed: the number of the first case; case n depends on n alone.
        count: how many cases at most, None for as many as fit into the time.
    """

    target: str
    seconds: float
    seed: int = 0
    count: int | None = None
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    done: int = 0
    stopped: bool = False

    def __post_init__(self) -> None:
        self._begin = self._said = time.monotonic()

    def seeds(self) -> Iterable[int]:
        """The numbers of the cases, until time or count are used up."""
        while not self.stopped and (self.count is None or self.done < self.count):
            if self.done and time.monotonic() - self._begin > self.seconds:
                break
            yield self.seed + self.done
            self.done += 1
            if time.monotonic() - self._said > 10:
                self._said = time.monotonic()
                self.say(f"{self.done} cases, {len(self.failures)} failures, next seed {self.seed + self.done}")

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"[{self.target} {time.monotonic() - self._begin:.0f} s] {text}", flush=True)

    def fail(self, seed: int, reason: str) -> None:
        """Record a failure of case `seed`, and print what repeats it."""
        command = f"{sys.executable} tools/fuzz.py {self.target} --seed {seed} --count 1"
        self.failures.append(f"seed {seed}: {reason}\n    {command}")
        self.say(f"FAILURE, {self.failures[-1]}")
        if len(self.failures) == MANY:
            self.say("so many failures are one: stopped")
            self.stopped = True

    def try_each(self, case: Callable[[int], str]) -> None:
        """Run `case` for every seed; it returns a word for the counts and raises for a failure."""
        for seed in self.seeds():
            try:
                self.outcomes[case(seed)] += 1
            except Exception as error:
                self.fail(seed, f"{type(error).__name__}: {error}")

    def summary(self) -> str:
        """The counts, in one line and one more for each note."""
        counts = ", ".join(f"{count} {word}" for word, count in sorted(self.outcomes.items()))
        last = self.seed + max(self.done, 1) - 1
        words = (
            f"{self.target}: {self.done} cases (seeds {self.seed} to {last}), {len(self.failures)} failures; {counts}"
        )
        return "\n".join([words, *(f"    {note}" for note in self.notes)])
