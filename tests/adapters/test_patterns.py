"""Regular expressions from strangers: PEFT's meaning, and an end to their time."""

from __future__ import annotations

import random
import re
import time
from typing import Any

import pytest
from peft.utils.other import get_pattern_key

from adapters.test_peft_rules import MODULES
from merging.toys import adapter_config
from regraft.adapters import patterns
from regraft.adapters.patterns import (
    MAX_EXPRESSIONS,
    SUFFIX,
    WHOLE,
    BadExpressionError,
    Expressions,
    FirstMatch,
    spelled_out,
    suffixes_of,
)
from regraft.adapters.settings import LoraSettings, read_settings
from regraft.errors import AdapterError

WHERE = "adapter/adapter_config.json"
NAME = "model.layers.10.self_attn.q_proj"
SLOW = (r"(.|..)+[!?]", r"(?:\w|\w\w|\.)+[!?]", r"(?=(.|..)+[!?]).*", r"(.{1,9}){1,99}[!?]")


def settings(**fields: Any) -> LoraSettings:
    return read_settings(adapter_config(**fields), WHERE)


# An end to their time


@pytest.mark.parametrize("expression", SLOW)
@pytest.mark.parametrize(
    "field",
    ["target_modules", "exclude_modules", "rank_pattern", "modules_to_save", "layers_pattern"],
)
def test_an_expression_that_would_take_for_ever_is_refused(
    field: str, expression: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    name = "x" * 60 + ".q_proj"
    value: Any = [expression] if field.endswith(("save", "pattern")) else expression
    fields = {field: {expression: 2} if field == "rank_pattern" else value}
    if field == "layers_pattern":
        fields["layers_to_transform"] = [1]
    found = settings(**fields)
    ask = found.rank_of if field == "rank_pattern" else found.targets
    begin = time.process_time()
    with pytest.raises(AdapterError, match="takes too long") as caught:
        ask(name)
    assert time.process_time() - begin < 3
    (problem,) = caught.value.problems
    assert problem.where == WHERE
    assert problem.found == f"'{expression}'"
    assert problem.hint


def test_time_is_counted_over_all_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """An expression that stays below the limit with each name does not, with all of them."""
    monkeypatch.setattr(patterns, "SECONDS", 0.3)
    found = settings(target_modules=r"(.|..)+[!?]")
    begin = time.process_time()
    with pytest.raises(AdapterError, match="takes too long"):
        [found.targets("x" * 20) for _ in range(10_000)]
    assert time.process_time() - begin < 5


def test_compiling_has_an_end_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    slow = {f"(?i:[\\0-\\uffff]{{{i}}})" * 20: 1 for i in range(1000)}
    begin = time.process_time()
    with pytest.raises(AdapterError, match="takes too long"):
        settings(alpha_pattern=slow)
    assert time.process_time() - begin < 5


@pytest.mark.slow
def test_there_may_be_many_names_but_only_so_many_expressions() -> None:
    names = {f"model.layers.{i}.q_proj": i + 1 for i in range(100_000)}
    found = settings(rank_pattern=names)
    begin = time.process_time()
    assert [found.rank_of(f"model.layers.{i}.q_proj") for i in (0, 99_999)] == [1, 100_000]
    assert found.rank_of("model.layers.7.v_proj") == found.r
    assert time.process_time() - begin < 5
    with pytest.raises(AdapterError, match=f"at most {MAX_EXPRESSIONS}"):
        settings(rank_pattern={f"(m{i})": 1 for i in range(MAX_EXPRESSIONS + 1)})


@pytest.mark.parametrize(
    "expression",
    ["(", "*", r"\p{L}", "(?R)", "(?V1)a", "(?r)a", "(?|a|b)", r"\K", r"\h", "(" * 5000,
     "x" * 10_001, "a{99999999999}", r"(?<=a+)b", "(?P<a>.)(?P<a>.)", "(?(2)a|b)"],
)  # fmt: skip
def test_what_peft_cannot_compile_is_refused(expression: str) -> None:
    with pytest.raises(AdapterError, match="a regular expression") as caught:
        settings(target_modules=expression)
    assert len(str(caught.value)) < 1000


@pytest.mark.slow
def test_lists_without_end_are_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    names = [f"a{i}" for i in range(100_000)]
    found = settings(target_modules=[*names, "q_proj"], exclude_modules=names,
                     modules_to_save=names, target_parameters=[f"{n}.weight" for n in names],
                     layers_to_transform=list(range(100_000)))  # fmt: skip
    begin = time.process_time()
    for _ in range(1000):
        assert found.targets(NAME)
        assert not found.saves(f"{NAME}.weight")
        assert found.parameters_of("x.a77") == ("weight",)
    assert time.process_time() - begin < 5


# PEFT's meaning


def test_a_pattern_of_layers_may_have_groups() -> None:
    """PEFT finds the number by its name, so groups of the pattern's own do not disturb it."""
    found = settings(layers_to_transform=[10], layers_pattern=["(layers|h)"])
    assert found.targets(NAME)
    assert not found.targets("model.layers.1.self_attn.q_proj")


EXPRESSIONS = (
    r".*\.(q|v)_proj", r"(?i).*Q_PROJ", r"model\.layers\.(?:1|10)\..*", r".*layers\.\d+\.self.*",
    r"(?P<a>model)\.(?:layers|h).*", r"(?:.*?(?:model|layers).*?(?:self_attn|mlp).*?(?:q_proj).*?)",
    r"^model.*proj$", r".*(?<!v)_proj", r"(?!.*mlp).*proj", r"(.)\1.*", r"[^.]+", r"\w+\.\w+",
    r"(?s:.*)_proj", r"model.{2,}proj", r"model.{,40}", r"m{1}odel.*", r"(?a:\w+)", r"\Amodel.*\Z",
    r"(?>model|lm).*", r".*+", r"(?x) model .* # all", r".*\bq_proj\b", r"(q_proj|)",
    "score|lm_head",
)  # fmt: skip

# regex would find fuzzy matches and classes in these, where re finds braces and brackets
OTHER_NOTATIONS = (
    (r"a{e}", "a{e}"), (r"a{e}", "b"), (r"(?:model){e<=1}", "mode"), (r"a{i<=1}", "a{i<=1}"),
    (r"x{1,2}{e}", "xx{e}"), (r"a{s,i}", "a{s,i}"), ("{e}", "{e}"), ("{", "{"), ("a{}", "a{}"),
    (r"a{,2}", "aa"), (r"a{,}", "aaa"), (r"a{2", "a{2"), (r"[[:alpha:]]", "a"),
    ("[[:alpha:]]", ":]"),
    (r"[^[:digit:]]", "7"), (r"[[a]", "["), (r"[]a[]", "["), (r"[\[a]", "["), (r"\{e}", "{e}"),
    (r"[{e}]", "e"), (r"[a||b]", "|"), (r"[\]{e}]", "]"), (r"\\{e}", "\\{e}"),
)  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_matches_as_in_re(expression: str) -> None:
    expressions = Expressions(WHERE)
    expressions.add(expression)
    for name in MODULES:
        wanted = re.fullmatch(expression, name) is not None
        assert expressions.fullmatch(expression, name) is wanted, name
    try:
        re.compile(SUFFIX.format(expression))
    except re.error:
        return
    for name in MODULES:
        wanted = re.match(SUFFIX.format(expression), name) is not None
        assert (expressions.match(expression, name, SUFFIX) is not None) is wanted, name


@pytest.mark.filterwarnings("ignore:Possible")
@pytest.mark.parametrize(("expression", "text"), OTHER_NOTATIONS)
def test_notations_of_regex_mean_what_they_mean_to_re(expression: str, text: str) -> None:
    expressions = Expressions(WHERE)
    expressions.add(expression, WHOLE)
    assert expressions.fullmatch(expression, text) is (re.fullmatch(expression, text) is not None)


@pytest.mark.slow
def test_random_expressions_match_as_in_re() -> None:
    rng = random.Random(0)
    pieces = ("a", "q", ".", r"\.", "*", "+", "?", "|", "(", ")", "(?:", "[aq]", "[^.]",
              "{1,2}", "{", "}", "{e}", "[[:a:]]", r"\w", r"\d", "$", "^", "_proj", "layers",
              )  # fmt: skip
    compiled = 0
    for _ in range(3000):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 8)))
        expressions = Expressions(WHERE)
        try:
            expressions.add(text)
        except BadExpressionError:
            continue
        compiled += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.warnoptions", [])
            for name in (*MODULES[:12], "a", "aq", "q_proj", "a{e}", ":]"):
                wanted = _fullmatch(text, name)
                assert expressions.fullmatch(text, name) is wanted, (text, name)
    assert compiled > 800


