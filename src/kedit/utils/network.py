"""Ask whether the Hugging Face hub can be reached: without network, its libraries try again for a minute."""

from __future__ import annotations

import socket
import threading
import urllib.parse
import urllib.request

UNREACHABLE = "the Hugging Face hub cannot be reached (no network, or offline mode)"


def hub_is_reachable(timeout: float = 2.0) -> bool:
    """Return whether the hub takes a connection within ``timeout`` seconds; behind a proxy, which may do so, always True."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True
    url = urllib.parse.urlsplit(constants.ENDPOINT)
    address = url.hostname or "huggingface.co", url.port or (80 if url.scheme == "http" else 443)
    answers: list[bool] = []

    def connect() -> None:
        try:
            socket.create_connection(address, timeout=timeout).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    # In a thread, as looking the name up knows no limit.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(timeout)
    return answers == [True]
