"""The configuration files that come with the project."""

from importlib.resources import files
from pathlib import Path


def names_of_packaged_configs() -> list[str]:
    """Return the names of the packaged configurations, sorted: `base`, `lecture/1_bigram`, …."""
    packaged = packaged_configs()
    return sorted(str(path.relative_to(packaged).with_suffix("")) for path in packaged.rglob("*.yaml"))


def packaged_configs() -> Path:
    """Return the folder of the YAML files: inside the installed package, or next to it in a checkout."""
    inside = Path(str(files("gptlit"))) / "configs"
    return inside if inside.is_dir() else inside.parent.parent / "configs"
