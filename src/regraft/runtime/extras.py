"""What live models need besides regraft itself, asked for before any work is done."""

from __future__ import annotations

from importlib.util import find_spec

from regraft.errors import MissingExtraError

_INSTALL = {
    "accelerate": "pip install accelerate",
    "bitsandbytes": "pip install bitsandbytes",
    "gguf": "pip install 'regraft[gguf]'",
}
"""How to install what the extra of torch does not bring."""


def require(*names: str, why: str) -> None:
    """Make sure that packages are installed; they are not imported.

    Args:
        names: of the packages, as they are imported.
        why: what needs them, as the beginning of a sentence.

    Raises:
        MissingExtraError: some are not.
    """
    missing = [name for name in names if find_spec(name) is None]
    if not missing:
        return
    commands = dict.fromkeys(_INSTALL.get(n, "pip install 'regraft[torch]'") for n in missing)
    raise MissingExtraError(
        f"{why} needs {' and '.join(missing)}", hint=f"Run {' and '.join(commands)}"
    )
