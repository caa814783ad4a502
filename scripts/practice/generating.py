"""Ways of generating with an adapter."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import Any

import tokenizers
import torch
import transformers as tf

from practice.bases import VOCABULARY, inputs
from practice.outcome import require, require_close
from practice.world import LLAMA, Settings, World, generated, generates

GENERATING: dict[str, Settings] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 8},
    "sampling, with penalties": {
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.8,
        "min_p": 0.02,
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
    },
    "beams": {"num_beams": 3},
    "beams, sampled": {"num_beams": 3, "do_sample": True},
    "beams, several answers each": {"num_beams": 3, "num_return_sequences": 3},
    "several answers each": {"do_sample": True, "num_return_sequences": 2},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "prompt in chunks": {"prefill_chunk_size": 2},
    "against the answer without a prompt": {"guidance_scale": 1.5},
    "some tokens forbidden": {"bad_words_ids": [[7], [8], [9, 10]], "suppress_tokens": [11]},
    "an end token": {"eos_token_id": [5, 40], "min_new_tokens": 2},
}
"""Ways of ``generate`` that are its arguments alone."""


def tokenizer() -> Any:
    """Return a tokenizer of sixty-four words that pads on the left."""
    words = {"<pad>": 0, "<s>": 1, "<u>": 2, **{f"w{n}": n for n in range(3, VOCABULARY)}}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<u>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<u>", padding_side="left"
    )


PROMPTS = ["w5 w9 w23 w40", "w33 w7"]


def _one_prompt() -> Settings:
    return {"input_ids": inputs(LLAMA)["input_ids"][:1]}


def _prompt_lookup(world: World) -> None:
    generates({**_one_prompt(), "prompt_lookup_num_tokens": 2}, world)


def _left_padding(world: World) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2] = 0
    generates({"attention_mask": mask}, world)


def _assisted(world: World) -> None:
    generates({**_one_prompt(), "assistant_model": world.plain}, world)


def _streamed(world: World) -> None:
    streamed: list[Any] = []

    class Streamer(tf.generation.streamers.BaseStreamer):  # type: ignore[misc]
        def put(self, value: Any) -> None:
            streamed.append(value.reshape(-1))

        def end(self) -> None: ...

    one = _one_prompt()
    found = generated(world.model, **one, streamer=Streamer())
    require(torch.equal(torch.cat(streamed), found[0]), "streamed other tokens than returned")
    require(torch.equal(found, generated(world.theirs, **one)), "other tokens")


def _assisted_by_another(world: World) -> None:
    torch.manual_seed(1)
    config = tf.LlamaConfig(**{**world.plain.config.to_dict(), "num_hidden_layers": 1})
    generates({**_one_prompt(), "assistant_model": tf.LlamaForCausalLM(config).eval()}, world)


def _assisted_with_sampling(world: World) -> None:
    sampled: Settings = {"do_sample": True, "top_k": 8}
    generates({**_one_prompt(), **sampled, "assistant_model": world.plain}, world)


def _assists(world: World) -> None:
    """Let the model with the adapter assist another one."""
    given = _one_prompt()
    found = generated(world.plain, assistant_model=world.model, **given)
    expected = generated(world.plain, assistant_model=world.inner("one"), **given)
    require(torch.equal(found, expected), "other tokens")


def _early_exit(world: World) -> None:
    found = generated(world.model, assistant_early_exit=1, **_one_prompt())
    expected = generated(world.inner("one"), assistant_early_exit=1, **_one_prompt())
    require(torch.equal(found, expected), "other tokens")


def _contrastive_search(model: Any, input_ids: Any, **_: Any) -> Any:
    """Choose of four likely tokens the one least like what was said before (Su et al.)."""
    for _step in range(5):
        found = model(input_ids=input_ids, output_hidden_states=True)
        likely, tokens = found.logits[:, -1].softmax(-1).topk(4)
        scores = []
        for n in range(4):
            longer = torch.cat([input_ids, tokens[:, n : n + 1]], 1)
            states = model(input_ids=longer, output_hidden_states=True).hidden_states[-1]
            alike = torch.cosine_similarity(states[:, -1:], states[:, :-1], -1).amax(1)
            scores.append(0.4 * likely[:, n] - 0.6 * alike)
        best = torch.stack(scores, 1).argmax(1, keepdim=True)
        input_ids = torch.cat([input_ids, tokens.gather(1, best)], 1)
    return input_ids


def _contrastive(world: World) -> None:
    found = generated(world.model, custom_generate=_contrastive_search)
    expected = generated(world.inner("one"), custom_generate=_contrastive_search)
    require(torch.equal(found, expected), "other tokens")


def _scores(world: World) -> None:
    asked: Settings = {
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_hidden_states": True,
    }
    found, expected = (generated(each, **asked) for each in (world.model, world.theirs))
    require_close(torch.stack(found.scores), torch.stack(expected.scores), "scores")
    for ours, theirs in zip(found.hidden_states[0], expected.hidden_states[0], strict=True):
        require_close(ours, theirs, "hidden states")


def _processors(world: World) -> None:
    def colder(_ids: Any, scores: Any) -> Any:
        return scores * torch.linspace(0.5, 1.5, VOCABULARY)

    def enough(ids: Any, _scores: Any, **_: Any) -> Any:
        return (ids[:, -1] % 3 == 0) & (ids.shape[1] > 8)

    generates({"logits_processor": [colder], "stopping_criteria": [enough]}, world)


def _embeddings(world: World) -> None:
    vectors = world.plain.get_input_embeddings()(inputs(LLAMA)["input_ids"]).detach()
    generates({"inputs_embeds": vectors}, world)


def _cache_goes_on(world: World) -> None:
    """Read a prompt, and generate from its cache."""
    ids = inputs(LLAMA)["input_ids"]
    found = []
    for model in (world.model, world.theirs):
        with torch.no_grad():
            cache = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        found.append(generated(model, input_ids=ids, past_key_values=cache))
    require(torch.equal(*found), "other tokens")


def _mixed_batch(world: World) -> None:
    """Generate for rows of several adapters, as PEFT does with ``adapter_names``."""
    ids = torch.cat([inputs(LLAMA)["input_ids"], inputs(LLAMA)["input_ids"].flip(1)])
    for settings, repeats in (({}, 1), ({"num_beams": 2}, 2)):
        with world.adapters.rows(["one", None, "two", "one"], repeats=repeats):
            found = generated(world.model, input_ids=ids, **settings)
        names = ["one", "__base__", "two", "one"]
        expected = generated(world.theirs, input_ids=ids, adapter_names=names, **settings)
        require(torch.equal(found, expected), f"other tokens with {settings or 'one beam'}")


def _mixed_with_padding(world: World) -> None:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    with world.adapters.rows(["one", "two"]):
        found = generated(world.model, attention_mask=mask)
    names = ["one", "two"]
    expected = generated(world.theirs, attention_mask=mask, adapter_names=names)
    require(torch.equal(found, expected), "other tokens")


def _text_streamed(world: World) -> None:
    """Read the text as it comes, from a thread that has the scope of the caller."""
    words = tokenizer()
    streamer = tf.TextIteratorStreamer(words, skip_prompt=True, timeout=60)
    with world.adapters.using("two"):
        context = contextvars.copy_context()
    settings: Settings = {"streamer": streamer, **_one_prompt()}
    thread = threading.Thread(target=context.run, args=(generated, world.model), kwargs=settings)
    thread.start()
    found = "".join(streamer)
    thread.join()
    world.theirs.set_adapter("two")
    expected = generated(world.theirs, **_one_prompt())[0, 6:]
    require(found.split() == words.decode(expected).split(), f"streamed {found!r}")


def _pipeline(world: World) -> None:
    settings: Settings = {"max_new_tokens": 5, "do_sample": False, "batch_size": 2}
    words = tokenizer()
    for name in ("one", "two"):
        pipes = (
            tf.pipeline("text-generation", model=model, tokenizer=words)
            for model in (world.model, world.inner(name))
        )
        with world.adapters.using(name):
            found, expected = (pipe(PROMPTS, **settings) for pipe in pipes)
        require(found == expected, f"other text with {name}")


def _switched_between_tokens(world: World) -> None:
    """Choose another adapter after each token, with one cache."""
    found = []
    for model, choose in (
        (world.model, world.adapters.set_adapter),
        (world.theirs, world.theirs.set_adapter),
    ):
        ids, cache = inputs(LLAMA)["input_ids"], None
        given = ids
        for step in range(6):
            choose(("one", "two")[step % 2])
            with torch.no_grad():
                answered = model(input_ids=given, past_key_values=cache, use_cache=True)
            cache, given = answered.past_key_values, answered.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, given], 1)
        found.append(ids)
    require(torch.equal(*found), "other tokens")


def _many_threads(world: World) -> None:
    """Generate with two adapters in two threads at the same time."""
    found: dict[str, Any] = {}

    def serve(name: str) -> None:
        with world.adapters.using(name):
            found[name] = generated(world.model)

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in ("one", "two"):
        world.theirs.set_adapter(name)
        require(torch.equal(found[name], generated(world.theirs)), f"other tokens of {name}")


GENERATING_WAYS: dict[str, Callable[[World], None]] = {
    "prompt lookup": _prompt_lookup,
    "left padding": _left_padding,
    "assisted by the base": _assisted,
    "assisted by another model": _assisted_by_another,
    "assisted, with sampling": _assisted_with_sampling,
    "assisting another model": _assists,
    "assisted by its own first layer": _early_exit,
    "contrastive search": _contrastive,
    "scores and hidden states": _scores,
    "processors and criteria of one's own": _processors,
    "embeddings in place of tokens": _embeddings,
    "a cache that goes on": _cache_goes_on,
    "rows while generating": _mixed_batch,
    "rows with left padding": _mixed_with_padding,
    "streamed": _streamed,
    "text streamed from a thread": _text_streamed,
    "pipeline of text": _pipeline,
    "another adapter for each token": _switched_between_tokens,
    "generating in two threads": _many_threads,
}
"""Ways of generating that are more than arguments."""
