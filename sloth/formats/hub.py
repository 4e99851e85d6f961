"""From the name a user types to files on disk: aliases, paths, and the Hugging Face hub.

Aliases: `x` is the base model, `x-instruct` the chat model. A gated original is answered with where
its licence is accepted, how to log in, and an open pre-quantised copy. Access tokens are
huggingface-hub's business (`hf auth login` or HF_TOKEN); none passes through here.
"""

from __future__ import annotations

import difflib
import errno
import re
from dataclasses import dataclass
from pathlib import Path

from sloth.errors import DataError, UnknownModel
from sloth.formats.download import fetch

# alias -> (repository, open pre-quantised copy or None). Where the original is gated, the alias
# names it.
ALIASES: dict[str, tuple[str, str | None]] = {
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "unsloth/llama-2-7b-bnb-4bit"),
    "llama-2-7b-instruct": ("meta-llama/Llama-2-7b-chat-hf", "unsloth/llama-2-7b-chat-bnb-4bit"),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "unsloth/llama-3-8b-bnb-4bit"),
    "llama-3-8b-instruct": (
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "unsloth/llama-3-8b-Instruct-bnb-4bit",
    ),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B", "unsloth/Llama-3.1-8B-unsloth-bnb-4bit"),
    "llama-3.1-8b-instruct": (
        "meta-llama/Llama-3.1-8B-Instruct",
        "unsloth/Llama-3.1-8B-Instruct-unsloth-bnb-4bit",
    ),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "unsloth/Llama-3.2-1B-unsloth-bnb-4bit"),
    "llama-3.2-1b-instruct": (
        "meta-llama/Llama-3.2-1B-Instruct",
        "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit",
    ),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "unsloth/Llama-3.2-3B-unsloth-bnb-4bit"),
    "llama-3.2-3b-instruct": (
        "meta-llama/Llama-3.2-3B-Instruct",
        "unsloth/Llama-3.2-3B-Instruct-unsloth-bnb-4bit",
    ),
    "llama-3.3-70b-instruct": (
        "meta-llama/Llama-3.3-70B-Instruct",
        "unsloth/Llama-3.3-70B-Instruct-unsloth-bnb-4bit",
    ),
    "deepseek-r1-distill-llama-8b": (
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "unsloth/DeepSeek-R1-Distill-Llama-8B-unsloth-bnb-4bit",
    ),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M", None),
    "smollm2-135m-instruct": ("HuggingFaceTB/SmolLM2-135M-Instruct", None),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M", None),
    "smollm2-360m-instruct": ("HuggingFaceTB/SmolLM2-360M-Instruct", None),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B", None),
    "smollm2-1.7b-instruct": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", None),
    "tinyllama": (
        "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
        "unsloth/tinyllama-bnb-4bit",
    ),
    "tinyllama-instruct": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "unsloth/tinyllama-chat-bnb-4bit"),
    "yi-6b": ("01-ai/Yi-6B", "unsloth/yi-6b-bnb-4bit"),
    "codellama-7b": ("codellama/CodeLlama-7b-hf", None),
    "codellama-7b-instruct": ("codellama/CodeLlama-7b-Instruct-hf", None),
    "mistral-7b": ("mistralai/Mistral-7B-v0.3", "unsloth/mistral-7b-v0.3-bnb-4bit"),
    "mistral-7b-instruct": (
        "mistralai/Mistral-7B-Instruct-v0.3",
        "unsloth/mistral-7b-instruct-v0.3-bnb-4bit",
    ),
    "mistral-nemo-12b": (
        "mistralai/Mistral-Nemo-Base-2407",
        "unsloth/Mistral-Nemo-Base-2407-bnb-4bit",
    ),
    "mistral-nemo-12b-instruct": (
        "mistralai/Mistral-Nemo-Instruct-2407",
        "unsloth/Mistral-Nemo-Instruct-2407-bnb-4bit",
    ),
    "gemma-2-2b": ("google/gemma-2-2b", "unsloth/gemma-2-2b-bnb-4bit"),
    "gemma-2-2b-instruct": ("google/gemma-2-2b-it", "unsloth/gemma-2-2b-it-bnb-4bit"),
    "gemma-2-9b": ("google/gemma-2-9b", "unsloth/gemma-2-9b-bnb-4bit"),
    "gemma-2-9b-instruct": ("google/gemma-2-9b-it", "unsloth/gemma-2-9b-it-bnb-4bit"),
    "gemma-3-270m": ("google/gemma-3-270m", "unsloth/gemma-3-270m-unsloth-bnb-4bit"),
    "gemma-3-270m-instruct": (
        "google/gemma-3-270m-it",
        "unsloth/gemma-3-270m-it-unsloth-bnb-4bit",
    ),
    "gemma-3-1b": ("google/gemma-3-1b-pt", "unsloth/gemma-3-1b-pt-unsloth-bnb-4bit"),
    "gemma-3-1b-instruct": ("google/gemma-3-1b-it", "unsloth/gemma-3-1b-it-unsloth-bnb-4bit"),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", "unsloth/Qwen2.5-0.5B-unsloth-bnb-4bit"),
    "qwen2.5-0.5b-instruct": (
        "Qwen/Qwen2.5-0.5B-Instruct",
        "unsloth/Qwen2.5-0.5B-Instruct-unsloth-bnb-4bit",
    ),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B", "unsloth/Qwen2.5-7B-unsloth-bnb-4bit"),
    "qwen2.5-7b-instruct": (
        "Qwen/Qwen2.5-7B-Instruct",
        "unsloth/Qwen2.5-7B-Instruct-unsloth-bnb-4bit",
    ),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B-Base", "unsloth/Qwen3-0.6B-Base-unsloth-bnb-4bit"),
    "qwen3-0.6b-instruct": ("Qwen/Qwen3-0.6B", "unsloth/Qwen3-0.6B-unsloth-bnb-4bit"),
    "qwen3-8b": ("Qwen/Qwen3-8B-Base", "unsloth/Qwen3-8B-Base-unsloth-bnb-4bit"),
    "qwen3-8b-instruct": ("Qwen/Qwen3-8B", "unsloth/Qwen3-8B-unsloth-bnb-4bit"),
}

