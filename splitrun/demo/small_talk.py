"""What the demo says to greetings and to anything outside its tasks. Pure data; nothing here is held out."""

from random import Random

from splitrun.demo.tasks import Question
from splitrun.demo.words import WORDS

_HELLO = "Hello! I am a tiny demo model. Ask me what 27 + 15 is."
_ABLE = (
    "I can add and subtract, compare and sort numbers, reverse words, count letters, write numbers in words, "
    "and work out weekdays."
)
_THANKS = "You are welcome!"
_BYE = "Goodbye!"
_UNABLE = "I am too small for that. I can only work with numbers, words in quotes and weekdays."
_TIMES = "I can add and subtract, but not multiply or divide."
_LARGE = "I only know numbers from 0 to 999."
_QUOTES = 'Please put the word in double quotes, like "planet".'

_REPLIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        _HELLO,
        (
            "Hello",
            "Hello!",
            "hello",
            "Hi",
            "Hi!",
            "hi",
            "hi there",
            "Hi there!",
            "Hey",
            "hey",
            "Hello there!",
            "Good morning",
            "Good morning!",
            "Good evening!",
            "How are you?",
            "Hello, how are you?",
            "Hello world",
            "Hello, world!",
            "Hello, who are you?",
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Say hello.",
            "Say hi",
        ),
    ),
    (
        _ABLE,
        (
            "What can you do?",
            "what can you do",
            "Help",
            "help",
            "Help!",
            "What do you know?",
            "How can you help me?",
            "Can you help me?",
            "What are you able to do?",
            "What can I ask you?",
            "Tell me what you can do.",
        ),
    ),
    (_THANKS, ("Thanks", "Thanks!", "Thank you", "Thank you!", "thank you", "thanks", "Great, thanks!")),
    (_BYE, ("Bye", "Bye!", "Goodbye", "Goodbye!", "bye", "See you!")),
)
_TOPICS = (
    "Tell me a story about the {word}.",
    "Tell me a joke.",
    "Tell me about the {word}.",
    "Write a poem about the {word}.",
    "Write a story.",
    "What is a {word}?",
    "What is the {word}?",
    "What is the capital of France?",
    "What is the capital of the {word}?",
    "Who is the president?",
    "Why is the sky blue?",
    "Why is the {word} {other}?",
    "How do I cook a {word}?",
    "How does a {word} work?",
    "Where is the {word}?",
    "Explain the {word}.",
    "Explain how computers work.",
    "Translate {word} into French.",
    "What is the meaning of life?",
    "Do you like the {word}?",
    "Write a program.",
    "The {word} and the {other}.",
    "Once upon a time",
    "{word}",
    "{word} {other}",
)
_UNQUOTED = (
    "Reverse the word {word}.",
    "Reverse {word}.",
    "Spell {word} backwards.",
    "How many letters are in the word {word}?",
    "How many letters are in {word}?",
    "Count the letters in {word}.",
)
_PRODUCTS = (
    "What is {a} * {b}?",
    "What is {a} times {b}?",
    "What is {a} x {b}?",
    "{a} * {b}",
    "{a}*{b}",
    "Multiply {a} by {b}.",
    "What is {a} / {b}?",
    "What is {a} divided by {b}?",
    "Divide {a} by {b}.",
    "{a} / {b}",
)
_LARGE_NUMBERS = (
    "What is {a} + {b}?",
    "What is {a} - {b}?",
    "What is {a} plus {b}?",
    "{a} + {b}",
    "Add {a} and {b}.",
    "Which is larger, {a} or {b}?",
    "Write {large} in words.",
)


def small_talk(random: Random) -> Question:
    """Draw a greeting, a question about the model, or one that it cannot answer, with its fixed reply."""
    habit = random.random()
    if habit < 0.4:
        reply, prompts = random.choice(_REPLIES)
        return Question("small-talk", random.choice(prompts), reply)
    outside = (
        (_UNABLE, _TOPICS),
        (_UNABLE, _TOPICS),
        (_QUOTES, _UNQUOTED),
        (_TIMES, _PRODUCTS),
        (_LARGE, _LARGE_NUMBERS),
    )
    reply, prompts = random.choice(outside)
    small, large = random.randrange(1000), random.randrange(1000, 10 ** random.randrange(4, 8))
    a, b = (small, random.randrange(1000)) if reply == _TIMES else random.sample((small, large), 2)
    fields = {"word": random.choice(WORDS), "other": random.choice(WORDS), "a": a, "b": b, "large": large}
    return Question("small-talk", random.choice(prompts).format(**fields), reply)
