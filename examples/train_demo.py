"""Train the bundled demo model: tokenizer, data, training, evaluation and files, all from one seed.

    python examples/train_demo.py --out DIR --steps 20000          # a GPU; minutes
    python examples/train_demo.py --out DIR --steps 100 --rows 4   # a CPU; to try the script

Questions come from `splitrun.demo.tasks` and never from the held-out side. A row is one conversation of several turns;
the loss is on the assistant's tokens. Late in the training every other step sees its weights rounded to NF4, so that
the model stays right when it is served in four bits.
"""

import argparse
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from splitrun.demo.small_talk import small_talk
from splitrun.demo.tasks import TASKS, Question, is_correct, questions

ROW_TOKENS = 256
VOCABULARY = 1024
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer briefly.", "You are a small demo model.")
# The harder tasks come more often; held-out evaluation draws all evenly.
TRAINING_TASKS = (*TASKS, "add", "subtract", "subtract", "weekday", "reverse", "count")
# From this share of the training on, every other step runs with rounded weights.
ROUNDING_FROM = 0.4
# The sixteen levels of NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E).
NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def user_turn(prompt: str) -> str:
    """Render a user's message and the opening of the answer, as the chat template does."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def training_questions(count: int, seed: int) -> list[Question]:
    """Draw from the training side, with one small-talk turn in twelve."""
    random = Random(seed)
    drawn = questions(count, seed, held_out=False, tasks=TRAINING_TASKS)
    return [small_talk(random) if random.random() < 1 / 12 else question for question in drawn]


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in which digits, and the letters of a quoted word, are tokens of their own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex('[A-Za-z](?=[A-Za-z]*")'), "isolated"),
            pre_tokenizers.Split(Regex("[0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [part for question in training_questions(60_000, seed) for part in (question.prompt, question.answer)]
    roles = ["system\n", "user\n", "assistant\n"] * 1000
    tokenizer.train_from_iterator([*texts, *roles, *SYSTEM_PROMPTS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


class Conversations(IterableDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Endless batches of (ids, labels), both of shape (rows, ROW_TOKENS), int16; labels of -100 carry no loss."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, rows: int, seed: int) -> None:
        self.tokenizer = tokenizer
        self.rows = rows
        self.seed = seed

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            yield self.batch(self.seed * 1_000_003 + number)
            number += workers

    def batch(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Fill every row with the turns of one conversation; a turn that does not fit starts the next row."""
        random = Random(seed)
        encode = self.tokenizer.backend_tokenizer.encode_batch_fast
        ids = torch.full((self.rows, ROW_TOKENS), self.tokenizer.pad_token_id, dtype=torch.int16)
        labels = torch.full((self.rows, ROW_TOKENS), -100, dtype=torch.int16)
        drawn = training_questions(self.rows * ROW_TOKENS // 24, seed)
        prompts = encode([user_turn(question.prompt) for question in drawn])
        answers = encode([f"{question.answer}<|im_end|>\n" for question in drawn])
        openings = encode([f"<|im_start|>system\n{text}<|im_end|>\n" for text in SYSTEM_PROMPTS])
        turn = 0
        for row in range(self.rows):
            tokens: list[int] = []
            targets: list[int] = []
            habit = random.random()
            if habit < 0.15:
                tokens = list(random.choice(openings).ids)
                targets = [-100] * len(tokens)
            elif habit < 0.25:
                tokens, targets = self.plain_text(training_questions(1, random.randrange(2**32))[0])
            while turn < len(drawn):
                prompt, answer = prompts[turn].ids, answers[turn].ids
                if len(tokens) + len(prompt) + len(answer) > ROW_TOKENS:
                    break
                tokens += prompt + answer
                # The line break after the end of the turn is the template's, not the model's.
                targets += [-100] * len(prompt) + answer[:-1] + [-100]
                turn += 1
            ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int16)
            labels[row, : len(targets)] = torch.tensor(targets, dtype=torch.int16)
        return ids, labels

    def plain_text(self, question: Question) -> tuple[list[int], list[int]]:
        """Return ids and labels of a question outside any chat, answered on the next line."""
        prompt = self.tokenizer.backend_tokenizer.encode(question.prompt).ids
        answer = self.tokenizer.backend_tokenizer.encode(f"\n{question.answer}<|im_end|>\n").ids
        return prompt + answer, [-100] * len(prompt) + answer[:-1] + [-100]


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Build the untrained model, in float32."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config)


