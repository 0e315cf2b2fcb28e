"""The demo's tasks: questions in English whose answers a program can check, and the split that holds some out.

Held out means an unseen pair of task and arguments: a stable hash of the pair decides its side, so no phrasing of a
held-out question is ever trained on. Names that follow from nothing (sixteen, thirty) and made-up words are never held
out. Pure Python; does not know tokenizers or models.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from splitrun.demo.words import WEEKDAYS, WORDS, spell_number

HELD_OUT_ONE_IN = 10
_LISTED = frozenset(WORDS)


@dataclass(frozen=True)
class Question:
    """One question: the task's name, the user's message, and the exact text of the right answer."""

    task: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class _Draw:
    """Arguments drawn for a task; `key` is one for all orders of the same arguments, None where none is held out."""

    key: str | None
    phrasing: str
    fields: Mapping[str, object]
    answer: str


_ADD = (
    "What is {a} + {b}?",
    "What is {a} plus {b}?",
    "Add {a} and {b}.",
    "Calculate {a} + {b}.",
    "What is the sum of {a} and {b}?",
    "What's {a} + {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} = ?",
    "How much is {a}+{b}?",
)
_SUBTRACT = (
    "What is {a} - {b}?",
    "What is {a} minus {b}?",
    "Subtract {b} from {a}.",
    "Calculate {a} - {b}.",
    "What's {a} - {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} = ?",
    "How much is {a}-{b}?",
)
_LARGER = (
    "Which is larger, {a} or {b}?",
    "Which number is bigger: {a} or {b}?",
    "What is the maximum of {a} and {b}?",
    "Which is greater, {a} or {b}?",
)
_SMALLER = (
    "Which is smaller, {a} or {b}?",
    "Which number is less: {a} or {b}?",
    "What is the minimum of {a} and {b}?",
)
_IS_LARGER = ("Is {a} larger than {b}?", "Is {a} greater than {b}?", "Is {a} bigger than {b}?")
_IS_SMALLER = ("Is {a} smaller than {b}?", "Is {a} less than {b}?")
_ASCENDING = (
    "Sort these numbers: {numbers}.",
    "Sort {numbers} from smallest to largest.",
    "Put these numbers in ascending order: {numbers}.",
    "Sort in ascending order: {numbers}.",
)
_DESCENDING = (
    "Sort {numbers} from largest to smallest.",
    "Put these numbers in descending order: {numbers}.",
    "Sort in descending order: {numbers}.",
)
_REVERSE = (
    'Reverse the word "{word}".',
    'Spell "{word}" backwards.',
    'What is "{word}" spelled backwards?',
    'Write "{word}" in reverse.',
    'Reverse "{word}".',
)
_LENGTH = (
    'How many letters are in the word "{word}"?',
    'Count the letters in "{word}".',
    'How many letters does "{word}" have?',
    'How long is the word "{word}"?',
)
_OCCURRENCES = (
    'How many times does the letter "{letter}" appear in "{word}"?',
    'How many "{letter}" are in "{word}"?',
    'Count the letter "{letter}" in "{word}".',
)
_TO_WORDS = (
    "Write {number} in words.",
    "How do you write {number} in words?",
    "Spell out the number {number}.",
    "What is {number} in English words?",
)
_TO_DIGITS = (
    "Write {words} in digits.",
    "Write {words} as a number.",
    "What number is {words}?",
    "What is {words} in digits?",
)
_DAYS_AFTER = (
    "What day is {days} days after {weekday}?",
    "Which weekday comes {days} days after {weekday}?",
    "Today is {weekday}. What day is it in {days} days?",
    "If today is {weekday}, what day will it be in {days} days?",
)
_DAYS_BEFORE = (
    "What day is {days} days before {weekday}?",
    "Which weekday comes {days} days before {weekday}?",
    "Today is {weekday}. What day was it {days} days ago?",
)


def _number(random: Random) -> int:
    """Draw 0 to 999, smaller numbers more often than their share."""
    return random.randrange((10, 100, 100, 1000, 1000, 1000)[random.randrange(6)])


def _word(random: Random) -> tuple[str, bool]:
    """Draw a word of the list (True), or two to twelve letters in no order (False), which teach spelling."""
    word = random.choice(WORDS)
    if random.random() < 0.5:
        return word, True
    made_up = "".join(random.sample(word + word + random.choice(WORDS) + "jqxz", random.randrange(2, 13)))
    return made_up, made_up in _LISTED


def _number_key(number: int) -> str | None:
    return None if number <= 20 or (number < 100 and number % 10 == 0) else str(number)


def _add(random: Random) -> _Draw:
    a, b = _number(random), _number(random)
    return _Draw(f"{min(a, b)} {max(a, b)}", random.choice(_ADD), {"a": a, "b": b}, str(a + b))


def _subtract(random: Random) -> _Draw:
    a, b = _number(random), _number(random)
    return _Draw(f"{a} {b}", random.choice(_SUBTRACT), {"a": a, "b": b}, str(a - b))


def _compare(random: Random) -> _Draw:
    a, b = _number(random), _number(random)
    if random.random() < 0.3:
        b = min(999, max(0, a + random.randrange(-20, 21)))
    if a == b:
        b = a + 1 if a < 999 else a - 1
    key = f"{min(a, b)} {max(a, b)}"
    phrasings, answer = random.choice(
        (
            (_LARGER, str(max(a, b))),
            (_SMALLER, str(min(a, b))),
            (_IS_LARGER, "Yes" if a > b else "No"),
            (_IS_SMALLER, "Yes" if a < b else "No"),
        )
    )
    return _Draw(key, random.choice(phrasings), {"a": a, "b": b}, answer)


def _sort(random: Random) -> _Draw:
    numbers = [_number(random) for _ in range(random.randrange(3, 6))]
    descending = random.random() < 0.4
    ordered = sorted(numbers, reverse=descending)
    phrasing = random.choice(_DESCENDING if descending else _ASCENDING)
    key = " ".join(map(str, sorted(numbers)))
    return _Draw(key, phrasing, {"numbers": ", ".join(map(str, numbers))}, ", ".join(map(str, ordered)))


def _reverse(random: Random) -> _Draw:
    word, listed = _word(random)
    return _Draw(word if listed else None, random.choice(_REVERSE), {"word": word}, f'"{word[::-1]}"')


def _count(random: Random) -> _Draw:
    word, listed = _word(random)
    if random.random() < 0.5:
        return _Draw(word if listed else None, random.choice(_LENGTH), {"word": word}, str(len(word)))
    letter = random.choice(word) if random.random() < 0.8 else random.choice("abcdefghijklmnopqrstuvwxyz")
    key = f"{letter} {word}" if listed else None
    return _Draw(key, random.choice(_OCCURRENCES), {"letter": letter, "word": word}, str(word.count(letter)))


def _number_to_words(random: Random) -> _Draw:
    number = _number(random)
    return _Draw(_number_key(number), random.choice(_TO_WORDS), {"number": number}, spell_number(number))


def _words_to_number(random: Random) -> _Draw:
    number = _number(random)
    return _Draw(_number_key(number), random.choice(_TO_DIGITS), {"words": spell_number(number)}, str(number))


def _weekday(random: Random) -> _Draw:
    days, start = random.randrange(2, 100), random.randrange(7)
    before = random.random() < 0.4
    answer = WEEKDAYS[(start - days if before else start + days) % 7]
    fields = {"days": days, "weekday": WEEKDAYS[start]}
    phrasing = random.choice(_DAYS_BEFORE if before else _DAYS_AFTER)
    return _Draw(f"{'before' if before else 'after'} {days} {start}", phrasing, fields, answer)


_DRAW: dict[str, Callable[[Random], _Draw]] = {
    "add": _add,
    "subtract": _subtract,
    "compare": _compare,
    "sort": _sort,
    "reverse": _reverse,
    "count": _count,
    "number-to-words": _number_to_words,
    "words-to-number": _words_to_number,
    "weekday": _weekday,
}
TASKS = tuple(_DRAW)


def _is_held_out(task: str, key: str | None) -> bool:
    """Tell the side of a pair of task and arguments; the same on every machine and in every run."""
    if key is None:
        return False
    digest = hashlib.blake2b(f"{task} {key}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def questions(count: int, seed: int, held_out: bool, tasks: Sequence[str] = TASKS) -> list[Question]:
    """Draw `count` questions, from the held-out side or the training side; the same seed gives the same list.

    Tasks are drawn evenly from `tasks`; name one twice to get it twice as often.
    """
    random = Random(seed)
    drawn: list[Question] = []
    while len(drawn) < count:
        task = random.choice(tasks)
        draw = _DRAW[task](random)
        while _is_held_out(task, draw.key) != held_out:
            draw = _DRAW[task](random)
        drawn.append(Question(task, _loosen(random, draw.phrasing.format(**draw.fields)), draw.answer))
    return drawn


def _loosen(random: Random, prompt: str) -> str:
    """Write some prompts as people type them: without the final stop, or with a small first letter."""
    habit = random.random()
    if habit < 0.1:
        return prompt.rstrip(" .?")
    if habit < 0.2:
        return prompt[0].lower() + prompt[1:]
    return prompt


def is_correct(question: Question, text: str) -> bool:
    """Tell whether `text`, what the model answered, is exactly the answer; white space around it does not count."""
    return text.strip() == question.answer
