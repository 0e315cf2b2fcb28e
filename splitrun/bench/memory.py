"""How much memory this process came to hold: main memory above its start, and a card's with its context.

Main memory is the kernel's high-water mark of resident pages, anonymous and file pages alike. A card's is what torch
reserved at most, and what the driver reports beside that, at least the context. Also holds a card to its budget.
"""

from __future__ import annotations

from collections.abc import Mapping

from splitrun.errors import DoesNotFit
from splitrun.measure.context import LEAST_CONTEXT_BYTES
from splitrun.measure.probe import Machine, survey, this_machine
from splitrun.measure.resident import high_water_bytes, reset_high_water, resident_bytes
from splitrun.quantities import format_bytes


class MemoryMeter:
    """Made after the imports and before the load: what is resident then is not counted.

    ``budgets`` maps a device to its bytes; a CUDA card is held to its budget from here on: torch may allocate the
    budget less the measured context, so that running over is an error and not a wrong figure.
    """

    def __init__(self, budgets: Mapping[str, int], machine: Machine | None = None) -> None:
        self._machine = machine or this_machine()
        cards = [name for name in budgets if name.startswith("cuda:")]
        # NVML counts what other processes hold too, so the difference to this is an upper bound of our own.
        self._free_before = {name: self._driver_free(name) for name in cards}
        contexts = survey(self._machine, compute=False).contexts if cards else {}
        self._contexts = {name: contexts.get(name, 0) for name in cards}
        for name in cards:
            self._hold(name, budgets[name])
        # Where that is not allowed, imports count if they held more than the load does.
        reset_high_water()
        self.start_bytes = resident_bytes()

    def peak_bytes(self) -> dict[str, int]:
        """Device -> the most that was held so far."""
        peaks = {"cpu": max(0, high_water_bytes() - self.start_bytes)}
        for name, context in self._contexts.items():
            before, now, cuda = self._free_before[name], self._driver_free(name), self._machine.torch.cuda
            reserved, most = int(cuda.memory_reserved(_index(name))), int(cuda.max_memory_reserved(_index(name)))
            beside = context if before is None or now is None else before - now - reserved
            peaks[name] = most + (beside if beside >= LEAST_CONTEXT_BYTES else context)
        return peaks

    def _hold(self, name: str, budget: int) -> None:
        context, cuda = self._contexts[name], self._machine.torch.cuda
        if budget <= context:
            raise DoesNotFit(
                f"{name}: the budget of {format_bytes(budget)} does not even hold the card's context of "
                f"{format_bytes(context)}; give it more with --memory",
                {name: context - budget},
            )
        total = int(cuda.mem_get_info(_index(name))[1])
        cuda.set_per_process_memory_fraction(min(1.0, (budget - context) / total), _index(name))

    def _driver_free(self, name: str) -> int | None:
        properties = self._machine.torch.cuda.get_device_properties(_index(name))
        return self._machine.driver_free(str(getattr(properties, "uuid", "")))

    def context_bytes(self, name: str) -> int:
        """The measured context of a card, 0 for anything else."""
        return self._contexts.get(name, 0)


def _index(name: str) -> int:
    return int(name.partition(":")[2])
