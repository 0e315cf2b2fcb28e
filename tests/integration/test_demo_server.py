"""The bundled model behind the real server: answers over HTTP are those of the engine in a script."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
from node_clusters import listening, shown
from test_processes import demo

import splitrun
from splitrun.serve.launcher import ServeOptions, Server

QUESTION: list[Any] = [{"role": "user", "content": "What is 27 + 15?"}]


@pytest.fixture(scope="module")
def engine() -> Iterator[splitrun.Engine]:
    placement = splitrun.plan("demo", memory={"cpu": "2GiB"}, context=512, sessions=4, weights="bf16")
    with splitrun.Engine(placement) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(engine: splitrun.Engine) -> Iterator[Server]:
    with Server(ServeOptions(engine.files.path, "demo", port=0)) as server:
        server.attach(engine.core)
        server.wait_ready()
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_health_follows_a_real_token(server: Server) -> None:
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_the_answer_is_right_and_ends(client: openai.OpenAI) -> None:
    choice = client.chat.completions.create(model="demo", messages=QUESTION, temperature=0).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("42", "stop")


def test_http_and_script_agree_on_seeded_samples(client: openai.OpenAI, engine: splitrun.Engine) -> None:
    options: dict[str, Any] = {"seed": 3, "temperature": 1.0, "max_tokens": 24, "n": 3}
    answer = client.completions.create(
        model="demo", prompt="What is", **options, top_p=1, extra_body={"top_k": 0, "repetition_penalty": 1}
    )
    expected = engine.generate(["What is"], splitrun.SamplingParams(**options))
    assert [choice.text for choice in answer.choices] == [each.text for each in expected]


def test_scores_of_an_echoed_prompt_are_log_probabilities(client: openai.OpenAI, engine: splitrun.Engine) -> None:
    prompt = engine.tokenizer.encode_chat(QUESTION) + engine.tokenizer.encode("42", add_special_tokens=False)
    answer = client.completions.create(model="demo", prompt=prompt, echo=True, logprobs=1, max_tokens=1, temperature=0)
    scores = answer.choices[0].logprobs
    assert scores is not None
    token_logprobs, top_logprobs = scores.token_logprobs or [], scores.top_logprobs or []
    assert len(token_logprobs) == len(prompt) + 1
    for logprob, top in list(zip(token_logprobs, top_logprobs, strict=True))[-3:-1]:
        assert logprob == max(top.values()), "the right answer is the likeliest"
        assert -0.5 < logprob <= 0


def test_a_client_that_hangs_up_frees_its_blocks(client: openai.OpenAI, server: Server) -> None:
    stream = client.completions.create(
        model="demo", prompt="What", max_tokens=400, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    while (shown := httpx.get(f"{server.url}/placement").json())["running"]:
        continue
    assert all(use["used"] == 0 for use in shown["blocks"].values())


def test_a_server_with_processes_opens_nothing_to_others_and_shows_no_key(tmp_path: Path) -> None:
    """The command as typed, with a stage in a process of its own: ports, command lines, environments and logs."""
    file, key, token = tmp_path / "placement.yaml", secrets.token_hex(20), secrets.token_hex(24)
    demo("cpu", "process/cpu").save(file)
    with (tmp_path / "log").open("w+b") as log:
        command = [sys.executable, "-m", "splitrun", "serve", str(file), "--port", "0"]
        environment = {**os.environ, "SPLITRUN_API_KEY": key, "SPLITRUN_TOKEN": token, "SPLITRUN_LOG": "json"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True) as server:
            try:
                assert server.stdout is not None
                url = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
                url = url.rstrip("/.,").removesuffix("/v1")
                headers = {"authorization": f"Bearer {key}"}
                body = {"model": "demo", "prompt": "What is", "max_tokens": 4}
                assert httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
                assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 401
                children = psutil.Process(server.pid).children(recursive=True)
                ours = {server.pid, *(child.pid for child in children)}
                open_to = [addresses for number, addresses in listening().items() if number in ours]
                assert len(open_to) >= 3  # HTTP, the coordinator's frames and the stage's
                assert set().union(*open_to) == {"127.0.0.1"}
                assert "stage_process" in shown(children)
                assert not {key, token} & set(shown(children).split("\n"))
            finally:
                server.terminate()
        log.seek(0)
        lines = log.read().decode().splitlines()
    told = [json.loads(line) for line in lines if line.startswith("{")]
    ((number,),) = [one["requests"] for one in told if one["message"] == "request"]
    assert {one["where"] for one in told if number in one.get("requests", ())} == {"http", "coordinator", "process/cpu"}
    assert not any(secret in line for secret in (key, token) for line in lines)
