"""The demo's questions: right answers, a split that leaks nothing, and a bundled model that answers them."""

import re
from random import Random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from splitrun.demo import demo_path
from splitrun.demo.small_talk import small_talk
from splitrun.demo.tasks import TASKS, Question, is_correct, questions
from splitrun.demo.words import WEEKDAYS, WORDS, spell_number

FIRST_PROMPTS = ["Write 96 in words.", 'Reverse the word "raven"', "Is 504 larger than 656?"]


def numbers_in(text: str) -> list[int]:
    return [int(match) for match in re.findall(r"\d+", text)]


def quoted_in(text: str) -> list[str]:
    return re.findall(r'"([a-z]+)"', text)


def solve(question: Question) -> str:
    """Work the answer out again from the prompt's text, by other means than the generator's."""
    prompt = question.prompt.lower()
    numbers = numbers_in(prompt)
    match question.task:
        case "add":
            return str(sum(numbers))
        case "subtract":
            first, second = reversed(numbers) if prompt.startswith("subtract") else numbers
            return str(first - second)
        case "compare":
            wants_larger = re.search("larger|bigger|greater|maximum", prompt) is not None
            if prompt.startswith("is "):
                return "Yes" if (numbers[0] > numbers[1]) == wants_larger else "No"
            return str(max(numbers) if wants_larger else min(numbers))
        case "sort":
            descending = "descending" in prompt or "largest to" in prompt
            return ", ".join(map(str, sorted(numbers, reverse=descending)))
        case "reverse":
            return '"' + "".join(reversed(quoted_in(prompt)[0])) + '"'
        case "count":
            quoted = quoted_in(prompt)
            return str(len(quoted[0]) if len(quoted) == 1 else sum(letter == quoted[0] for letter in quoted[1]))
        case "number-to-words":
            return spell_number(numbers[0])
        case "words-to-number":
            return str(next(number for number in range(999, -1, -1) if spell_number(number) in prompt))
        case "weekday":
            start = next(index for index, day in enumerate(WEEKDAYS) if day.lower() in prompt)
            sign = -1 if re.search("before|ago", prompt) else 1
            return WEEKDAYS[(start + sign * numbers[0]) % 7]
    raise AssertionError(question.task)


def arguments_of(question: Question) -> tuple[object, ...]:
    """Name what is asked, whatever the phrasing; orders of one sum, comparison or list count as one."""
    prompt = question.prompt.lower()
    numbers: list[int] = numbers_in(prompt)
    if question.task == "subtract":
        return (question.task, question.answer, *sorted(numbers))
    if question.task == "compare":
        return (question.task, *sorted(numbers))
    if question.task == "weekday":
        direction = "before" if re.search("before|ago", prompt) else "after"
        return (question.task, question.answer, direction, *numbers)
    return (question.task, *sorted(numbers), *quoted_in(prompt), "" if numbers else question.answer)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_answers_are_right(task: str, held_out: bool) -> None:
    for question in questions(200, 5, held_out, tasks=(task,)):
        assert question.task == task
        assert question.answer == solve(question), question


def test_no_held_out_arguments_are_trained_on() -> None:
    trained = {arguments_of(question) for question in questions(60_000, 1, held_out=False)}
    leaked = [question for question in questions(3_000, 2, held_out=True) if arguments_of(question) in trained]
    assert not leaked, leaked[:3]


def test_the_same_seed_gives_the_same_questions() -> None:
    assert questions(50, 7, held_out=True) == questions(50, 7, held_out=True)
    assert questions(50, 7, held_out=True) != questions(50, 8, held_out=True)


def test_the_split_is_the_one_the_model_was_trained_with() -> None:
    assert [question.prompt for question in questions(3, 0, held_out=True)] == FIRST_PROMPTS


def test_held_out_words_are_of_the_list() -> None:
    words = {
        quoted_in(question.prompt)[-1] for question in questions(300, 3, held_out=True, tasks=("reverse", "count"))
    }
    assert words <= set(WORDS)
    assert len(words) > 30


@pytest.mark.parametrize(
    ("text", "correct"),
    [("42", True), (" 42\n", True), ("-42", False), ("42.", False), ("4 2", False), ("", False)],
)
def test_only_the_exact_answer_is_correct(text: str, correct: bool) -> None:
    assert is_correct(Question("add", "What is 27 + 15?", "42"), text) is correct


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (42, "forty-two"),
        (207, "two hundred seven"),
        (900, "nine hundred"),
    ],
)
def test_numbers_are_spelled(number: int, words: str) -> None:
    assert spell_number(number) == words


@pytest.mark.parametrize("number", [-1, 1000])
def test_numbers_outside_the_range_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match="only 0 to 999"):
        spell_number(number)


def test_words_are_plain_and_listed_once() -> None:
    assert len(set(WORDS)) == len(WORDS)
    assert all(re.fullmatch("[a-z]{3,8}", word) for word in WORDS)


def test_small_talk_fills_every_field() -> None:
    random = Random(1)
    talk = [small_talk(random) for _ in range(500)]
    assert {turn.task for turn in talk} == {"small-talk"}
    assert not any("{" in turn.prompt + turn.answer for turn in talk)
    assert len({turn.answer for turn in talk}) == 8


def test_weights_fit_the_package() -> None:
    assert 0 < (demo_path() / "model.safetensors").stat().st_size <= 12_000_000


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(demo_path())


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("What is 27 + 15?", ["What", " is", " ", "2", "7", " +", " ", "1", "5", "?"]),
        ('Reverse "planet".', ["Reverse", ' "', "p", "l", "a", "n", "e", "t", '".']),
    ],
)
def test_digits_and_quoted_letters_are_tokens(tokenizer: PreTrainedTokenizerFast, text: str, tokens: list[str]) -> None:
    assert [tokenizer.decode([token]) for token in tokenizer(text).input_ids] == tokens


@pytest.mark.parametrize("text", ['Reverse "planet".', "naïve 😀 text\n\twith tabs", "  spaces  "])
def test_any_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_the_bundled_model_answers_held_out_questions(tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_path(), dtype=torch.bfloat16)
    tokenizer.padding_side = "left"
    asked = questions(60, 0, held_out=True)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.prompt}], tokenize=False, add_generation_prompt=True
        )
        for question in asked
    ]
    encoded = tokenizer(texts, return_tensors="pt", padding=True)
    output = model.generate(**encoded, max_new_tokens=48)
    answers = tokenizer.batch_decode(output[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)
    right = sum(is_correct(question, text) for question, text in zip(asked, answers, strict=True))
    assert right >= 57, [(question, text) for question, text in zip(asked, answers, strict=True)]
