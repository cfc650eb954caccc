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
    *(
        [
            "--headless",
            "--hide-scrollbars",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
        ]
    ),
    *(
        [
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--virtual-time-budget=5000",
        ]
    ),
    "--host-resolver-rules=MAP * ~NOTFOUND",
]


class Shown(NamedTuple):
    """The document as it stands after its scripts, and the addresses outside this machine that were asked for."""

    dom: str
    asked: list[str]


def show(page: Path, scratch: Path, width: int = 1280, height: int = 900, fragment: str = "") -> Shown:
    """Open a file. The profile and the log of requests go to `scratch`; hosts that the browser itself asks are left out."""
    blank = scratch / "blank.html"
    if not blank.exists():
        blank.write_text("<!DOCTYPE html><title>blank</title>")
        (scratch / "own.txt").write_text("\n".join(map(host, opened(blank, scratch, width, height, "").asked)))
    own = (scratch / "own.txt").read_text().split()
    shown = opened(page, scratch, width, height, fragment)
    return Shown(shown.dom, [url for url in shown.asked if host(url) not in own])


def host(url: str) -> str:
    return url.split("/")[2]


def opened(page: Path, scratch: Path, width: int, height: int, fragment: str) -> Shown:
    assert BROWSER
    log = scratch / "requests.json"
    flags = [
        *FLAGS,
        f"--user-data-dir={scratch / 'profile'}",
        f"--log-net-log={log}",
        f"--window-size={width},{height}",
    ]
    command = [BROWSER, *flags, "--dump-dom", page.resolve().as_uri() + fragment]
    result = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr.decode(errors="replace")[-2000:]
    found = set(re.findall(r'"url":"((?:http|ws)[^"]*)"', log.read_text()))
    return Shown(result.stdout.decode(), sorted(found))
