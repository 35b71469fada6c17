"""Make torch's CUDA wheel usable where no CUDA is: empty libraries in place of those of the `nvidia-*` packages.

    python scripts/cuda_stubs.py VENV/lib/python3.11/site-packages/torch

PyPI has no CPU build of torch for Linux, and its CUDA build asks for some 3 GB of libraries that a machine without a
GPU never calls. Each library that torch's own need is made here with every symbol they look for in it; each of these
returns 0, but for the count of devices, which is none. Needs gcc and readelf. Linux on x86-64 only.
"""

import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

SYSTEM = re.compile(r"(libc|libm|libdl|libpthread|librt|libstdc\+\+|libgcc_s|libutil|ld-linux-x86-64)\.so\.\d+")
OF_CUDA = re.compile(r"_*(cu|nccl|nvshmem|nvtx|nvrtc|nvml|nvJit)", re.IGNORECASE)
"""Names of CUDA's symbols; where they carry no version, it is not said which library they are wanted from."""
RETURNS_ZERO = "xorl %eax, %eax\nret"
NO_DEVICES = "movl $0, (%rdi)\nmovl $100, %eax\nret"
"""`cudaGetDeviceCount`: none, and the error that says so."""
FUNCTIONS = {"cudaGetDeviceCount": NO_DEVICES}

Wanted = dict[str, dict[str, set[str]]]
"""Symbols by library and version ("" for none)."""


def main() -> int:
    libraries = Path(sys.argv[1]) / "lib"
    for library, versions in wanted(sorted(libraries.glob("*.so*"))).items():
        build(libraries / library, versions)
        print(f"{library}: {sum(map(len, versions.values()))} symbols")
    return 0


def wanted(own: list[Path]) -> Wanted:
    """What torch's libraries look for and neither they nor the system have."""
    found: Wanted = defaultdict(lambda: defaultdict(set))
    versions: dict[str, str] = {}  # which library a version is of
    defined, undefined = set(), set()
    names = {path.name for path in own}
    for path in own:
        for library in re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-d", path)):
            if library not in names and not SYSTEM.fullmatch(library):
                found[library] = found[library]
        library = ""
        for line in readelf("-V", path).splitlines():
            if of := re.search(r"Version: \d+\s+File: (\S+)", line):
                library = of[1]
            elif version := re.search(r"Name: (\S+)\s+Flags:", line):
                versions.setdefault(version[1], library)
        for line in readelf("--dyn-syms", path).splitlines():
            parts = line.split()
            if len(parts) >= 8 and parts[0].rstrip(":").isdigit():
                name, _, version = parts[7].partition("@")
                if parts[6] != "UND":
                    defined.add(name)
                elif parts[4] != "WEAK":
                    undefined.add((name, version.lstrip("@")))
    for name, version in undefined:
        if name in defined:
            continue
        if version:
            if versions.get(version) in found:
                found[versions[version]][version].add(name)
        elif OF_CUDA.match(name):
            for library in found:
                found[library][""].add(name)
    return found


def build(library: Path, versions: dict[str, set[str]]) -> None:
    """A shared library that has these symbols."""
    lines = [".text"]
    for name in sorted(set().union(*versions.values())):
        lines += [f".globl {name}", f".type {name}, @function", f"{name}:", FUNCTIONS.get(name, RETURNS_ZERO)]
    lines.append('.section .note.GNU-stack, "", @progbits')
    with tempfile.TemporaryDirectory() as place:
        source, script = Path(place, "stub.s"), Path(place, "stub.map")
        source.write_text("\n".join(lines) + "\n")
        command = ["gcc", "-shared", "-nostdlib", f"-Wl,-soname,{library.name}", "-o", str(library), str(source)]
        named = {version: names for version, names in versions.items() if version and names}
        if named:
            script.write_text("".join(f"{v} {{ global: {'; '.join(sorted(n))}; }};\n" for v, n in named.items()))
            command.append(f"-Wl,--version-script,{script}")
        subprocess.run(command, check=True)


def readelf(what: str, path: Path) -> str:
    return subprocess.run(["readelf", what, "--wide", path], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    sys.exit(main())
