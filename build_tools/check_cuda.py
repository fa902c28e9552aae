"""What can be said of a CUDA build without running it; prints every finding, exits with 1 if there is one.

check_cuda.py BUILD reads BUILD/cuda_objects.txt, the objects that it names, what ptxas said about each
(OBJECT.ptxas, kept by compile_cuda.sh) and BUILD/liblongctx_cuda.so:
  no kernel spills registers, no WGMMA product waits for the one before it;
  instances use tensor cores and the copies of their architecture; none is compiled for another one;
  no instance asks for more shared memory than every device of its family has;
  the library loads beside a torch without CUDA, and needs no library that such a machine may lack.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KIB = 1024


@dataclass(frozen=True)
class Family:
    """What the instances of a family must have and may use."""

    # Opcodes that every cubin of a kernel with 16-bit operands has.
    opcodes: tuple[str, ...]
    # Dynamic shared memory of a block: 99 KiB is what the smallest devices since Ampere have (sm_86, sm_89, sm_120).
    shared_bytes: int
    # Other architectures are an error: sm_90a code runs on Hopper alone.
    architecture: re.Pattern[str]


FAMILIES = {
    "sm_80": Family(("HMMA", "LDSM", "LDGSTS"), 99 * KIB, re.compile(r"sm_\d+")),
    "sm_90a": Family(("HGMMA", "UTMALDG"), 227 * KIB, re.compile(r"sm_90a")),
}
INSTANCE = re.compile(r"(?P<kernel>\w+)_(?P<family>sm_80|sm_90a)_(?P<dtype>[a-z]+\d+)_(?P<head_dim>\d+)\.cu\.o")
# Other files whose kernels multiply 16-bit matrices.
MULTIPLY = ("antidiagonal_scores.cu.o", "attention_mass.cu.o", "block_scores.cu.o")
NEEDED = re.compile(r"lib(torch|stdc\+\+|gcc_s|c|m|dl|rt|pthread)\.so(\.\d+)?|ld-linux-.*")
# What the linker and libstdc++ leave weak; and the one symbol that only a CUDA torch has.
WEAK = re.compile(r"_ITM_\w+|__gmon_start__|__cxa_\w+|__pthread_\w+|aoti_torch_get_current_cuda_stream")


def compiler_findings(object_path: Path) -> Iterator[str]:
    """What ptxas said: register spills, and WGMMA products that wait for each other."""
    log = object_path.with_name(object_path.name + ".ptxas").read_text()
    kernel, architecture = "", ""
    for name, target, stores, loads in re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'|(\d+) bytes spill stores, (\d+) bytes spill loads", log
    ):
        if name:
            kernel, architecture = name, target
        elif int(stores) + int(loads) > 0:
            yield f"{object_path.name}: {kernel} for {architecture} spills: {stores} bytes stored, {loads} loaded"
    for line in re.findall(r".*wgmma.* serialized.*", log):
        yield f"{object_path.name}: {line}"
    if INSTANCE.fullmatch(object_path.name) and not kernel:
        yield f"{object_path.name}: ptxas compiled no kernel"


def tool(name: str) -> str | None:
    """On PATH, in PyPI's nvidia-cuda-* packages, or nowhere."""
    if found := shutil.which(name):
        return found
    spec = importlib.util.find_spec("nvidia")
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((str(path) for folder in folders for path in sorted(Path(folder).glob(f"cu*/bin/{name}"))), None)


def machine_code(cuobjdump: str, object_path: Path) -> dict[str, set[str]]:
    """Architecture -> the opcodes of its cubin."""
    nvdisasm = tool("nvdisasm")
    path = str(Path(nvdisasm).parent) if nvdisasm else ""
    run = subprocess.run(
        [cuobjdump, "-sass", str(object_path)], capture_output=True, text=True, env={"PATH": f"{path}:/usr/bin:/bin"}
    )
    if run.returncode != 0:
        raise RuntimeError(f"cuobjdump -sass {object_path.name}: {run.stderr.strip()}")
    opcodes: dict[str, set[str]] = {}
    current: set[str] = set()
    for line in run.stdout.splitlines():
        if match := re.match(r"\s*arch = (\w+)", line):
            current = opcodes.setdefault(match[1], set())
        # An instruction: offset, an optional predicate, the opcode.
        elif match := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9]*)", line):
            current.add(match[1])
    return opcodes


