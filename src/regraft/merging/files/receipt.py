"""The receipt of a merge: what was read, what was done to each tensor, and what came out."""

from __future__ import annotations

import functools
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from blake3 import blake3

from regraft.deltas.methods.names import METHOD_NAMES
from regraft.errors import FormatError
from regraft.formats.files.json_file import read_object_and_bytes
from regraft.formats.files.text import spelled
from regraft.formats.problems import quoted
from regraft.merging.files.side_files import json_bytes
from regraft.quant.weight import FORMATS, ROUNDINGS

RECEIPT_FORMAT = 1
"""Version of the JSON layout of ``regraft/receipt.json``."""

ARITHMETIC_VERSION = 1
"""Version of the arithmetic contract (docs/arithmetic.md) the bytes were made by."""

MAX_RECEIPT_BYTES = 256 * 2**20
"""The largest receipt that is read; one tensor takes about 700 bytes."""

QUIET_SHARE = 1e-3
"""Below this share of changed elements a merge counts as having changed (nearly) nothing."""

Action = Literal["copy", "convert", "merge", "replace", "add"]
"""What was done to a tensor.

``copy`` bytes as they were; ``convert`` only how it is stored changed (another dtype, or codes to
plain values); ``merge`` a delta was added;
``replace`` the adapter's own tensor took its place; ``add`` the base had no such tensor.
"""


@dataclass(frozen=True)
class InputRecord:
    """One input of a merge.

    Attributes:
        source: as the user named it (a path or ``org/name@revision``).
        revision: the Hub commit, when it came from the Hub.
        weight: the factor on the adapter's scale; None for a base.
        tensors: blake3 (hex) of every tensor read from it, by the name in its file.
    """

    source: str
    revision: str | None
    weight: float | None
    tensors: Mapping[str, str]


@dataclass(frozen=True)
class TensorRecord:
    """What was done for one tensor of the output.

    Attributes:
        name: name in the output.
        file: the output file that holds it.
        action: see :data:`Action`.
        dtype: safetensors dtype in the output.
        shape: dimensions in the output.
        source: name of the tensor it was made from.
        source_dtype: safetensors dtype it was read as.
        source_blake3: blake3 (hex) of the bytes read.
        blake3: blake3 (hex) of the bytes written.
        features: what was applied, such as ``("lora",)`` or ``("dora", "token-rows")``.
        scales: the float32 scale of each delta, in the order applied.
        adapters: the adapter (0-based) each scale belongs to.
        weight_norm: Frobenius norm of the source; None if it holds NaN or infinity.
        delta_norm: Frobenius norm of (merged before rounding - source); None likewise.
        changed: elements whose stored value differs from the source's.
        survived: of a result in codes, the share of the delta that is in them: <Q - W, delta> over
            <delta, delta>; None for plain values.
        noise: what rounding to codes added: |Q - W - delta| over |W|.
        codes: elements whose codes it holds; 0 for plain values.
        base_gap: Frobenius norm of what lies between this base and the one that the adapters were
            trained on; None if none was named.
        known: whether the source's digest was known: its file is the one that was read before.
    """

    name: str
    file: str
    action: Action
    dtype: str
    shape: tuple[int, ...]
    source: str
    source_dtype: str
    source_blake3: str
    blake3: str
    features: tuple[str, ...] = ()
    scales: tuple[float, ...] = ()
    adapters: tuple[int, ...] = ()
    weight_norm: float | None = None
    delta_norm: float | None = None
    changed: int = 0
    survived: float | None = None
    noise: float | None = None
    codes: int = 0
    base_gap: float | None = None
    known: bool = False

    @property
    def elements(self) -> int:
        """Values that it holds."""
        return self.codes or math.prod(self.shape)


@dataclass(frozen=True)
class Totals:
    """Sums over a merge.

    Attributes:
        tensors: tensors written.
        merged: tensors that got a delta.
        copied: tensors that stayed byte for byte.
        converted: tensors of which only the dtype changed.
        replaced: tensors that the adapter replaced.
        added: tensors the base did not have.
        parameters: elements written.
        bytes_read: bytes of the tensors that it was made from, base and adapters.
        bytes_written: bytes of tensors written.
        relative_delta: Frobenius norm of all deltas over that of the weights they were added to.
        changed_share: share of the elements of merged and replaced tensors that changed.
        seconds: wall time, from the call to the renamed folder.
        peak_memory: peak resident memory of the process in bytes, as the system reports it.
        threads: worker threads used.
        undo_bytes: bytes of the undo patch; 0 without one.
        survived: over all tensors in codes, as :attr:`TensorRecord.survived`; None without any.
        noise: likewise.
        relative_gap: over all merged tensors, the norm of what lies between the bases over that of
            the deltas; None if no other base was named.
    """

    tensors: int
    merged: int
    copied: int
    converted: int
    replaced: int
    added: int
    parameters: int
    bytes_read: int
    bytes_written: int
    relative_delta: float
    changed_share: float
    seconds: float
    peak_memory: int
    threads: int
    undo_bytes: int = 0
    survived: float | None = None
    noise: float | None = None
    relative_gap: float | None = None


