"""Regenerates the gRPC stubs from the contract, or with --check compares them with what is checked in.

The generator is the lowest grpcio-tools that pyproject.toml allows, in an environment of its own. Stubs made by a
newer one would refuse to load beside an older grpcio that the project still supports.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-protos"
GENERATOR = ["grpcio-tools==1.74.0", "mypy-protobuf==3.6.0", "setuptools<81"]
PACKAGE = Path("codistill/v1")


def generator() -> Path:
    """Return the python of the generator's environment, made on first use."""
    python = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / "installed"
    if not stamp.exists() or stamp.read_text() != " ".join(GENERATOR):
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *GENERATOR], check=True)
        stamp.write_text(" ".join(GENERATOR))
    return python


def generate(target: Path) -> None:
    """Write the stubs below `target`."""
    python = generator()
    command: list[str | Path] = [python, "-m", "grpc_tools.protoc", "-I", ROOT / "protos"]
    command += [f"--plugin=protoc-gen-mypy={python.parent / 'protoc-gen-mypy'}"]
    command += [f"--plugin=protoc-gen-mypy_grpc={python.parent / 'protoc-gen-mypy_grpc'}"]
    command += [f"--python_out={target}", f"--grpc_python_out={target}"]
    command += [f"--mypy_out=quiet:{target}", f"--mypy_grpc_out=quiet:{target}"]
    command += [ROOT / "protos" / PACKAGE / "distillation.proto"]
    subprocess.run(command, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="compare with the checked-in stubs, write nothing")
    arguments = parser.parse_args()
    if not arguments.check:
        generate(ROOT / "protos")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = [
            made.name
            for made in sorted((Path(folder) / PACKAGE).iterdir())
            if (ROOT / "protos" / PACKAGE / made.name).read_bytes() != made.read_bytes()
        ]
    if stale:
        print(f"stale stubs: {', '.join(stale)}; run `make protos` and commit the result", file=sys.stderr)
        return 1
    print("stubs are up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main())