# What a model folder needs: never code, never pickles, and one of the weight formats.
_PATTERNS = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja", "README.md"]
# The same weights again, in the layout of the model's makers.
_LEFT_OUT = ["consolidated*", "original/*"]
# Where the hub keeps its own conversion of a data set that comes in other files.
_PARQUET_BRANCH = "refs/convert/parquet"
# The hub's own rule, so that no name is refused after work was done for it.
_REPO_PART = r"(?!-)(?!\.)[A-Za-z0-9._-]{1,96}(?<![.-])"
_REPO_ID = re.compile(rf"(?!.*(--|\.\.))(?!.*\.git$){_REPO_PART}/{_REPO_PART}")
_SAID_CHARACTERS = 200  # of a name that is refused
# A card's metadata is YAML; one line of it is wanted, and no parser is let at a stranger's file.
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9.+-]{1,64})[\"']?[ \t]*$", re.MULTILINE)
_CARD_BYTES = 1 << 16


@dataclass(frozen=True)
class Resolved:
    """Files on disk and where they came from; repo_id and revision (commit) on the hub."""

    path: Path
    repo_id: str | None = None
    revision: str | None = None


def resolve(name: str, revision: str | None = None, weights: bool = True) -> Resolved:
    """Alias, repository id, folder or .gguf file -> files on disk, downloaded if need be.

    revision: branch, tag or commit on the hub. weights: False fetches config and tokenizer alone.
    Raises UnknownModel, saying what to do.
    """
    path = _local(name)
    if path is not None:
        if revision is not None:
            raise ValueError(f"revision={revision!r} has no meaning for the local path {name}")
        if path.is_file() and path.suffix != ".gguf":
            raise UnknownModel(f"{name} is a file, but no .gguf; give the folder it is in")
        return Resolved(path)
    repo_id, open_copy = ALIASES.get(name.lower(), (name, None))
    if not _REPO_ID.fullmatch(repo_id) or name.endswith(".gguf"):
        said = name[:_SAID_CHARACTERS]
        raise UnknownModel(f"{said!r} is no folder, no .gguf file and no alias.{_nearest(said)}")
    return _download(repo_id, revision, open_copy, weights)


