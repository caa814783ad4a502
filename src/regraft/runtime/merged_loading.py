"""Loading a base with adapters merged in: weights are merged while transformers reads them.

transformers loads a model from a state dict of tensors, or of slices that it asks for the values
when it gets to them. Here such a slice is one step of a merge's plan: asked for, it reads the base,
adds the deltas and gives the tensor that becomes the parameter. What no adapter touches is mapped
from its file, as transformers maps it. Names, conversions of names, ties and dtypes are thereby
transformers' own, and the bytes those of the merge into files.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from regraft.errors import RegraftError, UnsupportedError, UsageError
from regraft.formats.files.parsed import check_parsed
from regraft.formats.files.watching import watched
from regraft.libraries import from_pretrained, require
from regraft.merging.another_base import notes_of_another_base, warn
from regraft.merging.execution.in_memory import MemoryMerge
from regraft.merging.files.card import auto_class_of
from regraft.merging.files.side_files import updated_config
from regraft.merging.inputs.base import see
from regraft.merging.inputs.dequantized_view import check_scales
from regraft.merging.inputs.opening import (
    AdapterArg,
    open_named,
    parse_adapters,
    read_adapters,
)
from regraft.merging.options import MergeOptions
from regraft.merging.planning.plan import Plan, Step
from regraft.merging.planning.planner import make_plan
from regraft.system.memory import large_pages
from regraft.tensors import DTYPES

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

NO_CAP = 2**50
"""The model is in memory anyway: nothing is gained by a cap on what its merge takes."""

HUGE = 2 * 2**20
"""Size of a large page. A tensor of less is not worth a mapping of its own."""

_SHOWN = 5
"""So many names of parameters are shown in a warning."""

_OURS = {
    "quantization_config": "weights are merged into plain values; quantize the loaded model, or "
    "merge with `regraft.merge(..., quantize=...)` and load that",
    "config": "the config is the base's, with what the merge changes",
    "state_dict": "the weights are the merge's",
    "gguf_file": "name the .gguf file as the base",
    "adapter_kwargs": "adapters are the second argument",
    "revision": "write it behind the base's name: org/name@revision",
    "subfolder": "name the folder itself as the base",
    "variant": "name the weight file itself as the base",
}
"""Arguments of ``from_pretrained`` that say what this call says otherwise."""


@watched(to_the_end=True)
def load_merged(
    base: str | Path,
    adapters: AdapterArg | Sequence[AdapterArg],
    *,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    model_class: Any = None,
    threads: int | None = None,
    peft_version: str | None = None,
    token: str | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Return a transformers model whose weights were merged while they were read.

    It is the model that :func:`regraft.merge` and ``from_pretrained`` would give, bit for bit, but
    nothing is written to disk. It is plain: no adapter is left on it, and no hook.

    Args:
        base: as for :func:`regraft.merge`. A quantized base is merged into plain weights.
        adapters: as for :func:`regraft.merge`.
        dtype: dtype of all floating-point weights; by default the base's.
        device_map: where the model goes, as for ``from_pretrained``.
        model_class: the class to load, or one of transformers' auto classes; by default the one
            that the config names.
        threads: worker threads; by default three more than there are cores at hand.
        peft_version: as for :func:`regraft.merge`.
        token: Hub token; by default the one the machine is logged in with.
        kwargs: for ``from_pretrained``, such as ``attn_implementation`` or ``trust_remote_code``.

    Raises:
        UsageError: the call contradicts itself.
        RegraftError: what :func:`regraft.merge` would raise of its inputs.
        MissingExtraError: torch or transformers are not installed.
    """
    require("torch", "transformers", why="a model in memory")
    _refuse(kwargs)
    made = _plan(base, adapters, _chosen(dtype, kwargs), threads, token, peft_version)
    warn(notes_of_another_base(made.adapters, made.base, made.quantization), stacklevel=3)
    if made.quantization is not None:
        check_scales(made.quantization)
    config, raw, rest = _config(made, kwargs)
    cls = _class_of(made, raw, config, model_class, rest)
    if getattr(cls, "config_class", None) is type(config.get_text_config()):
        config = config.get_text_config()  # the text model alone of one that sees, too
    own = _generation_config(made) if rest.get("generation_config") is None else None
    with_info = rest.pop("output_loading_info", False)
    given = {"generation_config": own, **rest} if own is not None else rest
    with MemoryMerge(made) as merge:
        loading = _Loading(merge)
        model, info = loading.run(
            cls, config=config, state_dict=_weights(made, loading), device_map=device_map,
            output_loading_info=True, **given,
        )  # fmt: skip
    _finish(model, made, str(base), own)
    if lacking := sorted(info.get("missing_keys", ())):
        warnings.warn(_newly_made(cls.__name__, lacking), stacklevel=3)
    return (model, info) if with_info else model


