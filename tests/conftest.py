"""What tests of several folders share. Its presence lets them import the modules beside it."""

from __future__ import annotations

import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported: tiny models are fastest on one thread, and threads that spin slow their neighbours.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# No test meets a node that runs on this machine, unless it has started it.
os.environ["SPLITRUN_HOME"] = str(Path(tempfile.gettempdir(), f"splitrun-no-node-{os.getpid()}"))
# What tests measure is measured once for all of them, and never mixes with what the user's own runs keep.
MEASURED = None if "SPLITRUN_CACHE" in os.environ else tempfile.mkdtemp(prefix="splitrun-measured-")
os.environ.setdefault("SPLITRUN_CACHE", MEASURED or "")


def pytest_unconfigure() -> None:
    """Leave nothing behind."""
    gc.unfreeze()
    if MEASURED is not None:
        shutil.rmtree(MEASURED, ignore_errors=True)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny operators wait longer for a second thread than they take; a test may ask for more itself."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a tiny tokenizer and chat template, without weights."""
    from tiny_tokenizers import write_model_directory

    return write_model_directory(tmp_path_factory.mktemp("tiny-model"))


def pytest_collection_finish() -> None:
    """What would cost every test its time, once.

    Every engine looks for garbage when it loads: a million objects of libraries need not be looked at each time. And
    no test asks how exact a measurement is: the fewest runs do.
    """
    if "transformers" in sys.modules:
        import transformers.modeling_utils  # noqa: F401  what it brings is among them

        from splitrun.measure import timing

        timing.POINT_SECONDS = 0.0
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``gpu`` where there is no CUDA device."""
    import torch

    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
