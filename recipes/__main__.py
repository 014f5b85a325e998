"""`python -m recipes COMMAND`: run one of the recipes.

A recipe is a module of this package with `add_options(parser)` and `run(options)`; adding one is a
line in `COMMANDS`. They are imported when asked for: help needs none of their dependencies.
"""

import importlib
import os
import sys

# On a machine that does other work too, OpenMP threads that spin while they wait slowed training
# down tenfold; ones that sleep cost nothing measurable. To be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

COMMANDS = {
    "finetune": "fine-tune a timm backbone with context-aware norms beside plain BatchNorm",
    "sensors": "train on images of cameras that differ, the camera known: where contexts pay",
    "multisite": "segment vessels of the retina from two cameras, the camera known",
    "papers": "a published table again: a shallow CNN, contexts from a mixture",
    "domains": "train on several domains, test on one never seen, or on all",
    "adaptation": "adapt to a domain without labels (AdaMatch), domains as contexts",
    "corruptions": "train on clean images, test on ImageNet-C's families of corruptions",
    "adversarial": "train on clean and adversarial images, the kind as context (AdvProp)",
    "resolutions": "train one network for several input sizes, the size as context",
    "superclasses": "what superclass labels are worth, leaked at test time and not",
    "generate": "train a GAN on digits or on your images, each class a context",
    "fixmatch": "train on a few labels a class and many images without (FixMatch)",
    "segment": "train a segmentation on some domains, test it on others",
    "sentiment": "train a sentence classifier on films, test it on product reviews",
    "results": "make the tables of RESULTS.md from the runs that are kept",
    "bench": "time a model with other norms beside the model as it is",
}


def main(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        try:
            return int(importlib.import_module("recipes.common.runs").command(argv[0], argv[1:]))
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package == "recipes":
                raise
            print(
                f"error: recipe {argv[0]!r} needs the package {package!r}, which is not installed; "
                "from the project's folder, pip install -e '.[recipes]'",
                file=sys.stderr,
            )
            return 2
    lines = ["usage: python -m recipes COMMAND [options]", ""]
    lines += [f"  {name:<12} {text}" for name, text in COMMANDS.items()]
    lines += ["", "python -m recipes COMMAND --help lists the options of one."]
    asked_for_help = not argv or argv[0] in ("-h", "--help")
    if not asked_for_help:
        choices = ", ".join(COMMANDS)
        lines.insert(0, f"error: unknown command {argv[0]!r}; choose from {choices}")
    print("\n".join(lines), file=sys.stdout if asked_for_help else sys.stderr)
    return 0 if asked_for_help else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