def _finish(model: Any, made: Plan, base: str, generation: Any) -> None:
    """Give a model what ``from_pretrained`` sets by the name that it loads from.

    Its own generation config is one that knows that it was not changed since it was read: only such
    a one is saved again if it is not valid. What is handed to ``from_pretrained`` gets copied.
    """
    model.config.name_or_path = model.name_or_path = base
    if made.base.revision is not None:
        model.config._commit_hash = made.base.revision
    if generation is not None and model.can_generate():
        model.generation_config = generation


def _newly_made(cls: str, names: Sequence[str]) -> str:
    """Return what to say of parameters that were loaded from nowhere."""
    shown = ", ".join(names[:_SHOWN]) + ", ..." * (len(names) > _SHOWN)
    return (
        f"{len(names)} of the parameters of {cls} are in neither the base nor the adapters, and "
        f"were newly initialized: {shown}. Two loads answer differently; name the class that the "
        "adapter was trained on with model_class, or save these modules with it (modules_to_save)"
    )


def _refuse(kwargs: Mapping[str, Any]) -> None:
    for name, hint in _OURS.items():
        if kwargs.get(name) is not None:
            raise UsageError(f"load_merged does not take {name}", hint=hint[0].upper() + hint[1:])


def _chosen(dtype: Any, kwargs: dict[str, Any]) -> str | None:
    """Return the dtype that is asked for by either of its names; ``"auto"`` is the base's."""
    dtype = kwargs.pop("torch_dtype", None) if dtype is None else dtype
    return None if dtype in (None, "auto") else str(dtype)


def _plan(
    base: str | Path, adapters: AdapterArg | Sequence[AdapterArg], dtype: str | None,
    threads: int | None, token: str | None, peft_version: str | None,
) -> Plan:  # fmt: skip
    """Return the plan of the merge into files, without files."""
    options = MergeOptions.of(
        dtype=dtype, max_memory=NO_CAP, threads=threads, peft_version=peft_version
    )
    wanted = parse_adapters(adapters)
    stored, opened = open_named(base, wanted, token, peft_version)
    read = read_adapters(opened)
    plain, quantization = see(stored, options.dtype)
    if not plain.config:
        raise UsageError(
            "a model cannot be made of weights alone", where=stored.source, expected="config.json",
            hint="Name the folder that holds the config beside the weights",
        )  # fmt: skip
    return make_plan(plain, read, options, None, quantization=quantization)


# -- the model -------------------------------------------------------------------------------------


