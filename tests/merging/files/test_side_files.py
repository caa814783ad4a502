"""What lies beside the weights: links, pipes, cards and odd names, found before the work."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import regraft
from merging import toys
from regraft.errors import FormatError, InputError

SECRET = b"-----BEGIN OPENSSH PRIVATE KEY-----"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the user's, outside of every model."""
    (tmp_path / "home").mkdir()
    path = tmp_path / "home" / "id_rsa"
    path.write_bytes(SECRET)
    return path


def holds(folder: Path, content: bytes) -> list[str]:
    """Return the files below a folder that hold some bytes."""
    return [name for name, found in toys.tree(folder).items() if found and content in found]


NAMES = ("vocab.txt", "LICENSE", "README.md", ".gitattributes", "additional_chat_templates/a.jinja")


def link(folder: Path, name: str, target: Path) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(target)


def test_links_to_outside_do_not_come_out_of_any_verb(
    base: Path, adapter: Path, tmp_path: Path, secret: Path
) -> None:
    for name in NAMES:
        link(base, name, secret)
    for name in ("tokenizer.json", "notes.txt", "README.md"):
        link(adapter, name, secret)
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    for name in ("vocab.txt", "LICENSE", "additional_chat_templates/a.jinja"):
        assert any(f"'{name}'" in said and "outside" in said for said in receipt.warnings)
    assert any("'tokenizer.json'" in said and str(adapter) in said for said in receipt.warnings)
    assert any("README.md" in said for said in receipt.warnings)
    regraft.convert(base, tmp_path / "converted", dtype="float32")
    regraft.quantize(base, tmp_path / "quantized", to="int8")
    shrunk = regraft.shrink(adapter, tmp_path / "small")
    assert any("'tokenizer.json'" in said for said in shrunk.warnings)
    for made in ("out", "converted", "quantized", "small"):
        assert holds(tmp_path / made, SECRET) == []
    assert regraft.verify(tmp_path / "out").ok
    assert toys.read_json(tmp_path / "out" / "regraft" / "undo" / "undo.json")["left_out"]


def test_a_plan_and_a_check_say_what_would_be_left_out(
    base: Path, adapter: Path, secret: Path
) -> None:
    link(base, "vocab.txt", secret)
    for said in (regraft.plan(base, adapter).warnings, regraft.check(base, adapter).warnings):
        assert any("'vocab.txt'" in warning for warning in said)


@pytest.mark.parametrize("whose", ["base", "adapter"])
def test_a_config_outside_is_refused_before_the_work(
    base: Path, adapter: Path, tmp_path: Path, whose: str
) -> None:
    folder, name = {
        "base": (base, "config.json"), "adapter": (adapter, "adapter_config.json"),
    }[whose]  # fmt: skip
    (folder / name).rename(tmp_path / "elsewhere.json")
    (folder / name).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(InputError, match="outside of its folder"):
        regraft.merge(base, adapter, tmp_path / "out")
    assert not regraft.check(base, adapter).ok
    if whose == "adapter":
        with pytest.raises(InputError, match="outside of its folder"):
            regraft.shrink(adapter, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


def test_links_inside_come_out_as_files_and_go_back(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "merges.txt").write_text("a b")
    (base / "vocab.txt").symlink_to("merges.txt")
    regraft.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "vocab.txt").is_symlink()
    regraft.unmerge(tmp_path / "out", tmp_path / "again")
    assert (tmp_path / "again" / "vocab.txt").read_text() == "a b"


def test_nothing_waits_for_pipes(base: Path, adapter: Path, tmp_path: Path) -> None:
    for folder, names in ((base, NAMES), (adapter, ("README.md", "tokenizer.json"))):
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            os.mkfifo(folder / name)
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    assert any("'vocab.txt'" in said and "a pipe" in said for said in receipt.warnings)
    regraft.shrink(adapter, tmp_path / "small")
    assert not (tmp_path / "out" / "vocab.txt").exists()
    assert "lora" in (tmp_path / "small" / "README.md").read_text()


# Cards of a base


def bomb() -> str:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
    return "\n".join([*lines, "license: *a29"])


def merge_bomb() -> str:
    lines = ["a0: &a0 {x: y}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 12)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (bomb(), "aliases"),
        (merge_bomb(), "aliases"),
        ("license: !!python/object/apply:os.system ['true']", "YAML"),
        ("license: !!timestamp abc", "YAML"),
        ("license: !!bool maybe", "YAML"),
        ("license: !!int ''", "YAML"),
        ("license: mit\nlicense: apache-2.0", "twice"),
        ("license: " + "9" * 5000, "YAML"),
        ("license: 0x" + "f" * 20_000, "neither text"),
        ("license: 2001-01-01", "neither text"),
        ("license: {a: b}", "neither text"),
        ("license: [mit, 3]", "neither text"),
        ("license: \x07", "YAML"),
        ("? [a]\n: b\nlicense: mit", "YAML"),
        ("license: mit\nx: " + "y" * 2**16, "64 KiB"),
    ],
)  # fmt: skip
def test_a_card_that_cannot_be_read_is_told_and_hands_nothing_on(
    base: Path, adapter: Path, tmp_path: Path, line: str, why: str
) -> None:
    (base / "README.md").write_text(f"---\n{line}\n---\n# A base\n")
    receipt = regraft.merge(base, adapter, tmp_path / "out", undo=False)
    said = [warning for warning in receipt.warnings if "README.md" in warning]
    assert len(said) == 1
    assert why in said[0]
    assert "license:" not in (tmp_path / "out" / "README.md").read_text()


