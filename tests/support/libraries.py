"""What every compiled library must have, of an install or of a wheel."""

import re
import subprocess
from pathlib import Path


def assert_hardened(library: Path) -> str:
    """Full RELRO, and a stack that is not executable; returns what readelf says of sections, segments and imports."""
    said = subprocess.run(["readelf", "-SldW", library], capture_output=True, text=True, check=True).stdout
    assert "GNU_RELRO" in said and re.search(r"FLAGS_1.*NOW", said), f"{library.name}: no full RELRO"
    assert re.search(r"GNU_STACK.* RW ", said), f"{library.name}: the stack is executable"
    return said
