"""`model.push`: the adapter, or the merged model, to the hub, with its card.

Private unless said otherwise, and a repository that is public already is not added to without
`private=False`. The token is huggingface-hub's business (`hf auth login` or HF_TOKEN): it is no
argument here, so it gets into no setting, log or card.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sloth import __version__, exporting
from sloth.errors import UnknownModel, UploadFailed
from sloth.formats.hub import is_repo_id
from sloth.redact import Redactor
from sloth.train.run_folder import published_in

if TYPE_CHECKING:
    from sloth.model import Model

_TOKENS = "https://huggingface.co/settings/tokens"
_SUFFIXES = {".json", ".safetensors", ".md", ".svg", ".png", ".jinja"}
_NAMES = {"tokenizer.model", "vocab.txt", "merges.txt", "LICENSE", "LICENSE.txt", "NOTICE"}


@dataclass(frozen=True)
class Pushed:
    """Where a push went: the repository's page, and the commit it became."""

    url: str
    commit: str


def push(
    model: Model, repo_id: str, *, private: bool, merged: bool, message: str | None = None
) -> Pushed:
    """Save the adapter (or, merged or without one, the whole model) and upload that folder.

    Raises ValueError for a name that is none, UploadFailed, AdapterMismatch, CheckpointMismatch.
    """
    _require_name(repo_id)
    _require_token()
    whole = merged or not model.has_adapter
    with tempfile.TemporaryDirectory(prefix="sloth-push-") as scratch:
        folder = Path(scratch) / "files"
        if whole:
            exporting.save_merged(model, folder)
        else:
            exporting.save_adapter(model, folder)
        said = message or f"{'Merged model' if whole else 'LoRA adapter'}, sloth {__version__}"
        return upload(folder, repo_id, private, said)


def push_folder(folder: Path, repo_id: str, *, private: bool, message: str | None = None) -> Pushed:
    """Upload a saved adapter or model as it is; of a run's folder what it trained.

    Files that are no part of either are refused, so that none leaves the machine by accident.
    Raises UnknownModel, ValueError, UploadFailed.
    """
    _require_name(repo_id)
    inner = next(iter(published_in(folder)), folder)
    is_adapter = (inner / "adapter_config.json").is_file()
    if not is_adapter and not (inner / "config.json").is_file():
        raise UnknownModel(
            f"{folder} holds no adapter_config.json or config.json; give the folder of a saved "
            "adapter or model, or of a finished run"
        )
    files = [path.relative_to(inner) for path in inner.rglob("*") if not path.is_dir()]
    strange = sorted(str(path) for path in files if not _is_part_of_a_model(path))
    if strange:
        raise ValueError(
            f"{inner} holds files that are no part of a model: {', '.join(strange[:5])}"
            f"{', ...' if len(strange) > 5 else ''}; nothing is uploaded, take them out first"
        )
    if not any(path.suffix == ".safetensors" for path in files):
        raise UnknownModel(f"{inner} holds no weights (*.safetensors); nothing is uploaded")
    _require_token()
    said = message or f"{'LoRA adapter' if is_adapter else 'Model'}, sloth {__version__}"
    return upload(inner, repo_id, private, said)


def upload(folder: Path, repo_id: str, private: bool, message: str) -> Pushed:
    """Every file of a folder as one commit; the repository is made where there is none.

    Raises UploadFailed, saying what to do.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    api = HfApi(library_name="sloth", library_version=__version__)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UploadFailed(
                f"{repo_id} exists and everyone can read it; give private=False (--public) if that "
                "is meant, or another name"
            )
        done = api.upload_folder(repo_id=repo_id, folder_path=str(folder), commit_message=message)
    except HfHubHTTPError as error:
        raise UploadFailed(_why(error.response.status_code, repo_id, str(error))) from error
    except (HTTPError, OSError) as error:
        text = Redactor().text(str(error)) or type(error).__name__
        raise UploadFailed(
            f"{repo_id}: the hub could not be reached, nothing is known to be uploaded ({text}); "
            "push again, what is there already is not sent twice"
        ) from error
    return Pushed(f"{api.endpoint}/{repo_id}", done.oid)


def _is_part_of_a_model(path: Path) -> bool:
    is_template = path.parent.name == "additional_chat_templates" and path.suffix == ".jinja"
    is_flat = len(path.parts) == 1 and not path.name.startswith(".")
    return is_template or (is_flat and (path.suffix in _SUFFIXES or path.name in _NAMES))


def _require_name(repo_id: str) -> None:
    if not is_repo_id(repo_id):
        raise ValueError(f"{repo_id!r} is no repository of the hub; one is written owner/name")


def _require_token() -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise UploadFailed(
            f"no Hugging Face token on this machine; make one with write permission at {_TOKENS}, "
            "then run `hf auth login` or set HF_TOKEN"
        )


def _why(status: int, repo_id: str, text: str) -> str:
    owner = repo_id.split("/")[0]
    if status == 401:
        return (
            f"{repo_id}: the hub does not accept this machine's token (expired or revoked?); make "
            f"one with write permission at {_TOKENS}, then run `hf auth login`"
        )
    if status == 403:
        return (
            f"{repo_id}: the token may not write there; it needs write permission for {owner!r} "
            f"({_TOKENS}), or the name should begin with your own"
        )
    return f"{repo_id}: the hub answers {status}: {Redactor().text(' '.join(text.split()))[:300]}"
