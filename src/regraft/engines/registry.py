"""The engines whose facts are known, by the name that ``--for`` takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata

from regraft.engines.diffusers import DIFFUSERS
from regraft.engines.facts import Engine, Settings
from regraft.engines.llama_cpp import LLAMA_CPP
from regraft.engines.mlx import MLX
from regraft.engines.ollama import OLLAMA
from regraft.engines.peft import PEFT
from regraft.engines.report import EngineReport, Finding
from regraft.engines.sglang import SGLANG
from regraft.engines.subject import FEATURES, Subject
from regraft.engines.vllm import VLLM
from regraft.errors import UsageError

ENGINES: Mapping[str, Engine] = {
    engine.name: engine for engine in (VLLM, SGLANG, LLAMA_CPP, OLLAMA, MLX, PEFT, DIFFUSERS)
}
"""Every engine, by name."""


OTHER_NAMES = {
    "mlx-lm": "mlx", "mlx_lm": "mlx", "llamacpp": "llama.cpp", "llama-cpp": "llama.cpp",
    "llama_cpp": "llama.cpp", "gguf": "llama.cpp", "transformers": "peft",
}  # fmt: skip
"""What people call an engine, and its name."""


def engine_named(asked: str) -> tuple[Engine, str | None]:
    """Return an engine and the version that was asked about, from ``"vllm"`` or ``"vllm==0.32.0"``.

    Raises:
        UsageError: no engine of that name is known.
    """
    name, _, version = asked.partition("==")
    plain = name.strip().lower()
    found = ENGINES.get(OTHER_NAMES.get(plain, plain))
    if found is None:
        raise UsageError("there is no engine of that name", where="--for",
                         expected=", ".join(ENGINES), found=asked)  # fmt: skip
    return found, version.strip() or None


def check_options(engine: Engine, settings: Settings) -> None:
    """Refuse options that change nothing of what an engine would do.

    Raises:
        UsageError: there are some.
    """
    unknown = [name for name in settings if name not in engine.options]
    if unknown:
        known = ", ".join(engine.options) or "none"
        raise UsageError(f"{engine.shown} has no such option that changes what it takes",
                         where="--engine-option", expected=known,
                         found=", ".join(unknown))  # fmt: skip
    rank = settings.get("max_lora_rank")
    if rank is not None and not rank.isdecimal():
        raise UsageError("a rank has to be a whole number", where="--engine-option",
                         expected="max_lora_rank=64", found=f"max_lora_rank={rank}")  # fmt: skip


def judge(
    engine: Engine, subject: Subject, settings: Settings, version: str | None = None
) -> EngineReport:
    """Return what an engine would do with an adapter, as far as its facts say.

    Args:
        engine: the engine.
        subject: the adapter beside its base.
        settings: options that its server is started with.
        version: the version that is asked about; None for the one that is installed, if any.
    """
    asked = version or _installed(engine)
    findings = (*_by_rules(engine, subject), *_by_checks(engine, subject, settings))
    notes = (*_of_version(engine, asked), *_of_dialect(engine, subject), *engine.notes)
    foreign = engine.dialect is not None and subject.dialect != engine.dialect
    return EngineReport(
        engine.name, engine.version, asked, tuple(dict.fromkeys(findings)), notes,
        engine.dialect if foreign else None,
    )  # fmt: skip


def _by_rules(engine: Engine, subject: Subject) -> Iterator[Finding]:
    for rule in engine.rules:
        for name in FEATURES[rule.feature](subject):
            yield Finding(rule.effect, name, rule.because, rule.way_out)


def _by_checks(engine: Engine, subject: Subject, settings: Settings) -> Iterator[Finding]:
    for check in engine.checks:
        yield from check(subject, settings)


def _installed(engine: Engine) -> str | None:
    for name in engine.distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _of_version(engine: Engine, asked: str | None) -> Iterator[str]:
    if asked is not None and not _is_version(asked, engine):
        yield (
            f"what {engine.shown} {asked} does is not known: these facts were read from "
            f"{engine.version}"
        )


def _is_version(asked: str, engine: Engine) -> bool:
    """Whether a version is the one that an engine's facts were read from.

    llama.cpp counts builds (``b11549``); packages of it end in that number (``2026.10.11549``).
    """
    plain = asked.partition("+")[0]
    build = engine.version.removeprefix("b")
    return plain == engine.version or (
        build != engine.version and plain.rpartition(".")[2] == build
    )


def _of_dialect(engine: Engine, subject: Subject) -> Iterator[str]:
    if engine.dialect is not None and subject.dialect != engine.dialect:
        yield (
            f"{engine.shown} reads adapters in another format: `regraft convert ADAPTER "
            f"-o OUT --to {engine.dialect} --base BASE` writes it"
        )
    if engine.has_class is not None and not engine.has_class(subject.architecture):
        yield (
            f"{engine.shown} has no class of its own for {subject.architecture}: whether it runs "
            "such a model, and what it takes then, is not known"
        )
    copies = FEATURES["copy of an embedding"](subject)
    if copies:
        yield (
            f"the adapter carries a copy of {', '.join(copies[:3])}; engines take the base's own, "
            "which is the same unless it was trained"
        )