def test_sound_metadata_is_handed_on_and_no_is_a_language(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    front = "license: apache-2.0\nlanguage: no\nlicense_link: null\nextra_gated_prompt: |\n  a\n  b"
    (base / "README.md").write_text(f"---\n{front}\n---\n")
    receipt = regraft.merge(base, adapter, tmp_path / "out", undo=False)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0\nlanguage: 'no'\n" in text
    assert "license_link" not in text
    assert not [warning for warning in receipt.warnings if "README" in warning]


def test_a_card_of_two_gib_is_not_read_whole(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "README.md").touch()
    os.truncate(base / "README.md", 2**31)
    regraft.merge(base, adapter, tmp_path / "out", undo=True)
    assert "README.md" in toys.read_json(tmp_path / "out/regraft/undo/undo.json")["left_out"]


def test_an_adapters_odd_tokenizer_config_is_refused_before_the_work(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (adapter / "tokenizer.json").write_text("{}")
    (adapter / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(FormatError, match="tokenizer_config"):
        regraft.merge(base, adapter, tmp_path / "out")
    assert not regraft.check(base, adapter).ok
    assert not list(tmp_path.glob("*out*"))


# Names that are not UTF-8

ODD = os.fsdecode(b"odd\xff")


def odd_base(folder: Path) -> tuple[Path, Path, Path]:
    return toys.write_base(folder / ODD), toys.write_adapter(folder / "a"), folder / "out"


def odd_adapter(folder: Path) -> tuple[Path, Path, Path]:
    return toys.write_base(folder / "b"), toys.write_adapter(folder / ODD), folder / "out"


def odd_out(folder: Path) -> tuple[Path, Path, Path]:
    return toys.write_base(folder / "b"), toys.write_adapter(folder / "a"), folder / ODD


@pytest.mark.parametrize("make", [odd_base, odd_adapter, odd_out])
def test_folders_of_odd_names_are_merged_verified_and_given_back(
    tmp_path: Path, make: Callable[[Path], tuple[Path, Path, Path]]
) -> None:
    base, adapter, out = make(tmp_path)
    regraft.merge(base, adapter, out)
    receipt = json.loads((out / "regraft" / "receipt.json").read_bytes())
    assert (
        "odd\\xff"
        in receipt["base"]["source"] + receipt["adapters"][0]["source"] + receipt["output"]
    )
    report = regraft.verify(out)
    assert report.ok
    assert report.tensors  # so base and adapter were found by the receipt
    (out / "README.md").read_bytes().decode()
    regraft.unmerge(out, tmp_path / "again")
    assert toys.tree(tmp_path / "again") == toys.tree(base)


def test_files_whose_names_differ_in_bytes_that_are_not_utf8_are_told_apart(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    names = [os.fsdecode(b"odd\xff.txt"), os.fsdecode(b"odd\xfe.txt"), "odd\\xff.txt"]
    for name in names:
        (base / name).write_text(ascii(name))
    receipt = regraft.merge(base, adapter, tmp_path / "out")
    keys = [key for key in receipt.files if key.startswith("odd")]
    assert sorted(keys) == ["odd\\\\xff.txt", "odd\\xfe.txt", "odd\\xff.txt"]
    assert regraft.verify(tmp_path / "out").ok
    (tmp_path / "out" / names[1]).write_text("changed")
    assert not regraft.verify(tmp_path / "out").ok


def test_a_weights_file_of_an_odd_name_is_refused_before_the_work(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    (base / "model.safetensors").rename(base / f"{ODD}.safetensors")
    with pytest.raises(InputError, match="not UTF-8"):
        regraft.merge(base, adapter, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("place", ["base", "adapter", "out"])
def test_a_name_with_a_nul_is_refused(
    base: Path, adapter: Path, tmp_path: Path, place: str
) -> None:
    given = {"base": str(base), "adapter": str(adapter), "out": str(tmp_path / "out")}
    given[place] += "\0x"
    with pytest.raises(regraft.RegraftError, match="NUL"):
        regraft.merge(given["base"], given["adapter"], given["out"])


def test_a_base_that_an_adapter_names_with_a_nul_is_refused(tmp_path: Path) -> None:
    adapter = toys.write_adapter(tmp_path / "a", base_model_name_or_path="org/\0name")
    with pytest.raises(InputError, match=r"is not here.*u0000"):
        regraft.merge(None, adapter, tmp_path / "out")
