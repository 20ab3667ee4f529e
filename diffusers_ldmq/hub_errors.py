"""What the hub, or the way to it, refused: one line that says what to do."""

from collections.abc import Iterator

from huggingface_hub import errors
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import LDMQError

_LATER = ("RevisionResolutionError", "XetDownloadError")
"""Errors of later versions that are neither an OSError nor the HTTP client's."""
HUB_ERRORS: tuple[type[Exception], ...] = (
    OSError,
    HFValidationError,
    *HfHubHTTPError.__bases__,  # the HTTP client's own base, among it a lost connection; the client changed over time
    *(getattr(errors, name) for name in _LATER if hasattr(errors, name)),
)
"""What huggingface_hub raises when something cannot be had from the hub or brought there."""
LOGIN = "log in with `hf auth login`, or give a token (--token, token=, or the variable HF_TOKEN)"
_KNOWN: tuple[tuple[type[Exception], str], ...] = (
    (LocalTokenNotFoundError, f"no token is stored on this machine; {LOGIN}"),
    (GatedRepoError, f"the model is gated: accept its conditions on its page of the hub, then {LOGIN}"),
    (DisabledRepoError, "the hub has disabled it"),
    (RevisionNotFoundError, "the hub has no such revision of it; give one of its branches, tags or commits"),
    (RepositoryNotFoundError, f"neither a folder here nor a model that the hub shows you: check the name, or {LOGIN}"),
    (HFValidationError, "it is no hub id; one looks like owner/name, of letters, digits, '-', '_' and '.'"),
)
_STATUS = {
    401: f"the hub does not know you, or does not accept the token; {LOGIN}",
    403: "the hub does not let your account or token do this; check the owner's name and the token's permissions",
    404: "the hub has the model, but not a file that a diffusers pipeline has; check the name",
    409: "something else is changing it on the hub right now; try again",
    413: "the hub refused a file as too large",
    429: "the hub had too many requests from you; wait a little and try again",
}


def hub_refusal(cause: BaseException) -> str | None:
    """What the hub said, in words and with what to do; None if nothing in the chain of causes came from the hub."""
    chain = list(_chain(cause))
    for kind, told in _KNOWN:
        if any(isinstance(error, kind) for error in chain):
            return told
    return _answered(chain) or _lost(chain)


def _answered(chain: list[BaseException]) -> str | None:
    """What the status of the hub's answer means; None if it gave none."""
    error = next((error for error in chain if isinstance(error, HfHubHTTPError)), None)
    if error is None or error.response is None:
        return None
    status = error.response.status_code
    if status == 400:
        return f"the hub refused it ({_short(error)})"
    return _STATUS.get(status, f"the hub answered {status} ({_short(error)}); try again later")


def _lost(chain: list[BaseException]) -> str | None:
    """That there was no answer, or only a part of it; None if that is not what happened."""
    lost = next((error for error in reversed(chain) if isinstance(error, HfHubHTTPError.__bases__[0])), None)
    if lost is not None:
        return f"the hub cannot be reached, or the connection was lost ({_short(lost)}); check it and try again"
    if any("Consistency check failed" in str(error) for error in chain):
        return "the connection was lost before a file was complete; try again"
    if any(isinstance(error, LocalEntryNotFoundError) for error in chain):
        return (
            "neither a folder here nor in the cache, and the hub was not to be asked; leave local_files_only out, and "
            "the variable HF_HUB_OFFLINE unset, to download it"
        )
    return None


def is_missing_file(cause: BaseException) -> bool:
    """True if the hub answered that the repository is there and the file is not."""
    return isinstance(cause, EntryNotFoundError) and not isinstance(cause, LocalEntryNotFoundError)


def hub_failure(name: str, cause: BaseException) -> LDMQError:
    """The error of ours for something of the hub called `name` that could not be had or written."""
    return LDMQError(f"{name}: {hub_refusal(cause) or f'the hub cannot be used ({_short(cause)})'}")


def _chain(cause: BaseException) -> Iterator[BaseException]:
    """The error and what caused it: the libraries wrap what happened several times."""
    seen: set[int] = set()
    error: BaseException | None = cause
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
