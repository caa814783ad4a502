"""Other bases, and other places and forms in which a model with an adapter is run."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import accelerate  # type: ignore[import-untyped]
import peft
import torch
import transformers as tf

import regraft
from practice.bases import BASES, Base, answer, inputs, made
from practice.generating import PROMPTS, tokenizer
from practice.outcome import require, require_close
from practice.world import (
    LLAMA,
    Settings,
    World,
    answers_by_row,
    generated,
    generates,
    in_world,
)

Way = Callable[[World], None]


def _base(name: str) -> Base:
    return next(base for base in BASES if base.name == name)


FOUR_BIT: Settings = {
    "quantization_config": tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    ),
    "dtype": torch.float32,
}
EIGHT_BIT: Settings = {
    "quantization_config": tf.BitsAndBytesConfig(load_in_8bit=True),
    "dtype": torch.float32,
}


def _chosen(world: World) -> None:
    """Answer with each adapter, and as the base."""
    for name in ("one", "two"):
        with world.adapters.using(name):
            world.agree(f"with {name}", name)
    with world.adapters.disable_adapter():
        world.agree("as the base", None)


def _served(world: World) -> None:
    """Answer with each adapter, as the base, and with both adapters together."""
    _chosen(world)
    world.theirs.base_model.set_adapter(["one", "two"])
    expected = answer(world.theirs, world.base).detach()
    with world.adapters.using(["one", "two"]):
        require_close(world.answer(), expected, "with both")


def _rows(world: World) -> None:
    answers_by_row(world, "two")


def _generated_in_4_bits(world: World) -> None:
    generates({}, world)
    with world.adapters.rows(["one", "two"]):
        found = generated(world.model)
    names = ["one", "two"]
    require(torch.equal(found, generated(world.theirs, adapter_names=names)), "other tokens")


def _images_generated(world: World) -> None:
    generates(inputs(world.base), world)
    generates({**inputs(world.base), "num_beams": 2}, world)


def _pooled(world: World) -> None:
    """Compare sentences by the mean of their tokens, as sentence embeddings do."""
    mask = torch.ones(2, 6)
    mask[1, 4:] = 0
    asked = {**inputs(world.base), "attention_mask": mask}

    def sentences(model: Any) -> Any:
        states = model(**asked).last_hidden_state * mask[..., None]
        return torch.nn.functional.normalize(states.sum(1) / mask.sum(1, keepdim=True), dim=-1)

    for name in ("one", "two"):
        world.theirs.set_adapter(name)
        with world.adapters.using(name):
            require_close(sentences(world.model), sentences(world.theirs), f"sentences of {name}")
    expected = torch.cat(
        [sentences(world.inner(n))[i : i + 1] for i, n in enumerate(("one", "two"))]
    )
    with world.adapters.rows(["one", "two"]):
        require_close(sentences(world.model), expected, "sentences by row")


def _piped(task: str, **settings: Any) -> Way:
    def way(world: World) -> None:
        words = tokenizer()
        words.padding_side = "right"
        for name in ("one", "two"):
            models = (world.model, world.inner(name))
            with world.adapters.using(name):
                found, expected = (
                    tf.pipeline(task, model=each, tokenizer=words)(PROMPTS, **settings)
                    for each in models
                )
            require_close(_numbers(found), _numbers(expected), f"pipeline with {name}")

    return way


def _numbers(found: Any) -> Any:
    """Return all numbers of a pipeline's answer, in their order."""
    if isinstance(found, dict):
        found = [found[key] for key in sorted(found) if not isinstance(found[key], str)]
    if isinstance(found, list):
        return torch.cat([_numbers(each) for each in found])
    return torch.tensor([float(found)])


def _encoder_decoder(settings: Settings) -> Way:
    return lambda world: generates(settings, world)


def _encoded_before(world: World) -> None:
    """Generate from what the encoder said before."""
    found = []
    for model in (world.model, world.inner("one")):
        ids = inputs(world.base)["input_ids"]
        said = model.get_encoder()(input_ids=ids)
        found.append(generated(model, input_ids=ids, encoder_outputs=said))
    require(torch.equal(*found), "other tokens")


# -- other places ----------------------------------------------------------------------------------


def _offloaded(world: World) -> None:
    """Keep the weights apart from the model, and fetch them as it runs."""
    before = world.fresh()
    accelerate.cpu_offload(before, execution_device="cpu")
    adapters = regraft.attach(before, world.paths["one"], "one")
    require_close(answer(before, LLAMA).detach(), world.expected("one"), "attached afterwards")
    adapters.load_adapter(world.paths["two"], "two")
    with adapters.using("two"):
        require_close(answer(before, LLAMA).detach(), world.expected("two"), "the second one")
    accelerate.cpu_offload(world.model, execution_device="cpu")
    world.agree("offloaded afterwards")


