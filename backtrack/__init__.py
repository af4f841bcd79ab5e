import importlib.util
import sys

# A user's own model.py in the folder they start from hides our package `model`.
_spec = importlib.util.find_spec("model")
if _spec is not None and _spec.submodule_search_locations is None:
    print(f"error: {_spec.origin} hides backtrack's `model`; start from another folder", file=sys.stderr)
    sys.exit(2)
