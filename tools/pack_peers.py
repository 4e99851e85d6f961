"""Pack the peers that the benchmarks measure against into one tarball, for a GPU machine that
cannot reach a package index.

    python tools/pack_peers.py                       # writes .peers/peers.tar.gz
    mkdir SITE && tar -xzf peers.tar.gz -C SITE      # there
    python -m benchmarks.run --peer-site SITE ...    # seen by the peers' processes alone

Wheels are fetched by exact version for one Python and for Linux on x86-64, whatever runs this
script, and unpacked without their dependencies: torch, transformers, peft and accelerate are the
machine's own, since every process of a comparison has to use the same ones. Two things are left
out, both unread by a training step: Unsloth's web studio (nine tenths of its wheel) and
bitsandbytes' builds for other versions of CUDA.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = (
    "unsloth==2026.10.9",
    "unsloth_zoo==2026.10.9",
    "trl==1.15.0",
    "datasets==4.8.5",
    "torchao==0.18.0",
    "xformers==0.0.35",
    "cut-cross-entropy==25.1.1",
    "liger-kernel==0.8.5",
    "bitsandbytes==0.50.2",
    "tyro==1.0.17",
    "docstring-parser==0.18.0",
    "shtab==1.13.0",
    "typeguard==4.6.0",
    "msgspec==0.22.0",
    "dill==0.4.1",
    "multiprocess==0.70.19",
    "pydantic==2.14.3",
    "pydantic-core==2.50.4",
    "annotated-types==0.8.0",
    "typing-inspection==0.4.5",
    "gguf==0.19.0",
)
# pip takes a wheel only for a platform named to the letter; these are the tags that are in use.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
MAX_TARBALL_BYTES = 50 * 10**6


def download(folder: Path, python: str, packages: Iterable[str] = PACKAGES) -> list[Path]:
    """The wheel of every package in `folder`, fetched where it is not there yet."""
    wheels = []
    for package in packages:
        found = wheel_of(folder, package)
        if found is None:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            command += ["--disable-pip-version-check", "--only-binary=:all:"]
            command += ["--implementation", "cp", "--python-version", python]
            for platform in PLATFORMS:
                command += ["--platform", platform]
            subprocess.run([*command, "--dest", str(folder), package], check=True)
            found = wheel_of(folder, package)
            assert found is not None, f"pip downloaded no wheel that looks like {package}"
        wheels.append(found)
    return wheels


def wheel_of(folder: Path, package: str) -> Path | None:
    """The wheel of "name==version" among the files of `folder`."""
    name, version = package.split("==")
    start = re.sub(r"[-_.]+", "_", name) + f"-{version}-"
    return next((path for path in folder.glob("*.whl") if path.name.startswith(start)), None)


def keeper(cuda: str) -> Callable[[str], bool]:
    """Whether a file of a wheel goes into the tarball. cuda: as in libbitsandbytes_cuda130.so."""

    def keep(name: str) -> bool:
        if name.startswith("studio/"):
            return False
        library = re.fullmatch(r"bitsandbytes/lib\w+\.so", name)
        return library is None or name.endswith(f"_cuda{cuda}.so")

    return keep


def unpack(wheels: Iterable[Path], site: Path, keep: Callable[[str], bool]) -> int:
    """Put the kept files of all wheels into `site`; returns how many bytes they are."""
    total_bytes = 0
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.infolist():
                # <name>.data/purelib is what an installer would move up to the top.
                placed = re.sub(r"^[^/]+\.data/(pure|plat)lib/", "", member.filename)
                outside = placed.startswith("/") or ".." in Path(placed).parts
                if outside or member.is_dir() or ".data/" in placed or not keep(placed):
                    continue
                target = site / placed
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(member))
                total_bytes += member.file_size
    return total_bytes


def pack(site: Path, tarball: Path) -> int:
    """Everything of `site` into `tarball`; returns its size in bytes."""
    tarball.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(tarball, "w:gz", compresslevel=9) as archive:
        for path in sorted(site.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                archive.add(path, path.relative_to(site))
    return tarball.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--wheels", type=Path, default=ROOT / ".scratch" / "peers" / "wheels")
    parser.add_argument("--out", type=Path, default=ROOT / ".peers" / "peers.tar.gz")
    parser.add_argument("--python", default="3.12", help="version of Python on the GPU machine")
    parser.add_argument("--cuda", default="130", help="CUDA of its torch, as in cu130")
    args = parser.parse_args()
    args.wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as site:
        wheels = download(args.wheels, args.python)
        unpacked = unpack(wheels, Path(site), keeper(args.cuda))
        size = pack(Path(site), args.out)
    print(f"{args.out}: {size / 1e6:.1f} MB, {unpacked / 1e6:.1f} MB unpacked")
    if size > MAX_TARBALL_BYTES:
        sys.exit(f"that is over {MAX_TARBALL_BYTES / 1e6:.0f} MB; leave more out")


if __name__ == "__main__":
    main()
