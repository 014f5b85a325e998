"""A saved model and what is in its folder, for the tests of saving and loading."""

import hashlib
import json

import normswap
from normswap.saving.folder import DESCRIPTION
from tests.support.builders import SKEWED
from tests.support.models import NAMES, make_model, separate


def make(method="cn", **settings):
    base = make_model()
    model = normswap.convert(base, method, contexts=NAMES, priors=SKEWED, **settings)
    return base, separate(model)


def tensors_in(folder):
    from safetensors import safe_open

    (path,) = folder.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        return set(file.keys())


def describe(folder):
    return json.loads((folder / DESCRIPTION).read_text())


def rewrite(folder, **changes):
    """Change the description as its writer would, its digest included."""
    content = {**describe(folder), **changes}
    rest = {k: v for k, v in content.items() if k != "digest"}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    content["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / DESCRIPTION).write_text(json.dumps(content))
