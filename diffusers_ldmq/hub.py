"""Sharing on the hub: a saved pipeline with its model card, plan, measurements and pictures, without local paths."""

import json
import logging
import os
import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path, PureWindowsPath
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .card import MARK, Card, write_card
from .card_inputs import Told, card_of, draw_samples
from .checkpoints import SAVING_OPTIONS, is_hub_id
from .errors import LDMQError
from .hub_errors import HUB_ERRORS, hub_failure, is_missing_file
from .output import folder_beside
from .sampling import Sampling
from .serialization import MAX_JSON_BYTES, read_json

logger = logging.getLogger(__name__)

PATH_KEYS = ("_name_or_path", "name_or_path")
"""Keys of config files in which the libraries keep where a model was loaded from, the user's folders among it."""


@dataclass(frozen=True, slots=True)
class Push:
    """Where a model goes. private: None = as the owner's account has it; revision: a branch, made where it is missing;
    token: None = the stored one; create_pr: propose the files as a pull request instead of committing them."""

    repo_id: str
    private: bool | None = None
    revision: str | None = None
    token: str | bool | None = None
    commit_message: str | None = None
    create_pr: bool = False

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as cause:
            raise hub_failure(str(self.repo_id), cause) from None
        if self.create_pr and self.revision is not None:
            raise LDMQError(f"{self.repo_id}: a pull request always goes to main; leave revision {self.revision!r} out")


def push_pipeline(pipe: Any, repo_id: str, folder: str | os.PathLike[str] | None = None, **options: Any) -> str:
    """Save a quantized pipeline and push it with its card; the commit's address. folder: where it is saved already;
    options: fields of Push, Told and Sampling, and of SAVING_OPTIONS. Raises LDMQError in one line."""
    push = Push(repo_id, **_taken(options, Push))
    told = Told(**_taken(options, Told), sampling=Sampling(**_taken(options, Sampling)))
    saving = {name: options.pop(name) for name in SAVING_OPTIONS if name in options}
    if options:
        raise LDMQError(f"push_to_hub takes no keyword {sorted(options)[0]!r}")
    push = open_repo(push)
    samples = draw_samples(pipe, told, getattr(pipe, "plan", None))
    with TemporaryDirectory() as beside:
        if folder is None:
            folder = Path(beside) / "saved"
            pipe.save_pretrained(folder, **saving)
        card = card_of(folder, push.repo_id, told, token=push.token)
        return push_folder(folder, push, replace(card, samples=samples))


def _taken(options: dict[str, Any], kind: type) -> dict[str, Any]:
    names = {field.name for field in fields(kind)} - {"repo_id", "sampling"}
    return {name: options.pop(name) for name in list(options) if name in names}


def open_repo(push: Push) -> Push:
    """Create the repository, and the branch, where they are missing; the push with the owner's name in its repo_id.

    Raises LDMQError where the hub does not let this user.
    """
    api = HfApi(token=push.token)
    try:
        repo_id = api.create_repo(push.repo_id, private=push.private, exist_ok=True).repo_id
        if push.private is not None and api.model_info(repo_id).private is not push.private:
            raise LDMQError(
                f"{repo_id}: exists already and is {'public' if push.private else 'private'}; change that in its "
                f"settings on the hub, or leave the choice out"
            )
        if push.revision is not None:
            api.create_branch(repo_id, branch=push.revision, exist_ok=True)
    except HUB_ERRORS as cause:
        raise hub_failure(push.repo_id, cause) from cause
    return replace(push, repo_id=repo_id)


def push_folder(folder: str | os.PathLike[str], push: Push, card: Card) -> str:
    """Upload a saved pipeline and its card to a repository that `open_repo` opened; the commit's address."""
    with TemporaryDirectory() as beside:
        stage(folder, beside, card, link=True)
        if not (Path(folder) / "README.md").exists() and _is_somebodys_card(push):
            logger.info("%s has a README.md that this program did not write; it stays as it is", push.repo_id)
            (Path(beside) / "README.md").unlink()
        try:
            return str(
                HfApi(token=push.token).upload_folder(
                    repo_id=push.repo_id,
                    folder_path=beside,
                    revision=push.revision,
                    commit_message=push.commit_message or "Upload a pipeline quantized by diffusers-ldmq",
                    create_pr=push.create_pr,
                    # of an earlier push: shards that are left over would be loaded instead of the new weights
                    delete_patterns=[f"{name}/*" for name in (card.component, *card.others)],
                )
            )
        except (*HUB_ERRORS, ValueError, RuntimeError) as cause:  # the last two are how uploads wrap what happened
            raise hub_failure(push.repo_id, cause) from cause


def _is_somebodys_card(push: Push) -> bool:
    """True if the repository has a README.md without our mark."""
    try:
        path = hf_hub_download(push.repo_id, "README.md", revision=push.revision, token=push.token)
    except HUB_ERRORS as cause:
        if is_missing_file(cause):
            return False
        raise hub_failure(push.repo_id, cause) from cause
    return MARK not in Path(path).read_text(encoding="utf-8", errors="replace")


def write_folder(folder: str | os.PathLike[str], out: Path, card: Card) -> None:
    """Write what `push_folder` would upload, to look at. Raises OutputError if `out` is not empty or not writable."""
    with folder_beside(out) as beside:
        stage(folder, beside, card, link=False)


def stage(folder: str | os.PathLike[str], beside: str | os.PathLike[str], card: Card, *, link: bool) -> None:
    """Put what is to be shared into `beside`: the folder's files without hidden ones and without local paths, and the
    card unless the folder has one. link: large files need not be copied, because `beside` is soon removed."""
    folder, beside = Path(folder), Path(beside)
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in inside.parts):
            continue
        target = beside / inside
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json" and path.stat().st_size < MAX_JSON_BYTES and (text := _scrubbed(path, card)):
            target.write_text(text, encoding="utf-8")
        else:
            _place(path.resolve(), target, link)
    if (folder / "README.md").exists():
        logger.info("%s is taken as it is; delete it to have the card written anew", folder / "README.md")
    else:
        write_card(beside, card)


def _place(path: Path, target: Path, link: bool) -> None:
    if link:
        try:
            target.symlink_to(path)
        except OSError:  # a system, or a user, without links
            shutil.copyfile(path, target)
    else:
        shutil.copyfile(path, target)


def _scrubbed(path: Path, card: Card) -> str | None:
    """The text of a JSON file in which no key says where on this machine a model lay; None if there is nothing to
    change."""
    data = read_json(path, LDMQError)
    names = [key for key in PATH_KEYS if isinstance(data, dict) and isinstance(data.get(key), str)]
    local = [key for key in names if not is_hub_id(data[key])]
    if not local:
        return None
    for key in local:
        data[key] = PureWindowsPath(data[key]).name  # knows both kinds of slashes
        if path.name == "model_index.json" and card.base_model:
            data[key] = card.base_model
    return json.dumps(data, indent=2) + "\n"
