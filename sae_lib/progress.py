"""One way to show how long work takes: a bar for a person, a line now and then for a batch."""

from __future__ import annotations

import time


class Progress:
    """A counter of work done, shown as a tqdm bar (``mode="live"``) or as lines at most every ``every`` seconds.

    Used as a context manager; ``advance(n, note)`` counts. The rate is over the work of this session: what was
    already there when it started (``initial``) does not make it look faster.
    """

    def __init__(self, total: int, label: str, mode: str = "live", unit: str = "tokens", *, initial: int = 0,
                 every: float = 20.0):
        self.total, self.label, self.mode, self.unit, self.every = total, label, mode, unit, every
        self.initial, self.done, self.bar = initial, initial, None

    def __enter__(self) -> Progress:
        self.started = self.printed = time.perf_counter()
        if self.mode == "live":
            from tqdm.auto import tqdm

            self.bar = tqdm(total=self.total, initial=self.initial, desc=self.label, unit=f" {self.unit}",
                            unit_scale=True, mininterval=0.5, smoothing=0.1)
        return self

    def advance(self, amount: int = 1, note: str = "") -> None:
        """Count ``amount`` more; ``note`` is a few words shown beside (a loss, a share)."""
        self.done += amount
        if self.bar is not None:
            if note:
                self.bar.set_postfix_str(note, refresh=False)
            self.bar.update(amount)
        elif time.perf_counter() - self.printed >= self.every:
            self.printed = time.perf_counter()
            self._print(note)

    @property
    def seconds(self) -> float:
        """Seconds since the work started."""
        return time.perf_counter() - self.started

    @property
    def rate(self) -> float:
        """Units per second in this session."""
        return (self.done - self.initial) / max(self.seconds, 1e-9)

    def _print(self, note: str) -> None:
        left = (self.total - self.done) / max(self.rate, 1e-9)
        print(f"{self.label}: {self.done:,} of {self.total:,} {self.unit} ({self.done / max(self.total, 1):.0%}), "
              f"{self.rate:,.0f} {self.unit}/s, {clock(left)} left{', ' + note if note else ''}", flush=True)

    def __exit__(self, kind, *_) -> None:
        if self.bar is not None:
            self.bar.close()
        elif kind is None:
            print(f"{self.label}: {self.done:,} {self.unit} in {clock(self.seconds)} "
                  f"({self.rate:,.0f} {self.unit}/s)", flush=True)


def progress(total: int, label: str, mode: str = "live", unit: str = "tokens", *, initial: int = 0,
             every: float = 20.0) -> Progress:
    """A progress display of ``total`` units of work: ``with progress(...) as bar: bar.advance(n, "loss 0.12")``."""
    return Progress(total, label, mode, unit, initial=initial, every=every)


def clock(seconds: float) -> str:
    """Seconds in words that are quick to read: ``42 s``, ``3:05 min``, ``2:10 h``."""
    seconds = round(max(seconds, 0))
    if seconds < 90:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    return f"{minutes}:{rest:02d} min" if minutes < 90 else f"{minutes // 60}:{minutes % 60:02d} h"
