"""Run a plan once and fold what it took into later predictions.

The run is a contest without contestants; the factors are kept by ``splitrun.measure.calibration``. Decides nothing.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

from splitrun.bench import contest
from splitrun.errors import InvalidPlacement, StageError
from splitrun.measure.calibration import fold
from splitrun.measure.others import Disturbance
from splitrun.measure.probe import probe, this_machine
from splitrun.planner.facts import Factor
from splitrun.planner.placement import Placement

PROMPT_TOKENS, NEW_TOKENS = 512, 32
REPEAT = 3
MOST_DISTURBED = 0.1
"""The share of the processors that others may take while a run is to tell something."""


def calibrate(placement: Placement, load: str) -> list[str]:
    """Run the placement, keep what its units' seconds must be multiplied with, and say both in lines. Keeps nothing
    where others took the processors meanwhile.

    Raises StageError when the run fails, InvalidPlacement when stages are on other machines or in other processes.
    """
    elsewhere = sorted({stage.device for stage in placement.stages if "/" in stage.device})
    if elsewhere:
        raise InvalidPlacement(
            f"--calibrate runs a plan in this process, and this one has stages on {' and '.join(elsewhere)}: leave it "
            "out, or plan for devices of this machine alone"
        )
    context = placement.workload.context
    new = max(2, min(NEW_TOKENS, context // 4))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "placement.yaml")
        placement.save(file)
        terms = contest.make_terms(placement, file, min(PROMPT_TOKENS, context - new), new, REPEAT, load)
        with contest.other_process() as process:
            predicted = contest.predict_in(process, placement, terms)
        disturbance, start = Disturbance(), time.monotonic()
        (result,) = contest.hold(terms, ())
        processors = (time.monotonic() - start) * (os.cpu_count() or 1)
        disturbed = disturbance.seconds() / max(processors, 1e-9)
    if result.error:
        raise StageError(result.error)
    lines = contest.against(predicted, result)
    if disturbed > MOST_DISTURBED:
        busy = f"others took {disturbed:.0%} of the processors meanwhile"
        return [*lines, f"nothing is kept: {busy}; calibrate again when they are done"]
    own_s = predicted.step_s - sum(stage.decode_s for stage in predicted.stages)
    own_prompt_s = predicted.time_to_first_token_s - sum(stage.prefill_s for stage in predicted.stages)
    ratio = Factor(
        _of_stages(1 / result.decode_tokens_per_s, predicted.step_s, own_s),
        _of_stages(result.ttft_s, predicted.time_to_first_token_s, own_prompt_s),
    )
    kept = this_machine().cache
    devices = probe(dict.fromkeys(placement.device_names, "auto")).keeping(placement.kv)
    model = placement.model.fingerprint or ""
    used = sorted({(stage.device, stage.weights) for stage in placement.stages})
    folded = fold(kept, model, [(devices.device(name), weights) for name, weights in used], ratio)
    return lines + [
        f"kept         {weights} on {name}: {found.decode:.2f} decoding, {found.prefill:.2f} for prompts"
        for (name, weights), found in zip(used, folded, strict=True)
    ]


def _of_stages(measured_s: float, predicted_s: float, own_s: float) -> float:
    """Measured over predicted of what the stages take: hops and the engine's own share are measured apart."""
    own_s = max(own_s, 0.0)
    return max(measured_s - own_s, 0.0) / max(predicted_s - own_s, 1e-9)
