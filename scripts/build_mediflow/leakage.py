"""Whether a text repeats one that must stay out."""

from collections import defaultdict
from collections.abc import Iterable

from mediphi.data.sources.bundled import normalise

SPAN = 200
"""Characters of words and single spaces that two texts may not share."""
BLOCK = SPAN // 2
"""Every span of `SPAN` characters holds a whole one of the blocks that a text is cut into."""
MIN_WHOLE = 60
"""A shorter text that is repeated whole inside another one is so by nature ("None.")."""


class ForbiddenTexts:
    """Texts to keep out; compared in lower case without punctuation."""

    def __init__(self, texts: Iterable[str], *, whole: bool = True) -> None:
        """Index `texts`.

        Args:
            texts: what must not be repeated.
            whole: a text of `MIN_WHOLE` to `SPAN` characters may not stand inside another either.
        """
        self.whole = whole
        self.texts = list(dict.fromkeys(n for text in texts if (n := normalise(text))))
        self.equal = frozenset(self.texts)
        self.blocks: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.openings: dict[str, list[int]] = defaultdict(list)
        for number, text in enumerate(self.texts):
            if len(text) >= SPAN:
                for start in range(0, len(text) - BLOCK + 1, BLOCK):
                    self.blocks[text[start : start + BLOCK]].append((number, start))
            elif whole and len(text) >= MIN_WHOLE:
                self.openings[text[:MIN_WHOLE]].append(number)

    def equals(self, text: str) -> bool:
        """Whether `text` has the words of a forbidden one."""
        return normalise(text) in self.equal

    def overlaps(self, text: str) -> bool:
        """Whether `text` holds a span, or the whole of a short one."""
        words = normalise(text)
        return any(
            self._span_at(words, start) or self._whole_at(words, start)
            for start in range(len(words) - MIN_WHOLE + 1)
        )

    def _span_at(self, words: str, start: int) -> bool:
        places = self.blocks.get(words[start : start + BLOCK], ())
        return any(self._common(words, start, *place) >= SPAN for place in places)

    def _whole_at(self, words: str, start: int) -> bool:
        numbers = self.openings.get(words[start : start + MIN_WHOLE], ())
        return any(words.startswith(self.texts[number], start) for number in numbers)

    def _common(self, words: str, start: int, number: int, place: int) -> int:
        """Length of the run that both texts share around the block."""
        text = self.texts[number]
        left = 0
        while left < min(start, place) and words[start - left - 1] == text[place - left - 1]:
            left += 1
        right = BLOCK
        limit = min(len(words) - start, len(text) - place)
        while right < limit and words[start + right] == text[place + right]:
            right += 1
        return left + right
