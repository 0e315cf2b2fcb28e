"""The Hugging Face Hub: fetch a model's description, then its safetensors files, and say plainly why it failed.

Knows nothing of configs and tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from splitrun.errors import MissingWeights, ModelError, UnsupportedModel
from splitrun.model.source import INDEX_FILE, PICKLES, SINGLE_FILE, weight_files

DESCRIPTION = (
    *("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.*", "merges.txt", "*.model", "chat_template*", "additional_chat_templates/*", INDEX_FILE),
)
"""Files that are fetched whatever is done with the model: all small."""
CONNECT_S = 2.5
"""How long the Hub may take to accept a connection before it counts as unreachable."""


def fetch_description(name: str, revision: str | None) -> Path:
    """Fetch config, tokenizer and index; the directory that holds them. Raises a ModelError in one line."""
    from huggingface_hub import hf_hub_download, snapshot_download

    with _translated(name, revision):
        _reach(name, revision)
        config = hf_hub_download(name, "config.json", revision=revision)
        snapshot_download(name, revision=revision, allow_patterns=list(DESCRIPTION))
    return Path(config).parent


def _reach(name: str, revision: str | None) -> None:
    """One quick look at a model that is not in the cache: the downloads would try for half a minute before they fail.

    Raises what the Hub or the network answers.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    # Passed on to the HTTP library, which takes its own kind of timeout too.
    timeout: Any = _http_library().Timeout(10.0, connect=CONNECT_S)
    get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=timeout)


def _http_library() -> Any:
    """The HTTP library that this huggingface_hub uses: httpx, or its successor."""
    from huggingface_hub import get_session

    kind = next(base for base in type(get_session()).__mro__ if base.__module__.startswith("httpx"))
    return import_module(kind.__module__.partition(".")[0])


def download_weights(name: str, revision: str | None, path: Path) -> None:
    """Fetch the safetensors files of a described model into its directory. Raises a ModelError in one line."""
    from huggingface_hub import snapshot_download

    wanted = [file.name for file in weight_files(path)] if (path / INDEX_FILE).is_file() else [SINGLE_FILE]
    if all((path / file).is_file() for file in wanted):
        return
    with _translated(name, revision):
        snapshot_download(name, revision=revision or _commit(path), allow_patterns=wanted)
        missing = [file for file in wanted if not (path / file).is_file()]
        if missing:
            raise _absent(name, revision, missing)


def _commit(path: Path) -> str | None:
    """The commit of a snapshot directory, so that weights are of the same state as the description."""
    return path.name if path.parent.name == "snapshots" else None


def _absent(name: str, revision: str | None, missing: list[str]) -> ModelError:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return MissingWeights(f"{missing[0]} of {name} is not in the cache, and HF_HUB_OFFLINE is set: unset it once")
    held = HfApi().list_repo_files(name, revision=revision)
    endings = tuple(pattern.removeprefix("*") for pattern in PICKLES)
    if missing == [SINGLE_FILE] and any(file.endswith(endings) for file in held):
        return UnsupportedModel(
            f"{name} has pickled weights only, and these are refused: they can run code; take a revision with "
            "safetensors (many repositories have one under refs/pr/…) or convert it with save_pretrained"
        )
    if missing == [SINGLE_FILE] and any(file.endswith(".gguf") for file in held):
        return UnsupportedModel(f"{name} has GGUF files only, which splitrun does not read: take the original model")
    return MissingWeights(f"{name} lacks {missing[0]} on the Hub")


@contextmanager
def _translated(name: str, revision: str | None) -> Iterator[None]:
    """Turn the Hub's errors into one line each; the most special ones first."""
    from huggingface_hub import constants, errors

    at = f"{name} at revision {revision}" if revision else name
    unreachable = (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, _http_library().TransportError)
    log = logging.getLogger("huggingface_hub")
    before = log.level
    log.setLevel(logging.CRITICAL)  # its attempts are no news beside the one line that tells how it ended
    try:
        yield
    except errors.GatedRepoError as error:
        raise MissingWeights(
            f"{at} is gated: accept its terms on https://huggingface.co/{name}, then set HF_TOKEN"
        ) from (error)
    except errors.RepositoryNotFoundError as error:
        raise MissingWeights(
            f"there is no directory {name} and no model of that name on the Hub (or HF_TOKEN is needed to see it)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise MissingWeights(f"{name} has no revision {revision} on the Hub") from error
    except unreachable as error:
        offline = "HF_HUB_OFFLINE is set: unset it once"
        why = offline if constants.HF_HUB_OFFLINE else "the Hub cannot be reached: go online"
        raise MissingWeights(f"{at} is not in the cache, and {why} or give a directory") from error
    except errors.EntryNotFoundError as error:
        raise MissingWeights(f"{at} has no config.json on the Hub: it is not a transformers model") from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise MissingWeights(f"{at} cannot be fetched from the Hub: {_first_line(error)}") from error
    except OSError as error:
        raise MissingWeights(f"{at} cannot be fetched into the cache: {_first_line(error)}") from error
    finally:
        log.setLevel(before)


def _first_line(error: Any) -> str:
    return str(error).strip().split("\n")[0][:200]