def _offloaded_to_disk(world: World) -> None:
    model = world.fresh()
    accelerate.disk_offload(model, str(world.folder / "offload"), execution_device="cpu")
    regraft.attach(model, world.paths["one"], "one")
    require_close(answer(model, LLAMA).detach(), world.expected("one"), "on the disk")


def _dispatched(world: World) -> None:
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    model = accelerate.dispatch_model(
        world.fresh(), places, main_device="cpu", offload_dir=str(world.folder / "offload"),
        force_hooks=True,
    )  # fmt: skip
    adapters = regraft.attach(model, world.paths["one"], "one")
    require_close(answer(model, LLAMA).detach(), world.expected("one"), "dispatched")
    accelerate.hooks.remove_hook_from_submodules(model)
    adapters.detach()


def _loaded_by_a_map(world: World) -> None:
    world.plain.save_pretrained(world.folder / "base")
    model = tf.LlamaForCausalLM.from_pretrained(
        world.folder / "base", device_map={"": "cpu"}, dtype=torch.float32
    )
    regraft.attach(model.eval(), world.paths["one"])
    require_close(answer(model, LLAMA).detach(), world.expected("one"), "loaded by a map")


def _autocast(world: World) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        world.agree("autocast to bfloat16", tolerance=0.03)


def _float16(world: World) -> None:
    world.model.half()
    world.theirs.half()
    world.agree("in float16", tolerance=0.01)


def _inference(world: World) -> None:
    with torch.inference_mode():
        world.agree("in inference mode")
        with world.adapters.using("two"):
            world.agree("switched in inference mode", "two")
    world.agree("after it")


def _eager_attention(world: World) -> None:
    for kind in ("eager", "sdpa"):
        for model in (world.model, world.inner("one")):
            model.set_attn_implementation(kind)
        world.agree(f"attention: {kind}")


# -- other forms -----------------------------------------------------------------------------------


def _exported(world: World) -> None:
    """Export the graph of a model, and run it without the model."""
    ids = inputs(LLAMA)["input_ids"]
    with torch.no_grad():
        program = torch.export.export(
            world.model, (), {"input_ids": ids, "use_cache": False}, strict=False
        )
    found = program.module()(input_ids=ids, use_cache=False).logits
    require_close(found, world.expected("one"), "exported")


def _traced(world: World) -> None:
    ids = inputs(LLAMA)["input_ids"]

    class Logits(torch.nn.Module):  # type: ignore[misc]
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any) -> Any:
            return self.model(input_ids=input_ids, use_cache=False).logits

    with torch.no_grad():
        traced = torch.jit.trace(Logits(world.model), (ids,), check_trace=False)
        require_close(traced(ids), world.expected("one"), "traced")


def _compiled(world: World) -> None:
    compiled = torch.compile(world.model, backend="aot_eager")
    with torch.no_grad():
        require_close(answer(compiled, LLAMA), world.expected("one"), "compiled")
        with world.adapters.rows(["two", "one"]):
            found = answer(compiled, LLAMA)
    require_close(found[:1], world.expected("two")[:1], "compiled, a row")
    with world.adapters.disable_adapter():
        require_close(answer(compiled, LLAMA), world.expected(None), "compiled, disabled")


def _pickled(world: World) -> None:
    """Save the model object whole: it comes back as the base."""
    stored = io.BytesIO()
    torch.save(world.model, stored)
    stored.seek(0)
    loaded = torch.load(stored, weights_only=False)
    require_close(answer(loaded, LLAMA).detach(), world.expected(None), "loaded")
    world.agree("the model meanwhile")


def _functional(world: World) -> None:
    """Call the model with other weights, without changing its own."""
    changed = {name: each * 1.1 for name, each in world.plain.named_parameters()}
    found = torch.func.functional_call(world.model, changed, (), inputs(LLAMA)).logits
    other = made(LLAMA)
    other.load_state_dict(changed, strict=False)
    theirs = peft.PeftModel.from_pretrained(other, world.paths["one"]).eval()
    require_close(found.detach(), answer(theirs, LLAMA), "with other weights")


def _base_loaded_anew(world: World) -> None:
    """Load other weights into the base while adapters are on it."""
    other = made(LLAMA)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    world.model.load_state_dict(other.state_dict())
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(other), world.paths["one"]).eval()
    require_close(world.answer(), answer(theirs, LLAMA).detach(), "on other weights")