@dataclass(frozen=True)
class Receipt:
    """Everything a merge did; written to ``OUT/regraft/receipt.json``.

    Attributes:
        regraft: version of regraft that made it.
        created: UTC time, ISO 8601.
        command: the command line, or the Python call, that made it.
        output: the folder.
        base: the base checkpoint.
        adapters: the adapters, in the order they were added.
        options: dtype, shard_size, and the other choices that decide the bytes.
        tensors: one record per tensor, in file order.
        totals: the sums.
        warnings: what the user should know, one sentence each.
        files: blake3 (hex) of every other file of the output, by its path in the folder with
            ``/`` between its parts; neither weight files nor the receipt itself.
        headers: blake3 (hex), by weight file, of all its bytes that are no tensor's.
        base_formats: the formats of the base's quantized weights; what was merged into are the
            weights that they stand for.
        trained_on: the base that the adapters were trained on, if another one was named.
    """

    regraft: str
    created: str
    command: str
    output: str
    base: InputRecord
    adapters: tuple[InputRecord, ...]
    options: Mapping[str, Any]
    tensors: tuple[TensorRecord, ...]
    totals: Totals
    warnings: tuple[str, ...] = ()
    receipt: int = RECEIPT_FORMAT
    arithmetic: int = ARITHMETIC_VERSION
    files: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    base_formats: tuple[str, ...] = ()
    trained_on: str | None = None

    @property
    def quiet(self) -> bool:
        """Whether there are adapters, and they changed (nearly) nothing."""
        totals = self.totals
        unchanged = totals.added == 0 and totals.changed_share < QUIET_SHARE
        # Of codes, what survived is said, and how more of it would.
        return bool(self.adapters) and unchanged and totals.survived is None

    @property
    def quiet_warning(self) -> str:
        """What to say, loudly, of a merge that changed (nearly) nothing."""
        totals = self.totals
        return (
            f"THE MERGED MODEL IS (NEARLY) THE BASE: {totals.changed_share:.3%} of the adapted "
            f"elements changed, |delta|/|W| is {totals.relative_delta:.3%}. Likely causes: the "
            "adapter was saved before training (lora_B is still zero); alpha or the weight is "
            "tiny; or the delta is smaller than the dtype's step, which dtype float32 would keep"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the receipt as JSON-ready objects."""
        few = asdict(replace(self, tensors=()))
        return few | {"tensors": [dict(vars(record)) for record in self.tensors]}


KEPT_SHARE = 0.5
"""Below this share of a delta that is in the codes, a merge says so loudly."""


def lost_warning(shares: Sequence[tuple[str, float]]) -> str:
    """Return what to say, loudly, where rounding to codes lost half of a delta; "" for nowhere.

    Args:
        shares: of each tensor in codes its name, and the share of the delta that is in them.
    """
    lost = [(share, name) for name, share in shares if share < KEPT_SHARE]
    if not lost:
        return ""
    share, name = min(lost)
    return (
        f"ROUNDING TO CODES LOST MORE THAN HALF OF THE ADAPTER on {len(lost)} of {len(shares)} "
        f"tensors: of {name}, {share:.1%} survived. Round stochastically, or merge into plain "
        "values (without --quantize)"
    )


# -- on disk ---------------------------------------------------------------------------------------


def file_key(name: str) -> str:
    """Return a file's name as the receipt has it: bytes that are not UTF-8 are spelled out.

    No two names have one key.
    """
    return spelled(name)


def receipt_bytes(receipt: Receipt) -> bytes:
    """Return a receipt as it is written; see :func:`receipt_pieces`."""
    return b"".join(receipt_pieces(receipt))


def receipt_pieces(receipt: Receipt) -> Iterator[bytes]:
    """Yield a receipt as it is written: JSON whose last key is a digest of all the rest.

    Of the records of many tensors few are JSON at a time, as all would take more memory than the
    merge itself.
    """
    few = json_bytes(replace(receipt, tensors=()).to_json())
    head, _, tail = few.partition(_NO_TENSORS)
    if not receipt.tensors:
        yield sealed(few)
        return
    digest = blake3()
    for piece in chain([head + b'\n  "tensors": ['], _record_pieces(receipt.tensors)):
        digest.update(piece)
        yield piece
    yield sealed(b"\n  ]" + tail, digest)


_NO_TENSORS = b'\n  "tensors": []'
_RECORDS_AT_ONCE = 256
_encode = json.JSONEncoder(ensure_ascii=False).encode


def _record_pieces(records: Sequence[TensorRecord]) -> Iterator[bytes]:
    """Yield records as they stand in a receipt, some at a time."""
    for start in range(0, len(records), _RECORDS_AT_ONCE):
        part = records[start : start + _RECORDS_AT_ONCE]
        yield ("," * bool(start) + ",".join(map(_record_json, part))).encode()


def _record_json(record: TensorRecord) -> str:
    """Return a record as :func:`json_bytes` would write it in its place, with a line of its own."""
    lines = []
    for name, value in vars(record).items():
        if isinstance(value, tuple) and value:
            items = ",\n        ".join(map(_encode, value))
            lines.append(f'      "{name}": [\n        {items}\n      ]')
        else:
            lines.append(f'      "{name}": {_encode(value)}')
    return "\n    {\n" + ",\n".join(lines) + "\n    }"


def sealed(document: bytes, begun: Any = None) -> bytes:
    """Return a JSON object's bytes with one more key, ``digest``, the blake3 of those bytes.

    Args:
        document: the object, or the rest of it.
        begun: the digest of what comes before.
    """
    end, digest = b"\n}\n", begun or blake3()
    digest.update(document)
    told = digest.hexdigest().encode()
    return document.removesuffix(end) + b',\n  "digest": "' + told + b'"' + end


def read_receipt(path: Path) -> Receipt:
    """Return the receipt in a file, which has to be byte for byte as regraft wrote it.

    A receipt of regraft 0.1, without digest, ``files`` and ``headers``, is read too.

    Raises:
        FormatError: it is no receipt, or a byte of it has changed.
        InputError: there is no such file.
        AccessError: the system refused to read it.
    """
    value, content = read_object_and_bytes(path, max_bytes=MAX_RECEIPT_BYTES)
    digest = value.pop("digest", None)
    try:
        receipt: Receipt = _decode(value, Receipt, "receipt")
    except ValueError as error:
        raise _unreadable(path, str(error)) from None
    if problem := _unknown_option(receipt.options):
        raise _unreadable(path, problem)
    if receipt.receipt != RECEIPT_FORMAT:
        raise _unreadable(path, f"version {receipt.receipt} of its layout")
    if digest is None and (receipt.files or receipt.headers):
        raise _unreadable(path, "no digest")
    document = json_bytes(value)
    if content != (document if digest is None else sealed(document)):
        raise FormatError(
            "the receipt is not as it was written: its digest or its layout does not fit",
            where=str(path),
            hint="A byte of it has changed since; what it says cannot be trusted",
        )
    return receipt


def _unknown_option(options: Mapping[str, Any]) -> str:
    """Return the first choice that no regraft of this layout knows; "" if all are known."""
    known = {"quantize": ("keep", *FORMATS), "rounding": ROUNDINGS, "method": METHOD_NAMES}
    for name, values in known.items():
        if options.get(name) is not None and options[name] not in values:
            return f"{name} {quoted(options[name])}"
    density = options.get("density", 1.0)
    if type(density) is not float or not 0 < density <= 1:
        return "a density that is none"
    seed = options.get("seed", 0)
    return "" if type(seed) is int and 0 <= seed < 2**63 else "a seed that is none"


def _unreadable(path: Path, found: str) -> FormatError:
    expected = f"a receipt of layout {RECEIPT_FORMAT}, as regraft writes it"
    return FormatError(
        "the receipt cannot be read", where=str(path), expected=expected, found=found
    )


_LATER = frozenset(
    (
        "files",
        "headers",
        "undo_bytes",
        "survived",
        "noise",
        "base_gap",
        "codes",
        "relative_gap",
        "base_formats",
        "trained_on",
        "known",
    )
)
"""Fields that a receipt of regraft 0.1 does not have."""


def _decode(value: Any, kind: Any, where: str) -> Any:
    """Return JSON as the type that a field of the receipt has.

    Raises:
        ValueError: it is of another type.
    """
    if type(value) is kind and kind in _AS_THEY_ARE:  # nearly all are, so they come first
        return value
    origin, inner, is_record = _shape(kind)
    if is_record and isinstance(value, dict):
        return _decode_fields(value, kind, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(item, inner[0], f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _decode(item, inner[1], f"{where}.{key}") for key, item in value.items()}
    if origin is types.UnionType:  # "X | None", and no other
        return None if value is None else _decode(value, inner[0], where)
    if kind is Any or (origin is Literal and value in inner):
        return value
    if kind is float and type(value) in (int, float) and _fits(value):
        return value
    raise ValueError(f"{quoted(value)} at {quoted(where)}")


_AS_THEY_ARE = frozenset((int, str, bool))


@functools.cache
def _shape(kind: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """Return what a type is of, its arguments, and whether it is a dataclass."""
    return typing.get_origin(kind), typing.get_args(kind), is_dataclass(kind)


def _fits(value: float) -> bool:
    """Whether a number is one that a float can be."""
    try:
        float(value)
    except OverflowError:
        return False
    return True


@functools.cache
def _types_of(kind: Any) -> dict[str, Any]:
    """Return the types of a record's fields, in their order."""
    types_of = typing.get_type_hints(kind)
    return {each.name: types_of[each.name] for each in fields(kind)}


def _decode_fields(value: dict[str, Any], kind: Any, where: str) -> Any:
    types_of = _types_of(kind)
    if value.keys() != types_of.keys():
        missing = [name for name in types_of if name not in value and name not in _LATER]
        unknown = [name for name in value if name not in types_of]
        if missing or unknown:
            told = "missing" if missing else "unknown"
            raise ValueError(f"{quoted((missing or unknown)[0])} {told}")
    return kind(**{n: _decode(v, types_of[n], f"{where}.{n}") for n, v in value.items()})