def wrong_code(cuobjdump: str, object_path: Path) -> Iterator[str]:
    instance = INSTANCE.fullmatch(object_path.name)
    family = FAMILIES[instance["family"] if instance else "sm_80"]
    multiplies = instance["dtype"] != "float32" if instance else object_path.name in MULTIPLY
    needed = family.opcodes if multiplies else ()
    code = machine_code(cuobjdump, object_path)
    if multiplies and not code:
        yield f"{object_path.name}: no machine code"
    for architecture, opcodes in sorted(code.items()):
        if not family.architecture.fullmatch(architecture):
            yield f"{object_path.name}: compiled for {architecture}"
        for opcode in needed:
            if opcode not in opcodes:
                yield f"{object_path.name}: no {opcode} for {architecture}"


LOAD = """
import ctypes, os, sys, torch
package, library = sys.argv[1:]
torch.ops.load_library(package)
ctypes.CDLL(library, mode=os.RTLD_NOW)
torch.ops.load_library(library)
print(torch.ops.longctx.cuda_build_info())
"""


def wrong_library(folder: Path) -> Iterator[str]:
    library = folder / "liblongctx_cuda.so"
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder / "liblongctx.so"), str(library)], capture_output=True, text=True
    )
    if loaded.returncode != 0:
        yield f"{library.name} does not load: {loaded.stderr.strip().splitlines()[-1]}"
        return
    for name, shared_bytes in json.loads(loaded.stdout)["shared_bytes"].items():
        limit = FAMILIES[name.split("/")[1]].shared_bytes
        if shared_bytes > limit:
            yield f"{name}: {shared_bytes} bytes of shared memory, more than {limit}"
    dynamic = subprocess.run(["readelf", "-d", str(library)], capture_output=True, text=True, check=True).stdout
    for name in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if not NEEDED.fullmatch(name):
            yield f"{library.name} needs {name}"
    undefined = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    ).stdout
    for kind, symbol in re.findall(r"^\s*([a-zA-Z]) ([^@\s]+)", undefined, re.MULTILINE):
        if kind in "wv" and not WEAK.fullmatch(symbol):
            yield f"{library.name}: {symbol} is weak and undefined"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("build", type=Path, help="CMake's build folder")
    parser.add_argument("--objects", type=Path, help="a list of other objects; the library is then not looked at")
    parser.add_argument("--require-tools", action="store_true", help="fail without cuobjdump and nvdisasm")
    args = parser.parse_args()

    objects = [Path(line) for line in (args.objects or args.build / "cuda_objects.txt").read_text().split()]
    objects = [path for path in objects if path.name.endswith(".cu.o")]
    findings = [f"{path.name}: not compiled" for path in objects if not path.is_file()]
    objects = [path for path in objects if path.is_file()]
    findings += [finding for path in objects for finding in compiler_findings(path)]
    cuobjdump = tool("cuobjdump") if tool("nvdisasm") else None
    if cuobjdump is not None:
        findings += [finding for path in objects for finding in wrong_code(cuobjdump, path)]
    else:
        print("machine code not looked at: no cuobjdump and nvdisasm (pip install nvidia-cuda-{cuobjdump,nvdisasm})")
        if args.require_tools:
            return 1
    if args.objects is None:
        findings += wrong_library(args.build)
    for finding in findings:
        print(finding)
    print(f"{len(objects)} objects, {len(findings)} findings")
    return 1 if findings or not objects else 0


if __name__ == "__main__":
    sys.exit(main())
