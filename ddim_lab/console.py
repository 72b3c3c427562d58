"""What a command prints: on a terminal, into a log, or where nobody reads. It never decides whether work succeeds."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final, Literal, Self, TextIO, cast, final, get_args

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["PROGRESS", "Progress", "ProgressMode", "duration", "forgiving_output", "show_progress", "tick"]

# -- how far the work is ---------------------------------------------------------------------------------

ProgressMode = Literal["auto", "bar", "lines", "none"]
PROGRESS: Final[tuple[ProgressMode, ...]] = get_args(ProgressMode)
"""A bar; or plain lines; or neither. "auto": a bar where stderr is a terminal, else lines."""

EVERY: Final = 30.0
"""Seconds between two lines, at least."""

_mode: ProgressMode = "auto"
_running: list[Progress] = []


def show_progress(mode: ProgressMode) -> None:
    """How this process shows progress from now on."""
    global _mode
    _mode = mode


def tick() -> None:
    """A forward of the network is done: in a log, the work that goes on says so when a line is due."""
    if _running:
        _running[-1].tick()


@final
class Progress:
    """Context: how far a piece of work is, on stderr.

    Args:
        what: the work, in front of it.
        total: how many units it has.
        unit: in the singular, as "image".
        done: how many are done before it starts.
        shown: whether it is shown at all.
    """

    def __init__(self, what: str, total: int, unit: str, *, done: int = 0, shown: bool = True) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._before = done
        self._ticks = 0
        self._note = ""
        bar = _mode == "bar" or (_mode == "auto" and sys.stderr.isatty())
        self._lines = shown and not bar and _mode != "none"
        self._bar: tqdm[Any] | None = None
        if shown and bar:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, desc=what, unit=unit, leave=False)

    def __enter__(self) -> Self:
        self._started = self._told = time.monotonic()
        _running.append(self)
        return self

    def __exit__(self, *error: object) -> None:
        if self in _running:  # a generator may be closed late
            _running.remove(self)
        if self._bar is not None:
            self._bar.close()

    def update(self, count: int = 1, *, in_rate: bool = True) -> None:
        """`count` more units are done; without `in_rate` the rate is of those after them."""
        self._done += count
        if not in_rate:
            self._before, self._started = self._done, time.monotonic()
        self._ticks = 0
        if self._bar is not None:
            self._bar.update(count)
        self._tell()

    def note(self, words: str) -> None:
        """What is shown beside the units from now on."""
        self._note = words
        if self._bar is not None:
            self._bar.set_postfix_str(words, refresh=False)

    def tick(self) -> None:
        """A forward is done."""
        self._ticks += 1
        self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if not self._lines or now - self._told < EVERY:
            return
        self._told = now
        new = self._done - self._before
        parts = [f"{self._done:,} of {self._total:,} {self._unit}s"]
        if self._ticks:
            parts.append(f"{self._ticks:,} forwards into the next")
        if new:
            rate = new / (now - self._started)
            parts.append(f"{rate:.3g} {self._unit}s/s")
            parts.append(f"{_duration((self._total - self._done) / rate)} left")
        if self._note:
            parts.append(self._note)
        print(f"{self._what}: {', '.join(parts)}", file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# -- output that is not there, or not UTF-8 --------------------------------------------------------------

PLAIN: Final = {
    **{"σ̂": "sigma-hat", "η": "eta", "σ": "sigma", "α": "alpha", "β": "beta", "ε": "eps", "ᾱ": "alpha_bar"},
    **{"±": "+-", "−": "-", "–": "-", "—": "-", "×": "x", "·": "|", "→": "->", "…": "...", "²": "^2", "≤": "<="},
    **{"“": '"', "”": '"', "‘": "'", "’": "'", "≥": ">=", "\N{NO-BREAK SPACE}": " "},
}
"""What we print beyond ASCII, for an output that has no such characters."""


@contextlib.contextmanager
def forgiving_output() -> Iterator[None]:
    """Wraps a command: what it prints degrades where the output can't take it, and no failure to print is an error."""
    if isinstance(sys.stdout, _Output) and isinstance(sys.stderr, _Output):  # a job in the command's own process
        yield
        return
    for number in (0, 1, 2):  # a file opened later must not become the closed stdout
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    ours = _Output(sys.stdout, "stdout"), _Output(sys.stderr, "stderr")
    sys.stdout, sys.stderr = (cast("TextIO", output) for output in ours)
    try:
        yield
    finally:
        for output in ours:
            output.flush()
        sys.stdout, sys.stderr = before


@final
class _Output:
    """A text stream whose `write` and `flush` fail for nobody.

    Args:
        stream: where it goes; None where it was closed before this process began.
        name: of it, for the one line that says that it can't be written.
    """

    def __init__(self, stream: TextIO | None, name: str) -> None:
        self._stream, self._name = stream, name
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        self.closed = False

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(_encodable(text, self.encoding))
            except (OSError, ValueError) as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._give_up(error)

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        if self._stream is None:
            raise AttributeError(name)
        return getattr(self._stream, name)

    def _give_up(self, error: OSError | ValueError) -> None:
        """What is printed from now on, and what is in the stream's buffer, goes nowhere."""
        stream, self._stream = self._stream, None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, cast("TextIO", stream).fileno())
            os.close(nowhere)
        if isinstance(error, OSError) and error.errno != errno.EPIPE:  # who closes a pipe has read enough
            print(f"ddim_lab: {self._name} can't be written ({error.strerror}); the files are", file=sys.stderr)


def _encodable(text: str, encoding: str) -> str:
    """The text in the encoding's characters; stderr would show those that it lacks as \\xb1 and the like."""
    with contextlib.suppress(UnicodeEncodeError):
        text.encode(encoding)
        return text
    for character, words in PLAIN.items():
        try:
            character.encode(encoding)
        except UnicodeEncodeError:
            text = text.replace(character, words)
    return text.encode(encoding, "replace").decode(encoding)


def duration(seconds: float) -> str:
    """Seconds as people say them: in s, min or h."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
