"""Started with this folder on PYTHONPATH, Python forgets every installed copy of diffusers_ldmq.

What the server then imports is what ComfyUI found in custom_nodes: the tree that is tested, by the way its users take.
"""

import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if not (Path(entry or ".") / "diffusers_ldmq").is_dir()]
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in str(finder)]
