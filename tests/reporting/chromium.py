"""Pages in a headless Chromium without a network: the document after its scripts ran, and what it asked the network for."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed")
FLAGS = [
    "--headless",
    "--hide-scrollbars",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=5000",
]
NOWHERE = "--host-resolver-rules=MAP * ~NOTFOUND"
# What the browser asks for by itself now and then (updates, check-ins); no page of ours has a reason to.
ITS_OWN = ("google.com", "googleapis.com", "gstatic.com", "gvt1.com")


class Shown(NamedTuple):
    """The document as it stands after its scripts, and the addresses outside this machine that were asked for."""

    dom: str
    asked: list[str]


def show(page: Path, scratch: Path, width: int = 1280, height: int = 900, fragment: str = "") -> Shown:
    """Open a file. The profile and the log of requests go to `scratch`; hosts that the browser itself asks are left out."""
    assert BROWSER
    log = scratch / "requests.json"
    flags = [
        *FLAGS,
        NOWHERE,
        f"--user-data-dir={scratch / 'profile'}",
        f"--log-net-log={log}",
        f"--window-size={width},{height}",
    ]
    command = [BROWSER, *flags, "--dump-dom", page.resolve().as_uri() + fragment]
    result = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:]
    found = set(re.findall(r'"url":"((?:http|ws)[^"]*)"', log.read_text()))
    return Shown(result.stdout.decode(), sorted(url for url in found if not url.split("/")[2].endswith(ITS_OWN)))
