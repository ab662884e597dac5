"""Make the peer's environment, benchmarks/.venv-trl: TRL beside the torch and transformers versions that rlsys uses.

    python benchmarks/setup_trl.py

It is an environment of its own because TRL's dependencies are not the project's. Safe to run again. pip only: with the
pinned version it takes the CPU build of torch where one is offered.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

FOLDER = Path(__file__).parent / ".venv-trl"
PACKAGES = ("torch==2.13.0", "trl==1.16.0", "transformers>=5.16.1,<5.20", "datasets", "accelerate")


def main() -> None:
    """Create, install, prove that it imports."""
    python = FOLDER / "bin" / "python"
    if not python.exists():
        venv.create(FOLDER, with_pip=True)
    subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    # Builds of these that do not fit a CPU torch break `import transformers`; nothing here needs them.
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True).returncode:
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "-y", "torchvision", "torchaudio"], check=True)
    check = "import trl; from trl import GRPOTrainer; print('TRL', trl.__version__, 'is ready')"
    sys.exit(subprocess.run([python, "-c", check]).returncode)


if __name__ == "__main__":
    main()
