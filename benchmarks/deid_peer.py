"""Header cleaning by `deid` with its default recipe: `PYTHON benchmarks/deid_peer.py FOLDER`, where deid is installed.

Prints images, wall and CPU seconds as JSON; starting and importing are not counted, and nothing is saved.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

from deid.config import DeidRecipe
from deid.dicom import replace_identifiers

files = sorted(str(path) for path in Path(sys.argv[1]).glob("*.dcm"))
recipe = DeidRecipe()
replace_identifiers(files[:1], deid=recipe, save=False)
wall, cpu = time.perf_counter(), time.process_time()
cleaned = replace_identifiers(files, deid=recipe, save=False)
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps({"images": len(cleaned), "wall": wall, "cpu": cpu, "version": version("deid")}))
