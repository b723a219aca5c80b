"""Whether anything may be downloaded: only if the environment says so."""

import os

DOWNLOAD_VARIABLE = "CCTOOL_DOWNLOAD"


def download_allowed() -> bool:
    """Whether CCTOOL_DOWNLOAD=1 lets libraries download what is missing."""
    return os.environ.get(DOWNLOAD_VARIABLE, "") not in ("", "0")
