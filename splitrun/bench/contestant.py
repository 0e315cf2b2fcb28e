"""The process of one contestant: terms on standard input, one JSON line with the result at the end of the output.

Whatever a contestant raises becomes a result that says so: that another library refuses a task is a finding of the
bench, and a crash of one contestant must not take the figures of the others along.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback

from splitrun.bench.terms import Result, Terms
from splitrun.cluster.lines import end_with_parent
from splitrun.errors import SplitrunError

DEBUG_VARIABLE = "SPLITRUN_DEBUG"
FAILURES = (SplitrunError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, ImportError)
"""Everything that libraries raise when they refuse or run out of memory (torch's own error is a RuntimeError)."""


def main() -> None:
    """Play the terms on standard input. Ends with the process that started it."""
    end_with_parent()
    terms = Terms(**json.load(sys.stdin))
    # Libraries talk on standard output too: only the result may go there.
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    print(json.dumps(_play(terms).to_json()), file=out, flush=True)


def _play(terms: Terms) -> Result:
    # Everybody's imports come before the memory meter starts, so that nobody's libraries count as the model's memory.
    import accelerate
    import transformers.modeling_utils

    logging.getLogger(accelerate.__name__).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if terms.contestant == "splitrun":
        from splitrun.bench.own import play
    else:
        from splitrun.bench.foreign import play
    try:
        return play(terms)
    except FAILURES as error:
        if os.environ.get(DEBUG_VARIABLE):
            traceback.print_exception(error)
        message = " ".join(str(error).split())[:400]
        text = message if isinstance(error, SplitrunError) else f"{type(error).__name__}: {message}"
        return Result(terms.contestant, terms.prompt_tokens, terms.new_tokens, error=text)


if __name__ == "__main__":
    main()
