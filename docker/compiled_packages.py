"""Print the installed packages that were compiled for each other, as pip constraints (Dockerfile).

What the package index calls torch or transformer-engine is another build than the base image's; replacing one of them
breaks the others. Only the standard library is used.
"""

from importlib.metadata import distributions

KEPT = ("torch", "pytorch-triton", "triton", "transformer-engine", "apex", "flash-attn", "numpy", "nvidia-", "cuda-")


def main() -> None:
    found = {}
    for distribution in distributions():
        name = (distribution.name or "").lower().replace("_", "-")
        if name.startswith(KEPT):
            found[name] = distribution.version
    print("\n".join(f"{name}=={version}" for name, version in sorted(found.items())))


if __name__ == "__main__":
    main()