def _saliency(world: World) -> None:
    """Ask for the gradient of the answer by the input."""
    found = []
    for model in (world.model, world.inner("one")):
        vectors = world.plain.get_input_embeddings()(inputs(LLAMA)["input_ids"]).detach()
        vectors.requires_grad_()
        model(inputs_embeds=vectors).logits.square().sum().backward()
        found.append(vectors.grad)
    require_close(found[0], found[1], "gradients")


def _states(world: World) -> None:
    asked = {**inputs(LLAMA), "output_hidden_states": True}
    found, expected = (model(**asked) for model in (world.model, world.inner("one")))
    for ours, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        require_close(ours, theirs, "hidden states")


def _part(world: World) -> None:
    """Call the decoder alone, without the head."""
    found = world.model.model(**inputs(LLAMA)).last_hidden_state
    expected = world.inner("one").model(**inputs(LLAMA)).last_hidden_state
    require_close(found, expected, "the decoder alone")


HOSTING: dict[str, Callable[[], None]] = {
    "a base in 4 bits": in_world(_served, loaded=FOUR_BIT),
    "a base in 4 bits, rows": in_world(_rows, loaded=FOUR_BIT),
    "a base in 4 bits, generating": in_world(_generated_in_4_bits, loaded=FOUR_BIT),
    "a base in 4 bits, DoRA": in_world(_served, loaded=FOUR_BIT, use_dora=True),
    "a base in 8 bits": in_world(_served, loaded=EIGHT_BIT),
    "a base in 8 bits, rows": in_world(_rows, loaded=EIGHT_BIT),
    "DoRA": in_world(_served, use_dora=True),
    "DoRA, the base's weights loaded anew": in_world(_base_loaded_anew, use_dora=True),
    "the base's weights loaded anew": in_world(_base_loaded_anew),
    "images and text": in_world(_served, _base("llava")),
    "images and text, rows": in_world(_rows, _base("llava")),
    "images and text, generating": in_world(_images_generated, _base("llava")),
    "images": in_world(_served, _base("vit_classes")),
    "images, rows": in_world(_rows, _base("vit_classes")),
    "a classifier": in_world(_chosen, _base("bert_classes"), task_type="SEQ_CLS"),
    "a classifier, rows": in_world(_rows, _base("bert_classes")),
    "a classifier, pipeline": in_world(
        _piped("text-classification", top_k=None), _base("bert_classes")
    ),
    "a class for each token, pipeline": in_world(
        _piped("token-classification"), _base("bert_tokens")
    ),
    "sentence embeddings": in_world(_pooled, _base("bert_features")),
    "features, pipeline": in_world(_piped("feature-extraction"), _base("roberta_features")),
    "experts": in_world(_served, _base("mixtral"), target_parameters=["mlp.experts.down_proj"]),
    "experts, rows": in_world(_rows, _base("qwen3_moe")),
    "an embedding and the head": in_world(_served, target_modules=["embed_tokens", "lm_head"]),
    "encoder and decoder": in_world(_served, _base("t5")),
    "encoder and decoder, generating": in_world(_encoder_decoder({}), _base("t5")),
    "encoder and decoder, beams": in_world(_encoder_decoder({"num_beams": 3}), _base("bart")),
    "encoder and decoder, beams, several answers each": in_world(
        _encoder_decoder({"num_beams": 3, "num_return_sequences": 2}), _base("t5")
    ),
    "encoder and decoder, sampling": in_world(
        _encoder_decoder({"do_sample": True, "num_return_sequences": 2}), _base("bart")
    ),
    "encoder and decoder, encoded before": in_world(_encoded_before, _base("t5")),
    "offloaded by accelerate": in_world(_offloaded),
    "offloaded to the disk": in_world(_offloaded_to_disk),
    "dispatched by accelerate": in_world(_dispatched),
    "loaded by a map of devices": in_world(_loaded_by_a_map),
    "autocast": in_world(_autocast),
    "cast to float16": in_world(_float16),
    "inference mode": in_world(_inference),
    "other implementations of attention": in_world(_eager_attention),
    "exported by torch.export": in_world(_exported),
    "traced by torch.jit": in_world(_traced),
    "compiled, rows": in_world(_compiled),
    "the model pickled": in_world(_pickled),
    "called with other weights": in_world(_functional),
    "gradients of the input": in_world(_saliency),
    "hidden states": in_world(_states),
    "the decoder alone": in_world(_part),
}
"""Further ways of serving, each with its base."""
