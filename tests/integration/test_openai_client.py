"""The official OpenAI client against the real HTTP process, with an engine whose tokens are known."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fake_engine import FakeEngine, next_token

from splitrun.engine.detokenizer import TextStream
from splitrun.engine.tokenizer import Tokenizer
from splitrun.schedule.request import SamplingParams
from splitrun.serve.launcher import ServeOptions, Server

GREEDY: dict[str, Any] = {"model": "fake", "temperature": 0, "seed": 1}
CHAT: dict[str, Any] = {**GREEDY, "messages": [{"role": "user", "content": "Hello"}]}
KEY = "secret-key"


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeEngine]:
    engine = FakeEngine(context=256)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def server(engine: FakeEngine, tokenizer_directory: Path) -> Iterator[Server]:
    options = ServeOptions(tokenizer_directory, "fake", port=0, api_key=KEY, body_limit_bytes=1 << 20)
    with Server(options) as server:
        server.attach(engine)
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {KEY}"}) as http:
        yield http


@pytest.fixture(scope="module")
def tokenizer(tokenizer_directory: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_directory)


def ids_after(prompt: list[int], count: int, seed: int | None = None) -> list[int]:
    """What the engine makes: greedy without a seed."""
    sampling = SamplingParams(temperature=0 if seed is None else 1, seed=seed)
    ids = list(prompt)
    for _ in range(count):
        ids.append(next_token(ids, sampling, 400))
    return ids[len(prompt) :]


def text_of(tokenizer: Tokenizer, ids: list[int], prompt: tuple[int, ...] = ()) -> str:
    return TextStream(tokenizer, prompt_ids=prompt).push(ids, "length")


def chat_prompt(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode_chat(CHAT["messages"])


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake"]
    assert client.models.retrieve("fake").owned_by == "splitrun"


def test_chat(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(**CHAT, max_tokens=12)
    prompt = chat_prompt(tokenizer)
    assert answer.choices[0].message.content == text_of(tokenizer, ids_after(prompt, 12))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 12)
    assert answer.usage.total_tokens == len(prompt) + 12


def test_chat_streams_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**CHAT, max_tokens=30)
    chunks = list(
        client.chat.completions.create(**CHAT, max_tokens=30, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == [None, "length"]
    assert (chunks[-1].choices, chunks[-1].usage) == ([], whole.usage)
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_raw_stream_ends_with_done_and_no_usage_unasked(http: httpx.Client) -> None:
    body = {**CHAT, "max_tokens": 3, "stream": True}
    lines = http.post("/v1/chat/completions", json=body).text.strip().split("\n\n")
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: {") and '"usage"' not in line for line in lines[:-1])


def test_completions_n_with_a_seed(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.encode("Hello")
    answer = client.completions.create(model="fake", prompt="Hello", n=3, seed=5, max_tokens=6, temperature=1)
    expected = [text_of(tokenizer, ids_after(prompt, 6, seed), tuple(prompt)) for seed in (5, 6, 7)]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), 18)


def test_a_stream_of_several_choices_keeps_them_apart(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {**CHAT, "temperature": 1, "n": 3, "max_tokens": 8}
    whole = client.chat.completions.create(**options)
    texts = ["", "", ""]
    finished = []
    for chunk in client.chat.completions.create(**options, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finished += [choice.index] if choice.finish_reason else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert sorted(finished) == [0, 1, 2]


@pytest.mark.parametrize("form", ["text", "texts", "ids", "lists of ids"])
def test_every_form_of_prompt(client: openai.OpenAI, tokenizer: Tokenizer, form: str) -> None:
    texts = ["Hello", "The quick"]
    ids = [tokenizer.encode(text) for text in texts]
    prompt: Any = {"text": texts[0], "texts": texts, "ids": ids[0], "lists of ids": ids}[form]
    answer = client.completions.create(**GREEDY, prompt=prompt, max_tokens=4)
    chosen = ids if form in ("texts", "lists of ids") else ids[:1]
    expected = [text_of(tokenizer, ids_after(each, 4), tuple(each)) for each in chosen]
    assert [choice.text for choice in answer.choices] == expected


def test_completions_stream_and_default_to_sixteen_tokens(client: openai.OpenAI) -> None:
    whole = client.completions.create(**GREEDY, prompt="Hello", echo=True)
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 16
    assert whole.choices[0].text.startswith("Hello")
    chunks = client.completions.create(**GREEDY, prompt="Hello", echo=True, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_cut_the_text_and_free_the_request(
    client: openai.OpenAI, tokenizer: Tokenizer, engine: FakeEngine, stream: bool
) -> None:
    full = text_of(tokenizer, ids_after(chat_prompt(tokenizer), 60))
    stop = full[20:24]
    if stream:
        chunks = list(client.chat.completions.create(**CHAT, max_tokens=200, stop=[stop, "\n\n\n"], stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**CHAT, max_tokens=200, stop=stop).choices[0]
        text, finish = choice.message.content or "", choice.finish_reason
    assert (text, finish) == (full[: full.index(stop)], "stop")
    last = engine.submitted[-1].request_id
    assert engine.wait_for(lambda: last not in engine.running)


def test_stop_token_ids_hide_their_text(http: httpx.Client, tokenizer: Tokenizer) -> None:
    made = ids_after(chat_prompt(tokenizer), 20)
    end = next(index for index in range(5, 20) if made[index] not in made[:index])
    body = {**CHAT, "max_tokens": 100, "stop_token_ids": [made[end]], "return_token_ids": True}
    choice = http.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["token_ids"] == made[: end + 1]
    assert choice["message"]["content"] == text_of(tokenizer, made[:end])


def test_chat_log_probabilities(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(**CHAT, max_tokens=9, logprobs=True, top_logprobs=2)
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content or []
    ids = ids_after(chat_prompt(tokenizer), 9)
    assert [bytes(entry.bytes or []) for entry in content] == [tokenizer.token_bytes(index) for index in ids]
    assert all(len(entry.top_logprobs) == 2 for entry in content)
    assert [entry.logprob for entry in content] == [-0.356675 if index % 2 == 0 else -1.609438 for index in ids]
    chunks = client.chat.completions.create(**CHAT, max_tokens=9, logprobs=True, top_logprobs=2, stream=True)
    streamed = [
        entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == content


def test_scoring_as_the_evaluation_harness_does(http: httpx.Client, tokenizer: Tokenizer) -> None:
    prompts = [[10, 12, 14, 16], [20, 22, 25]]
    body = {**GREEDY, "prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1234}
    choices = http.post("/v1/completions", json=body).json()["choices"]
    greedy = []
    for choice, prompt in zip(sorted(choices, key=lambda choice: choice["index"]), prompts, strict=True):
        scores = choice["logprobs"]
        assert len(scores["token_logprobs"]) == len(scores["top_logprobs"]) == len(prompt) + 1
        assert scores["token_logprobs"][0] is None
        pairs = list(zip(scores["token_logprobs"][1:-1], scores["top_logprobs"][1:-1], strict=True))
        greedy.append(all(logprob == max(top.values()) for logprob, top in pairs))
        assert sum(logprob for logprob, _ in pairs) < 0
    assert greedy == [True, False]


def test_echo_with_no_new_tokens_scores_only(http: httpx.Client) -> None:
    body = {**GREEDY, "prompt": "Hello there", "echo": True, "logprobs": 0, "max_tokens": 0}
    answer = http.post("/v1/completions", json=body).json()
    scores = answer["choices"][0]["logprobs"]
    assert answer["choices"][0]["text"] == "Hello there" == "".join(scores["tokens"])
    assert [len("".join(scores["tokens"][:index])) for index in range(len(scores["tokens"]))] == scores["text_offset"]
    assert answer["usage"]["completion_tokens"] == 0


def test_parameters_reach_the_engine(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(
        model="fake", messages=CHAT["messages"], max_completion_tokens=2, seed=-3, top_p=0.5, presence_penalty=1,
        frequency_penalty=-1, logit_bias={"7": 5}, stop=["x"], user="ignored", parallel_tool_calls=True,
        extra_body={"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True, "stop_token_ids": [9],
                    "unheard_of": 1},
    )  # fmt: skip
    assert engine.submitted[-1].eos_token_ids == (4,)
    assert engine.submitted[-1].sampling == SamplingParams(
        max_tokens=2, temperature=0.7, top_k=4, top_p=0.5, min_p=0.1, repetition_penalty=1.2, presence_penalty=1,
        frequency_penalty=-1, logit_bias={7: 5}, seed=-3, stop=("x",), stop_token_ids=(9,), ignore_eos=True,
    )  # fmt: skip


def test_the_templates_options_may_have_any_name(client: openai.OpenAI) -> None:
    options = {"length": 1, "work": 2, "at_most": 3, "options": 4}
    assert client.chat.completions.create(**CHAT, max_tokens=1, extra_body={"chat_template_kwargs": options}).choices


def test_text_parts_of_a_message_are_joined(client: openai.OpenAI, engine: FakeEngine) -> None:
    client.chat.completions.create(**CHAT, max_tokens=1)
    plain = engine.submitted[-1].prompt
    parts: Any = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    client.chat.completions.create(**GREEDY, messages=[{"role": "user", "content": parts}], max_tokens=1)
    assert engine.submitted[-1].prompt == plain


BAD_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": []}, "messages"),
    ({"messages": "Hello"}, "messages"),
    ({"messages": [{"role": "user", "content": 5}]}, "content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "unknown role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "text only"),
    ({"temperature": "0.5"}, "temperature"),
    ({"temperature": 200}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 100_000}, "context"),
    ({"n": 0}, "n is 0"),
    ({"n": True}, "n"),
    ({"top_logprobs": 3}, "logprobs: true"),
    ({"logprobs": True, "top_logprobs": 30}, "logprobs"),
    ({"logit_bias": {"word": 1}}, "logit_bias"),
    ({"stop": [""]}, "stop"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"chat_template_kwargs": {"tokenize": True}}, "tokenize"),
    ({"seed": 2**80}, "seed"),
    ({"chat_template_kwargs": {"self": 1}}, "chat template refused"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias.*at most 1024"),
    ({"stop_token_ids": [5] * 1025}, "stop_token_ids.*at most 1024"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_CHAT, ids=lambda value: str(value)[:30])
def test_bad_chat_requests(client: openai.OpenAI, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words) as caught:
        client.chat.completions.create(**CHAT, extra_body=changes)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["x", 5]}, "prompt"),
        ({"prompt": [400]}, "0 to 399"),
        ({"prompt": [-1]}, "0 to 399"),
        ({"prompt": [2**40]}, "0 to 399"),
        ({"prompt": [5] * 300}, "context is 256"),
        ({"max_tokens": 0}, "echo"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 3}, "best_of is 3"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt": [[5]] * 1025}, "1024"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_completion_requests(client: openai.OpenAI, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(**{**GREEDY, "prompt": "Hello", **changes})


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_has_openais_code(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**GREEDY, prompt=[5] * 300, stream=stream)
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        b"{", b"[1]", b"\xff\xfe", b"[" * 50_000, b'{"messages": NaN}', b'{"prompt": "\\ud800"}',
        b'{"prompt": "x", "logit_bias": {"\\ud800": "y"}}', b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:40]),
)  # fmt: skip
def test_bodies_that_are_no_request(http: httpx.Client, body: bytes) -> None:
    answer = http.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_wrong_key_is_refused_everywhere_but_at_health(server: Server) -> None:
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        stranger.models.list()
    assert caught.value.code == "invalid_api_key"
    codes = {path: httpx.get(server.url + path).status_code for path in ("/health", "/metrics", "/placement")}
    assert codes == {"/health": 200, "/metrics": 401, "/placement": 401}


def test_another_models_name_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="ask for 'fake'") as caught:
        client.chat.completions.create(**{**CHAT, "model": "gpt-4"})
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/v1/completions", 405), ("DELETE", "/health", 405)],
)
def test_wrong_paths_and_methods(http: httpx.Client, method: str, path: str, status: int) -> None:
    answer = http.request(method, path)
    assert (answer.status_code, set(answer.json()["error"])) == (status, {"message", "type", "param", "code"})


@pytest.mark.parametrize("announced", [True, False])
def test_a_large_body_is_refused(http: httpx.Client, announced: bool) -> None:
    data = b'{"prompt": "' + b"x" * (1 << 20) + b'"}'
    content = data if announced else iter([data[: 1 << 19], data[1 << 19 :]])
    answer = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_asks_to_come_back(client: openai.OpenAI, engine: FakeEngine, stream: bool) -> None:
    engine.queue = 0
    try:
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(**CHAT, stream=stream)
    finally:
        engine.queue = 64
    assert caught.value.response.headers["retry-after"] == "1"
    assert client.chat.completions.create(**CHAT, max_tokens=1).choices


def test_a_dead_engine_is_unavailable_and_unhealthy(
    client: openai.OpenAI, http: httpx.Client, engine: FakeEngine
) -> None:
    engine.dead = "stage 1 (cuda:0) is lost: restart the server"
    try:
        with pytest.raises(openai.InternalServerError, match="stage 1") as caught:
            client.chat.completions.create(**CHAT)
        assert caught.value.status_code == 503
        health = http.get("/health")
        assert (health.status_code, health.json()["reason"]) == (503, engine.dead)
    finally:
        engine.dead = ""
    assert http.get("/health").status_code == 200


def test_a_failing_request_is_an_error_also_inside_a_stream(client: openai.OpenAI, engine: FakeEngine) -> None:
    engine.fail_with = "stage 0 (cpu): out of memory"
    try:
        with pytest.raises(openai.InternalServerError, match="out of memory") as caught:
            client.chat.completions.create(**CHAT)
        assert (caught.value.status_code, caught.value.response.headers["retry-after"]) == (503, "1")
    finally:
        engine.fail_with = ""
    engine.pause_at(20)
    stream = client.chat.completions.create(**CHAT, max_tokens=200, stream=True)
    next(stream)
    engine.fail_with = "stage 0 (cpu): out of memory"
    engine.pause_at(None)
    try:
        with pytest.raises(openai.APIError, match="out of memory"):
            list(stream)
    finally:
        engine.fail_with = ""


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_request(server: Server, engine: FakeEngine, stream: bool) -> None:
    async def hang_up() -> None:
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
        task = asyncio.create_task(client.chat.completions.create(**CHAT, stream=stream))
        await asyncio.to_thread(engine.wait_for, lambda: len(engine.submitted) > before)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await client.close()

    before = len(engine.submitted)
    engine.hold()
    try:
        asyncio.run(hang_up())
        request_id = engine.submitted[-1].request_id
        assert engine.wait_for(lambda: request_id in engine.cancelled)
    finally:
        engine.release()


def test_placement_and_metrics_show_stages_and_tokens(http: httpx.Client) -> None:
    shown = http.get("/placement").json()
    assert shown["placement"] == {"version": 1}
    assert (shown["stages"][0]["memory_bytes"], shown["stages"][0]["mean_step_ms"]) == (1 << 20, 1.25)
    text = http.get("/metrics").text
    for line in (
        'splitrun_stage_memory_bytes{device="cpu",node="",stage="0",units="embed, layers 0-8, head"} 1.048576e+06',
        'splitrun_blocks_total{group="full"} 64.0',
        'splitrun_requests_total{path="/v1/completions",status="413"}',
        "splitrun_healthy 1.0",
        "splitrun_time_to_first_token_seconds_count",
        "splitrun_inter_token_seconds_bucket",
    ):
        assert line in text
