"""Fetch and unpack an arm64 Python with regraft's dependencies, without installing anything.

Everything lies in one folder. apt (of Debian) finds the packages and their dependencies for the
other architecture, with lists and a state of its own in that folder, and pip fetches the wheels.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

PACKAGES = ("python3", "libstdc++6")
"""All that the wheels need; a Python comes with a C library."""
QEMU = "qemu-aarch64-static"
_OPTIONAL = "gguf"
_GLIBC = range(17, 36)
"""Minor versions of the C library whose wheels are taken: up to Debian 12's."""


def prepared(folder: Path) -> list[str]:
    """Return the command that runs an arm64 Python; what it needs is fetched first."""
    root, site = folder / "root", folder / "site"
    if not (folder / "done").exists():
        for place in (root, site, folder / "wheels"):
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
        _unpack_debian(_download(folder / "apt-arm64", "arm64", PACKAGES), root)
        _unpack_wheels(folder / "wheels", _python(root).name.removeprefix("python"), site)
        (folder / "done").touch()
    return [_qemu(folder), "-L", str(root), str(_python(root))]


def environment(folder: Path, paths: list[Path]) -> dict[str, str]:
    """Return what that Python has to be told: where it lies, and where modules are."""
    return os.environ | {
        "PYTHONHOME": str(folder / "root/usr"),
        "PYTHONPATH": os.pathsep.join(map(str, [folder / "site", *paths])),
        "NUMBA_CACHE_DIR": str(folder / "numba"),
    }


def _python(root: Path) -> Path:
    return next(path for path in sorted(root.glob("usr/bin/python3.*")) if path.is_file())


def _qemu(folder: Path) -> str:
    """Return the path of the emulator: this system's, or one that is fetched."""
    if found := shutil.which(QEMU):
        return found
    place = folder / "host"
    if not place.exists():
        machine = subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip()
        _unpack_debian(_download(folder / "apt-host", machine, ("qemu-user-static",)), place)
    return str(place / "usr/bin" / QEMU)


def _download(state: Path, architecture: str, packages: tuple[str, ...]) -> list[Path]:
    """Download Debian packages and all that they depend on, without a system's own state."""
    for name in ("lists/partial", "archives/partial"):
        (state / name).mkdir(parents=True, exist_ok=True)
    (state / "status").write_text("", encoding="utf-8")
    config = {
        "APT::Architecture": architecture, "APT::Architectures": architecture,
        "APT::Install-Recommends": "false", "Dir::State": str(state),
        "Dir::State::status": str(state / "status"), "Dir::Cache": str(state),
        "Debug::NoLocking": "true", "APT::Sandbox::User": "",
    }  # fmt: skip
    text = "".join(f'{key} "{value}";\n' for key, value in config.items())
    (state / "apt.conf").write_text(text, encoding="utf-8")
    told = os.environ | {"APT_CONFIG": str(state / "apt.conf")}
    subprocess.run(["apt-get", "-qq", "update"], env=told, check=True)
    subprocess.run(
        ["apt-get", "-qq", "-y", "--download-only", "install", *packages], env=told, check=True
    )
    return sorted((state / "archives").glob("*.deb"))


def _unpack_debian(archives: list[Path], root: Path) -> None:
    for archive in archives:
        subprocess.run(["dpkg-deb", "-x", str(archive), str(root)], check=True)


def _requirements() -> list[str]:
    """Return regraft's dependencies, each in the version that is installed here."""
    names = [_name_of(line) for line in requires("regraft") or () if "extra ==" not in line]
    return [f"{name}=={version(name)}" for name in [*names, *_optional()]]


def _name_of(requirement: str) -> str:
    return requirement.split(";")[0].split(">")[0].split("=")[0].strip()


def _optional() -> list[str]:
    try:
        version(_OPTIONAL)
    except PackageNotFoundError:
        return []
    return [_OPTIONAL]


def _unpack_wheels(wheels: Path, python: str, site: Path) -> None:
    platforms = ["manylinux2014_aarch64", *(f"manylinux_2_{n}_aarch64" for n in _GLIBC)]
    kinds = [word for platform in platforms for word in ("--platform", platform)]
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:",
         "--python-version", python, "--implementation", "cp", *kinds, "--dest", str(wheels),
         *_requirements()],
        check=True,
    )  # fmt: skip
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
