"""What to change when a device runs full although the plan fits it: others use it too, or more is needed than foreseen.

Each piece of advice is an option of ``splitrun plan`` with its value. Pure; reads the placement alone.
"""

from __future__ import annotations

from splitrun.planner.placement import Placement

LEANEST = "nf4"
PART = 10
"""A budget is lowered by one part in so many."""


def relief(placement: Placement, device: str) -> str:
    """ "--context 2048 (now 4096), --weights nf4, or --memory cuda:0=3686MiB,cpu=8192MiB, a tenth less of cuda:0"."""
    workload = placement.workload
    context = workload.context // 2 // workload.block_tokens * workload.block_tokens
    options = [f"--context {context} (now {workload.context})"] if context else []
    if workload.sessions > 1:
        options.append(f"--sessions {workload.sessions // 2} (now {workload.sessions})")
    if any(stage.weights != LEANEST for stage in placement.stages if stage.device == device):
        options.append(f"--weights {LEANEST}")
    if device in placement.devices:
        budgets = {**placement.devices, device: placement.devices[device] * (PART - 1) // PART}
        sizes = ",".join(f"{name}={max(size >> 20, 1)}MiB" for name, size in budgets.items())
        options.append(f"--memory {sizes}, a tenth less of {device}")
    if not options:
        return f"less on {device}: a smaller model, or fewer layers there"
    return ", or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
