"""The contestants transformers, bitsandbytes and accelerate: what one would run without splitrun, on the same budgets.

``transformers`` runs the whole model on one device, in bf16: the first card whose budget holds it, else the CPU.
``transformers-fp32`` is the same in float32, which is faster on processors that have no products in bf16.
``bitsandbytes`` is the same with the linear layers in nf4; it needs the weights. ``accelerate``
splits it with ``device_map="auto"`` under ``max_memory``: what does not fit a card stays in main memory and is copied
to the card for every token.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from splitrun.bench.memory import MemoryMeter
from splitrun.bench.terms import Result, Round, Terms, summarise
from splitrun.errors import InvalidRequest
from splitrun.model.skeleton import quiet_transformers

WORKSPACE_SHARE = 0.15
"""Of a card's budget kept from accelerate's weights: it plans for parameters only, and its hooks copy layers in."""


def play(terms: Terms) -> Result:
    """Load, run the rounds. Raises what transformers and accelerate raise."""
    meter = MemoryMeter(terms.budgets)
    start = time.perf_counter()
    with quiet_transformers():
        model, devices = (_accelerate if terms.contestant == "accelerate" else _transformers)(terms, meter)
    load_s = time.perf_counter() - start
    rounds = [_round(model, terms, number) for number in range(terms.repeat + 1)]
    return summarise(terms, load_s, rounds[1:], meter.peak_bytes(), devices)


def _transformers(terms: Terms, meter: MemoryMeter) -> tuple[Any, Mapping[str, str]]:
    from transformers import AutoModelForCausalLM

    packed = terms.contestant == "bitsandbytes"
    dtype = torch.float32 if terms.contestant == "transformers-fp32" else torch.bfloat16
    needed = dtype.itemsize * _values(terms)  # bitsandbytes too begins with all of it
    cards = {name: budget - meter.context_bytes(name) for name, budget in terms.budgets.items() if _is_card(name)}
    device = next((name for name, room in cards.items() if needed < room * (1 - WORKSPACE_SHARE)), "cpu")
    if terms.load == "dummy" and packed:
        raise InvalidRequest("bitsandbytes quantizes weights that are there: leave --load dummy out")
    if terms.load == "dummy":
        model = _random_model(terms).to(device, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            terms.model,
            dtype=dtype,
            device_map=device,
            quantization_config=_nf4() if packed else None,
        )
    shown = "fp32" if dtype == torch.float32 else "bf16"
    return model.eval(), {device: "linear layers nf4" if packed else f"everything {shown}"}


def _nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _accelerate(terms: Terms, meter: MemoryMeter) -> tuple[Any, Mapping[str, str]]:
    from accelerate import dispatch_model, infer_auto_device_map
    from transformers import AutoModelForCausalLM

    room: dict[int | str, int] = {}
    if any(not _is_card(name) for name in terms.budgets):
        room["cpu"] = sum(budget for name, budget in terms.budgets.items() if not _is_card(name))
    for name, budget in terms.budgets.items():
        if _is_card(name):
            room[int(name.partition(":")[2])] = int((budget - meter.context_bytes(name)) * (1 - WORKSPACE_SHARE))
    if terms.load == "dummy":
        model = _random_model(terms)
        places = infer_auto_device_map(model, max_memory=room or None, no_split_module_classes=model._no_split_modules)
        model = dispatch_model(model, places)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            terms.model, dtype=torch.bfloat16, device_map="auto", max_memory=room or None
        )
    counts: dict[str, int] = {}
    for place in getattr(model, "hf_device_map", {"": "cpu"}).values():
        name = f"cuda:{place}" if isinstance(place, int) else str(place)
        counts[name] = counts.get(name, 0) + 1
    return model.eval(), {name: f"{count} modules bf16" for name, count in counts.items()}


def _random_model(terms: Terms) -> Any:
    """The model with random bf16 weights in main memory, those that splitrun's own contestant has."""
    from transformers import AutoConfig

    from splitrun.model.dummy import DummySource
    from splitrun.model.skeleton import build_skeleton
    from splitrun.model.weights import Loader

    model = build_skeleton(AutoConfig.from_pretrained(terms.model, trust_remote_code=False), "bf16").model
    source = DummySource.of(model)
    Loader(model, source, torch.bfloat16).load(source.names(), "bf16", "cpu")
    return model


def _values(terms: Terms) -> int:
    from transformers import AutoConfig

    from splitrun.model.skeleton import build_skeleton

    model = build_skeleton(AutoConfig.from_pretrained(terms.model, trust_remote_code=False), "bf16").model
    return sum(parameter.numel() for parameter in model.parameters())


def _is_card(name: str) -> bool:
    return not name.startswith("cpu")


class _Clock:
    """A streamer that notes when tokens come. transformers calls it with the prompt first."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.moments: list[float] = []
        self._prompt_seen = False

    def put(self, value: Any) -> None:
        """Note a token, which is on the CPU by now."""
        if self._prompt_seen:
            self.moments.append(time.perf_counter() - self.start)
        self._prompt_seen = True

    def end(self) -> None:
        """Nothing is left to note."""


def _round(model: Any, terms: Terms, number: int) -> Round:
    ids = torch.tensor([terms.prompt(number)], device=model.device)
    clock = _Clock()
    count = terms.new_tokens
    with torch.inference_mode():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=count,
            max_new_tokens=count,
            pad_token_id=0,
            streamer=clock,
        )
    return Round(clock.moments[0], clock.moments[-1], len(clock.moments))