def _fullmatch(text: str, name: str) -> bool:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return re.fullmatch(text, name) is not None


def test_the_first_pattern_is_found_as_peft_finds_it() -> None:
    """Names with dots, which match any character, among expressions, in any order."""
    rng = random.Random(1)
    pieces = ("q_proj", "proj", "model", "layers.1", "self.attn", "self_attn.q_proj", "q.proj",
              "1.self_attn", "layers.1.self_attn.q_proj", "l.yers.1.mlp", "", ".", "down_proj",
              "^model.*q_proj", r".*\.1\..*", "(q|v)_proj", "lm_head|score", "h",
              "...")  # fmt: skip
    chosen = set()
    for _ in range(300):
        pairs = {text: i + 1 for i, text in enumerate(rng.sample(pieces, rng.randint(1, 8)))}
        expressions = Expressions(WHERE)
        for text in pairs:
            expressions.add(text, SUFFIX)
        table = FirstMatch(tuple(pairs.items()), expressions)
        for name in (*MODULES, "", "a.", ".."):
            wanted = pairs.get(get_pattern_key(list(pairs), name), 0)
            assert table.find(name, 0) == wanted, (pairs, name)
            chosen.add(wanted)
    assert len(chosen) > 5


def test_suffixes_begin_after_a_dot() -> None:
    assert list(suffixes_of("a.b.c")) == ["a.b.c", "b.c", "c"]
    assert list(suffixes_of("a.")) == ["a.", ""]
    assert list(suffixes_of("")) == [""]


def test_only_braces_and_brackets_are_spelled_out() -> None:
    for expression in EXPRESSIONS:
        assert spelled_out(expression) == expression
    assert spelled_out(r"a{e<=1}[[:x:]]\{{2}") == r"a\{e<=1}[\[:x:]]\{{2}"
