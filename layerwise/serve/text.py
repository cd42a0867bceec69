"""A request's text as it comes: whole characters only, nothing of a stop string.

`Writer` shows what is safe: not the bytes of a character that is not whole yet, and not the beginning of what may
become a stop string.
"""

from __future__ import annotations

from collections.abc import Sequence

from layerwise.generate.text import UNFINISHED, Decodes


class Writer:
    """Turns tokens into text, ending before the first of the `stop` strings; without a tokenizer text is empty."""

    def __init__(self, tokenizer: Decodes | None, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._window: list[int] = []
        self._decoded = ""
        self._held = ""

    def add(self, token: int) -> str:
        """The text that is safe to show after one more token; `stopped` says whether a stop string was met."""
        if self.tokenizer is None or self.stopped:
            return ""
        self._window.append(token)
        text = self.tokenizer.decode(self._window, special=False)
        if text.endswith(UNFINISHED) or not text.startswith(self._decoded):
            return ""
        new, self._decoded = text[len(self._decoded) :], text
        if text.endswith("\n"):
            self._window = [token]
            self._decoded = self.tokenizer.decode(self._window, special=False)
        return self._safe(new)

    def end(self) -> str:
        """The rest, when no token follows."""
        if self.tokenizer is None or self.stopped:
            return ""
        text = self.tokenizer.decode(self._window, special=False) if self._window else ""
        rest = self._safe(text[len(self._decoded) :]) if text.startswith(self._decoded) else ""
        rest, self._held = rest + self._held, ""
        return rest

    def _safe(self, new: str) -> str:
        text = self._held + new
        places = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)]
        starts = (size for stop in self.stop for size in range(1, len(stop)) if text.endswith(stop[:size]))
        kept = max(starts, default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]
