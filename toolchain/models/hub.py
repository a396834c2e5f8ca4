"""Small files of repositories on the Hugging Face Hub, for checks before a large one is fetched."""

import socket
import urllib.parse
import urllib.request
from pathlib import Path


def small_file(source: str, name: str) -> Path:
    """A file of a Hub repository, from the local cache or the Hub; OSError if it has none."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(source, name)
    if cached is not None and not isinstance(cached, str):  # the cache knows that it does not exist
        raise FileNotFoundError(f"{source} has no {name}")
    if cached is None:
        _reach_hub()
        cached = hf_hub_download(source, name)
    return Path(cached)


def _reach_hub() -> None:
    """Raise OSError at once if the Hub cannot be reached; its client would retry for long."""
    from huggingface_hub import constants

    if not any(urllib.request.getproxies().get(k) for k in ("https", "all")):
        url = urllib.parse.urlsplit(constants.ENDPOINT)
        port = url.port or (443 if url.scheme == "https" else 80)
        socket.create_connection((url.hostname or "", port), timeout=5).close()