def _config(made: Plan, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """Return the merged model's config, the same as JSON, and the arguments that are left."""
    from transformers import AutoConfig

    raw = updated_config(made.base.config or {}, made.config_updates)
    given = dict(kwargs)
    if (made.base.root / "config.json").is_file() and not made.base.single_file:
        trusted = bool(given.get("trust_remote_code"))
        root = str(made.base.root)
        check_parsed(made.base.root)
        cls = type(from_pretrained(AutoConfig, root, trust_remote_code=trusted))
    else:
        cls = type(AutoConfig.for_model(str(raw.get("model_type"))))
    config, rest = cls.from_dict(raw, return_unused_kwargs=True, **given)
    return config, raw, rest


def _class_of(
    made: Plan, raw: Mapping[str, Any], config: Any, wanted: Any, kwargs: Mapping[str, Any]
) -> Any:
    """Return the class to load: what is asked for, or what the config names.

    Raises:
        UnsupportedError: it names a class that transformers does not have.
    """
    import transformers

    auto = getattr(wanted, "__name__", "") if wanted is not None else auto_class_of(raw)
    if auto in (raw.get("auto_map") or {}) and kwargs.get("trust_remote_code"):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(raw["auto_map"][auto], str(made.base.root))
    names = config.architectures or [auto]
    named = [getattr(transformers, name, None) for name in names] if wanted is None else [wanted]
    for cls in filter(None, named):
        return _of_auto(cls, config) if hasattr(cls, "_model_mapping") else cls
    raise UnsupportedError(
        "transformers does not have the class of this model", where=made.base.source,
        found=", ".join(names),
        hint="Name it with model_class",
    )  # fmt: skip


def _of_auto(auto: Any, config: Any) -> Any:
    """Return the class that an auto class loads for a config; of several, the one it names.

    Raises:
        UsageError: the auto class has none.
    """
    if type(config) not in auto._model_mapping:
        raise UsageError(
            f"{auto.__name__} has no class for this model", found=type(config).__name__,
            hint="Leave model_class out: the config names the class",
        )  # fmt: skip
    found = auto._model_mapping[type(config)]
    classes = {cls.__name__: cls for cls in (found if isinstance(found, list | tuple) else [found])}
    named = [classes[name] for name in config.architectures or [] if name in classes]
    return (named or list(classes.values()))[0]


def _generation_config(made: Plan) -> Any:
    """Return what the base says of generating; None if it says nothing."""
    from transformers import GenerationConfig

    root = made.base.root
    if made.base.single_file:
        return None
    if (root / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(str(root))
    if not (root / "config.json").is_file():
        return None
    return GenerationConfig.from_pretrained(
        str(root), config_file_name="config.json", _from_model_config=True
    )


# -- the weights -----------------------------------------------------------------------------------


class _Loading:
    """A loading under way; it keeps the first error, which transformers would report late."""

    def __init__(self, merge: MemoryMerge) -> None:
        self._merge = merge
        self._lock = threading.Lock()  # of several errors the first is kept
        self._error: BaseException | None = None

    def tensor(self, step: Step) -> torch.Tensor:
        """Return a step's tensor, computed now."""
        from regraft.runtime.model.live_base import torch_dtype_of

        flat = _room(step.nbytes)
        try:
            if self._error is not None:
                raise self._error
            self._merge.fill(step, flat.numpy())
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            raise
        return flat.view(torch_dtype_of(step.dtype)).view(step.shape)

    def run(self, cls: Any, **kwargs: Any) -> Any:
        """Return what ``from_pretrained`` of a class gives.

        Raises:
            RegraftError: a weight could not be merged.
        """
        try:
            result = cls.from_pretrained(None, **kwargs)
        except Exception:
            if isinstance(self._error, RegraftError):
                raise self._error from None
            raise
        if self._error is not None:
            raise self._error
        return result


class MergedSlice:
    """A tensor of a merge that is computed when its values are asked for.

    It answers what transformers asks a slice of a safetensors file.
    """

    def __init__(self, step: Step, loading: _Loading) -> None:
        self._step, self._loading = step, loading

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Return the tensor, or a part of it."""
        return self._loading.tensor(self._step)[index]

    def get_shape(self) -> list[int]:
        """Return its sizes."""
        return list(self._step.shape)

    def get_dtype(self) -> str:
        """Return its dtype, as safetensors calls it."""
        return self._step.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return self._step.shape

    @property
    def dtype(self) -> torch.dtype:
        """Its dtype."""
        from regraft.runtime.model.live_base import torch_dtype_of

        return torch_dtype_of(self._step.dtype)

    def is_floating_point(self) -> bool:
        """Whether its values are floating-point numbers."""
        return DTYPES[self._step.dtype].is_float


def _weights(made: Plan, loading: _Loading) -> dict[str, Any]:
    """Return what the model is loaded from, by the names that the merged files would have."""
    import transformers

    mapped = _mapped([step for step in made.steps if _is_mapped(step)])
    slices = {step.name: MergedSlice(step, loading) for step in made.steps}
    found: dict[str, Any] = {name: mapped.get(name, each) for name, each in slices.items()}
    if int(transformers.__version__.split(".")[0]) < 5:  # before, it took tensors only
        return {name: each[...] for name, each in found.items()}
    return found


def _is_mapped(step: Step) -> bool:
    """Whether a step copies a tensor out of a safetensors file."""
    own = step.source_adapter is None and not step.source.is_virtual
    return own and step.action == "copy" and step.source.path.suffix == ".safetensors"


def _mapped(steps: Sequence[Step]) -> dict[str, torch.Tensor]:
    """Return tensors as views of their files, which are read when they are used."""
    from safetensors import safe_open

    found = {}
    for path in dict.fromkeys(step.source.path for step in steps):
        with safe_open(path, framework="pt") as file:
            for step in steps:
                if step.source.path == path:
                    found[step.name] = file.get_tensor(step.source.name)
    return found


def _room(size: int) -> torch.Tensor:
    """Return memory for a tensor as bytes, in large pages where the system has them.

    The system clears memory when it is first written to, page by page; of small pages, that takes
    longer than the merge.
    """
    import torch

    memory = None if size < HUGE else large_pages(size)
    if memory is None:
        return torch.empty(size, dtype=torch.uint8)
    return torch.frombuffer(memory, dtype=torch.uint8)
