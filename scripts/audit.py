"""Compare the tested set (constraints.txt) with the published advisories, by pip-audit in an environment of its own.

Ends with 1 if a version has a known fault, and with 0 and the reason where the advisories cannot be asked for.
"""

import subprocess
import sys
import tempfile
import urllib.request
import venv
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
ADVISORIES = "https://pypi.org/pypi/jinja2/3.1.5/json"
"""Where pip-audit reads advisories: those of a version with a known fault, to see that there are any."""
KNOWN = "CVE-2025-27516"


def main() -> int:
    try:
        with urllib.request.urlopen(ADVISORIES, timeout=20) as answer:
            if KNOWN not in answer.read().decode():
                raise OSError(f"{KNOWN} is not in it")
    except (OSError, ValueError) as error:
        print(f"audit skipped: the advisories of PyPI cannot be read ({ADVISORIES}: {error})")
        return 0
    with tempfile.TemporaryDirectory(prefix="tunekit-audit-") as place:
        venv.create(place, with_pip=True)
        python = next(path for path in (Path(place, "bin/python"), Path(place, "Scripts/python.exe")) if path.exists())
        quiet = ["--quiet", "--disable-pip-version-check"]
        installed = subprocess.run([python, "-m", "pip", "install", *quiet, "pip-audit"], check=False)
        if installed.returncode:
            print("audit skipped: pip-audit cannot be installed")
            return 0
        # Every line is one exact version, so nothing is to be resolved.
        audit = ["pip_audit", "--requirement", str(CONSTRAINTS), "--disable-pip", "--no-deps", "--progress-spinner=off"]
        return subprocess.run([python, "-m", *audit], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
