"""Models that have a name: those in the package, and those on the Hugging Face hub.

pretrained://name comes with the package (sepdist/pretrained/) and needs no network.
hf://org/name[@revision] is on the hub, and then in its cache on this machine.

The hub's own variables hold: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE. Only files of a model
are fetched; they are a stranger's, and are read as such.
"""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SCHEME = "hf://"
PACKAGED = "pretrained://"
READY = f"{PACKAGED}two-voices-8k"  # where no model is named
OURS = ("model.yaml", "model.safetensors", "lineage.json", "README.md")
FOREIGN = ("hyperparams.yaml", "*.ckpt", "*.pth", "*.pt", "pytorch_model.bin", "README.md")


class HubError(ValueError):
    """A model could not be fetched from the hub or put there."""


def is_hub(url: str) -> bool:
    """Whether `url` names a model on the hub."""
    return url.startswith(SCHEME)


def local(url: str, files: Sequence[str] = OURS) -> str:
    """The folder of a named model, of the hub's with these files alone; else `url` itself.

    HubError for a name that the package or the hub has not.
    """
    if url.startswith(PACKAGED):
        folder = Path(__file__).parent / "pretrained"
        names = sorted(one.parent.name for one in folder.glob("*/model.yaml"))
        if (name := url.removeprefix(PACKAGED)) not in names:
            raise HubError(f"{url}: the package has {', '.join(PACKAGED + one for one in names)}")
        return str(folder / name)
    if not is_hub(url):
        return url
    return _call(url, lambda hub, **at: hub.snapshot_download(**at, allow_patterns=[*files]))


def upload(folder: Path, url: str, private: bool, update: bool) -> str:
    """Put the files of `folder` on the hub in one commit; returns its address.

    HubError without `update` where the repository holds anything but what the hub puts there.
    """

    def put(hub: Any, repo_id: str, revision: str | None) -> str:
        api = hub.HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        if private and not api.repo_info(repo_id).private:  # it was there before
            raise HubError(f"{url} is public already: make it private first; nothing was sent")
        there = {*api.list_repo_files(repo_id, revision=revision)} - {".gitattributes"}
        if there and not update:
            raise HubError(f"{url} holds {', '.join(sorted(there)[:4])} already: add --update")
        message = "Upload a model of sepdist"
        where = {"repo_id": repo_id, "revision": revision, "commit_message": message}
        return str(api.upload_folder(folder_path=folder, **where))

    return _call(url, put)


def _call(url: str, use: Callable[..., str]) -> str:
    """`use` huggingface_hub with the repo_id and revision of a url; its errors in one line."""
    match = re.fullmatch(rf"{SCHEME}([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", url)
    if not match:
        raise HubError(f"{url}: give hf://org/name or hf://org/name@revision")
    try:
        import huggingface_hub as hub
    except ImportError as error:
        todo = "run: pip install huggingface_hub (the extra `hub` has it)"
        raise HubError(f"{url}: {todo}") from error
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        return use(hub, repo_id=match[1], revision=match[2])
    except HubError:
        raise
    except Exception as error:  # of several libraries of HTTP, which depend on its version
        text = re.sub(r"//[^/\s]*@", "//", str(error))  # HF_ENDPOINT may hold user:password
        reason = " ".join(text.split())[:300] or type(error).__name__
        raise HubError(f"{url}: {reason}") from error
