"""Finds models by name in the local cache of Hugging Face. Downloads nothing."""

import os
import re
from pathlib import Path

from support.weights import weight_files

# A model's name: ORGANISATION/NAME or ORGANISATION/NAME@REVISION.
NAME = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w-][\w.-]*(?:/[\w-][\w.-]*)*))?", re.ASCII)
SNAPSHOT = re.compile(r".*/models--(.+?)--(.+)/snapshots/([0-9a-f]{40})/?")


def cache_folder() -> Path:
    """Returns the folder that huggingface_hub uses as its cache."""
    home = os.environ.get("HF_HOME", os.environ.get("XDG_CACHE_HOME", "~/.cache") + "/huggingface")
    cache = os.environ.get("HUGGINGFACE_HUB_CACHE", f"{home}/hub")  # the older name
    return Path(os.path.expandvars(os.path.expanduser(os.environ.get("HF_HUB_CACHE", cache))))


def find(path, weights: bool = True) -> Path:
    """Returns `path` if it exists or is not a model's name, else this model's folder in the cache.
    A revision is a branch, a tag or a full commit (default: main). If this folder is missing or,
    with `weights`, incomplete, a FileNotFoundError names the command for the download."""
    path, match = Path(path), NAME.fullmatch(named(path))
    if path.exists() or not match:
        return path
    name, revision = match.groups()
    folder = cache_folder() / f"models--{name.replace('/', '--')}"
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision or "main"
    snapshot = folder / "snapshots" / commit
    needed = [snapshot / "config.json", *weight_files(snapshot)] if weights else [snapshot]
    missing = [file.name for file in needed if not file.exists()]  # a link may lead nowhere
    if not missing:
        return snapshot
    problem = f"there is no such folder, and {folder} lacks {', '.join(missing):.80}"
    command = f"hf download {name}" + (f" --revision {revision}" if revision else "")
    raise FileNotFoundError(f"{path}: {problem}; correct the name, or run: {command}")


def named(path) -> str:
    """Returns ORGANISATION/NAME@COMMIT for a model's folder in a cache, else `path` as text."""
    return SNAPSHOT.sub(r"\1/\2@\3", str(path))
