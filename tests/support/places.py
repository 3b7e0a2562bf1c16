"""Where commands run in these tests."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The shell tools call ``python``: this interpreter, also where its environment is not activated.
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
