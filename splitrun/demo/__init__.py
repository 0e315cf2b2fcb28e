"""The bundled demo model: a tiny Qwen3 trained by `examples/train_demo.py`, and the tasks it was trained on.

Knows where its files lie; does not know how a model is loaded or run.
"""

from pathlib import Path


def demo_path() -> Path:
    """Return the folder with the demo's config, weights and tokenizer: a Hugging Face model directory."""
    return Path(__file__).parent