def _local(name: str) -> Path | None:
    """The folder or file of that name, if there is one."""
    if not name.strip():  # which a path would read as the working folder
        return None
    try:
        path = Path(name).expanduser()
        return path if path.is_dir() or path.is_file() else None
    except RuntimeError:  # ~name, of nobody
        return None
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return None


def is_repo_id(name: str) -> bool:
    """Whether it is written owner/name."""
    return _REPO_ID.fullmatch(name) is not None


def read_license(path: Path) -> str | None:
    """The licence that a model folder's card names in its metadata, by the hub's identifier."""
    try:
        with (path / "README.md").open("rb") as stream:
            text = stream.read(_CARD_BYTES).decode("utf-8", "replace")
    except OSError:
        return None
    head = text.split("\n---", 1)[0] if text.startswith("---\n") else ""
    found = _LICENSE.search(head)
    return found[1] if found else None


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name.lower(), ALIASES, n=4, cutoff=0.5)
    known = ", ".join(close) if close else ", ".join(list(ALIASES)[:8]) + ", ..."
    return f" Nearest aliases: {known}. A hub repository is written owner/name"


def _download(repo_id: str, revision: str | None, open_copy: str | None, weights: bool) -> Resolved:
    from huggingface_hub.errors import (
        GatedRepoError,
        HTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        patterns = [p for p in _PATTERNS if weights or p != "*.safetensors"]
        path = fetch(repo_id, revision, patterns, leave_out=_LEFT_OUT)
    except GatedRepoError as error:
        instead = f" Or use the open 4-bit copy: sloth.load({open_copy!r})" if open_copy else ""
        raise UnknownModel(
            f"{repo_id} is gated: its owner asks you to accept a licence. Accept it at "
            f"https://huggingface.co/{repo_id}, then run `hf auth login`.{instead}"
        ) from error
    except RevisionNotFoundError as error:
        raise UnknownModel(f"{repo_id} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise UnknownModel(
            f"{repo_id} is not on the hub, or is private and you are not logged in "
            f"(`hf auth login`).{_nearest(repo_id.split('/')[-1])}"
        ) from error
    except (HTTPError, OSError) as error:
        raise UnknownModel(
            f"{repo_id} could not be fetched and is not in the local cache: {error}"
        ) from error
    # The hub's cache names a snapshot folder by its commit.
    return Resolved(path, repo_id, path.name)


def fetch_dataset(repo_id: str, revision: str | None = None) -> Path:
    """The Parquet files of a data set on the hub: its own, else those that the hub made of it.

    Nothing of it is run. Raises DataError, saying what to do.
    """
    from huggingface_hub.errors import HTTPError

    if not _REPO_ID.fullmatch(repo_id):
        said = repo_id[:_SAID_CHARACTERS]
        raise DataError(f"{said!r} is no data set on the hub; one is written owner/name")
    for branch in (revision, _PARQUET_BRANCH) if revision is None else (revision,):
        try:
            folder = fetch(repo_id, branch, ["*.parquet"], repo_type="dataset")
        except (HTTPError, OSError) as error:
            raise DataError(
                f"the data set {repo_id} could not be fetched and is not in the local cache (a "
                f"gated or private one needs `hf auth login`): {error}"
            ) from error
        if any(folder.rglob("*.parquet")):
            return folder
    raise DataError(f"the data set {repo_id} has no Parquet files; download it, and give its files")