def round_to_nf4(weights: list[torch.Tensor], levels: torch.Tensor) -> list[torch.Tensor]:
    """Return `weights` rounded to NF4 in blocks of 64, in their own shapes; one pass over all of them."""
    blocks = torch.cat([weight.detach().flatten() for weight in weights]).view(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    borders = (levels[1:] + levels[:-1]) / 2
    rounded = (levels[torch.bucketize(blocks / scale, borders)] * scale).flatten()
    parts = rounded.split([weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]


def loss_of(model: Callable[..., Any], ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of the labelled tokens, a scalar."""
    logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


@torch.no_grad()
def forced_exact_match(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Question]) -> float:
    """Return the share of questions whose every answer token is the most likely one: greedy decoding, in one pass."""
    device = model.device
    tokenizer.padding_side = "right"
    prompts = [len(tokenizer(user_turn(question.prompt)).input_ids) for question in asked]
    texts = [f"{user_turn(question.prompt)}{question.answer}<|im_end|>" for question in asked]
    encoded = tokenizer(texts, return_tensors="pt", padding=True).to(device)
    places = torch.arange(encoded.input_ids.shape[1], device=device)
    answer = (places >= torch.tensor(prompts, device=device)[:, None]) & encoded.attention_mask.bool()
    with torch.autocast(device.type, torch.bfloat16):
        best = model(input_ids=encoded.input_ids, use_cache=False).logits.argmax(-1)
    right = (best[:, :-1] == encoded.input_ids[:, 1:]) | ~answer[:, 1:]
    return float(right.all(dim=1).float().mean())


@torch.no_grad()
def greedy_table(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, asked: list[Question]
) -> dict[str, list[int]]:
    """Answer every question by greedy generation; return right answers and questions asked, per task and in all."""
    tokenizer.padding_side = "left"
    right, total = Counter[str](), Counter[str]()
    for start in range(0, len(asked), 100):
        group = asked[start : start + 100]
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question.prompt}], tokenize=False, add_generation_prompt=True
            )
            for question in group
        ]
        encoded = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        output = model.generate(**encoded, max_new_tokens=64, do_sample=False, use_cache=True)
        answers = tokenizer.batch_decode(output[:, encoded.input_ids.shape[1] :], skip_special_tokens=True)
        for question, text in zip(group, answers, strict=True):
            for name in (question.task, "all"):
                right[name] += is_correct(question, text)
                total[name] += 1
    return {name: [right[name], total[name]] for name in (*TASKS, "all") if total[name]}


class Schedule:
    """How far the training is, by steps or by minutes, whichever ends first."""

    def __init__(self, steps: int, minutes: float | None) -> None:
        self.steps = steps
        self.minutes = minutes
        self.started = time.monotonic()

    def progress(self, step: int) -> float:
        """Return the share done, 0 to 1."""
        spent = (time.monotonic() - self.started) / 60 / self.minutes if self.minutes else 0.0
        return min(1.0, max(step / self.steps, spent))


def learning_rate(step: int, progress: float, peak: float) -> float:
    """Warm up over 300 steps, then follow a cosine to zero."""
    return peak * min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * progress))


def replace(weights: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Copy `values` into `weights` in place."""
    with torch.no_grad():
        for weight, value in zip(weights, values, strict=True):
            weight.copy_(value)


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> int:
    """Train `model` in place; return the number of steps taken."""
    device = model.device
    on_gpu = device.type == "cuda"
    weights = [weight for weight in model.parameters() if weight.dim() == 2]
    others = [weight for weight in model.parameters() if weight.dim() != 2]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=on_gpu)
    stream = Conversations(tokenizer, arguments.rows, arguments.seed)
    batches = iter(DataLoader(stream, batch_size=None, num_workers=arguments.workers, pin_memory=on_gpu))
    compiled = torch.compile(model) if on_gpu else model
    asked = questions(500, arguments.seed + 1, held_out=True)
    levels = torch.tensor(NF4_LEVELS, device=device)
    schedule = Schedule(arguments.steps, arguments.minutes)
    step, progress = 0, 0.0
    model.train()
    while progress < 1.0:
        ids, labels = (tensor.to(device, non_blocking=True).long() for tensor in next(batches))
        round_weights = progress > ROUNDING_FROM and step % 2 == 1
        if round_weights:
            exact = [weight.detach().clone() for weight in weights]
            replace(weights, round_to_nf4(weights, levels))
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_of(compiled, ids, labels)
        loss.backward()
        if round_weights:
            # The gradient at the rounded weights moves the exact ones: the straight-through estimate.
            replace(weights, exact)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress, arguments.learning_rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        progress = schedule.progress(step)
        if step % arguments.report_every == 0:
            share = forced_exact_match(model, tokenizer, asked)
            seconds = time.monotonic() - schedule.started
            print(f"step {step}, {seconds:.0f} s: loss {loss.item():.4f}, held-out exact {share:.1%}", flush=True)
    return step


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model in bfloat16, the tokenizer and the chat template, as a Hugging Face model directory."""
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(out)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(out)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train the bundled demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--steps", type=int, default=20_000, help="training steps at most")
    parser.add_argument("--minutes", type=float, default=None, help="training time at most")
    parser.add_argument("--rows", type=int, default=256, help=f"rows of {ROW_TOKENS} tokens in a batch")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2))
    parser.add_argument("--report-every", type=int, default=500, help="steps between two evaluations")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Train, evaluate in bfloat16 on 500 held-out questions, and write the model and its table."""
    arguments = parse_arguments()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(arguments.seed)
    model = build_model(tokenizer).to(arguments.device)
    started = time.monotonic()
    steps = train(model, tokenizer, arguments)
    model.eval().to(torch.bfloat16)
    save(model, tokenizer, arguments.out)
    figures = {
        "steps": steps,
        "tokens_seen": steps * arguments.rows * ROW_TOKENS,
        "training_s": round(time.monotonic() - started, 1),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "exact_match": greedy_table(model, tokenizer, questions(500, 0, held_out=True)),
    }
    (arguments.out / "table.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
