"""The demo behind ``regraft demo``: train a small adapter on a real model, merge it, compare.

Nothing here prints: what there is to read goes to a ``say`` function, and progress to a bar that
the caller makes. torch and transformers are imported only when the demo runs.
"""

from __future__ import annotations

from regraft.demo.progress import Bar, Progress, on_terminal
from regraft.demo.run import run_demo
from regraft.demo.telling.result import DemoResult

__all__ = ["Bar", "DemoResult", "Progress", "on_terminal", "run_demo"]
