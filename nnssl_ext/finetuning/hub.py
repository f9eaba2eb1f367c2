"""Checkpoints on the Hugging Face hub, fetched by the extra `[hub]` into the hub's own cache."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from nnssl_ext.finetuning.pretrained import PLAN_FILE

logger = logging.getLogger(__name__)
FORMS = "hf://OWNER/REPO[@REVISION][/FILE] or https://huggingface.co/OWNER/REPO[/resolve/REVISION/FILE]"
"""How an address may be written."""
PREFERRED = ("checkpoint_final.pth", "checkpoint_final.safetensors")
"""Files taken first where the address names none."""
SUFFIXES = (".pth", ".safetensors")
_PART = r"[\w.-]+"
_SHORT = re.compile(rf"hf://({_PART}/{_PART})(?:@({_PART}))?(?:/(.+))?")
_URL = re.compile(
    rf"https?://(?:huggingface\.co|hf\.co)/({_PART}/{_PART})/?(?:(?:resolve|blob)/({_PART})/([^?]+)\??.*)?"
)


@dataclass(frozen=True, kw_only=True)
class Address:
    """A file of a repository on the hub."""

    repository: str
    """OWNER/REPO."""
    revision: str | None = None
    """Branch, tag or commit; None: the main branch."""
    file: str | None = None
    """Path in the repository; None: its only checkpoint."""


def parse_address(text: str) -> Address | None:
    """The address that a text is; None where it is a path of this machine.

    Raises:
        ValueError: If it is an address of another form.
    """
    for form in (_SHORT, _URL):
        found = form.fullmatch(text)
        if found:
            repository, revision, file = found.groups()
            return Address(repository=repository, revision=revision, file=file)
    if "://" in text:
        raise ValueError(f"{text} is no address of a checkpoint on the hub: write {FORMS}, or download the file")
    return None


def locate(checkpoint: Path | str) -> Path:
    """A checkpoint as a file of this machine, downloaded where it is an address and not in the hub's cache yet.

    Raises:
        FileNotFoundError: If the hub does not give it, or has no such file.
        ValueError: If the address cannot be read, the extra is missing, or it does not say which of several files.
    """
    address = parse_address(checkpoint) if isinstance(checkpoint, str) else None
    return Path(checkpoint) if address is None else _download(address)


def name_on_hub(checkpoint: Path | str) -> str:
    """What the address of a checkpoint calls it: the repository, without its owner, and the file; "" for a path."""
    address = parse_address(checkpoint) if isinstance(checkpoint, str) else None
    return "" if address is None else f"{address.repository.split('/')[1]}/{address.file or ''}"


def _download(address: Address) -> Path:
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ValueError(
            f"hf://{address.repository} needs huggingface_hub. Install it: pip install 'nnssl_ext[hub]'"
        ) from error
    try:
        file = address.file or _find(address)
        path = Path(hf_hub_download(address.repository, file, revision=address.revision))
        if path.suffix == ".safetensors":  # the plan goes to the same folder of the cache
            hf_hub_download(
                address.repository, str(PurePosixPath(file).with_name(PLAN_FILE)), revision=address.revision
            )
    except _errors() as error:
        raise FileNotFoundError(
            f"the hub does not give {address.file or 'the files'} of {address.repository}: {error}. Without a network, "
            "name a file of this machine with -pc"
        ) from error
    logger.info("checkpoint %s of %s: %s", file, address.repository, path)
    return path


def _errors() -> tuple[type[Exception], ...]:
    """What the library raises where the hub does not answer, or says no: its own errors and its HTTP client's."""
    from huggingface_hub.utils import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def _find(address: Address) -> str:
    """The checkpoint of a repository that is asked for without a file; one of the cache where the hub cannot list it.

    Raises:
        FileNotFoundError: See `choose_file`.
        ValueError: See `choose_file`.
        Exception: One of `_errors`, where the hub does not answer and the cache has none of the usual files.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        files = HfApi().list_repo_files(address.repository, revision=address.revision)
    except _errors() as error:
        for name in PREFERRED:
            with suppress(FileNotFoundError):  # not in the cache either
                hf_hub_download(address.repository, name, revision=address.revision, local_files_only=True)
                logger.warning(
                    "the hub does not list %s (%s): taking its %s in the cache", address.repository, error, name
                )
                return name
        raise
    return choose_file(files, address.repository)


def choose_file(files: list[str], repository: str) -> str:
    """The checkpoint among a repository's files.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If there are several and none is the usual one; lists them.
    """
    found = [file for file in files if file.endswith(SUFFIXES)]
    for name in PREFERRED:
        usual = [file for file in found if PurePosixPath(file).name == name]
        if len(usual) == 1:
            return usual[0]
    if not found:
        raise FileNotFoundError(f"{repository} has no file that ends in {' or '.join(SUFFIXES)}")
    if len(found) > 1:
        raise ValueError(
            f"{repository} has several checkpoints: {', '.join(found)}. Name one: -pc hf://{repository}/{found[0]}"
        )
    return found[0]
