"""Layers that were wrapped, quantised, offloaded or emptied are called, and nobody reads their weights behind them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
from helpers.checks import SAME_GRAPH, assert_close
from helpers.devices import seeded
from helpers.packages import package
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from memtrans import Attention, KNNAttention, KNNMemory, MemorizingTransformer, T5RelativePositionBias, generate

pytestmark = pytest.mark.cpu
BATCH, LENGTH, VOCABULARY = 2, 8, 30
TOKENS = torch.randint(VOCABULARY, (BATCH, 3 * LENGTH), generator=seeded(1))


def build(**options) -> MemorizingTransformer:
    torch.manual_seed(0)
    sizes = {"num_tokens": VOCABULARY, "dim": 16, "depth": 3, "dim_head": 8, "heads": 2, "memorizing_layers": (2,)}
    return MemorizingTransformer(**{**sizes, "max_knn_memories": 40, "xl_max_memories": 4, **options}).eval()


class Wrapped(nn.Module):
    """As an adapter or a packed layer is: the layer inside has another name, and there is no `weight`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x)


class Packed(nn.Module):
    """A linear layer whose `weight` is numbers of another kind and shape, unpacked for a call."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.shape, self.bias = layer.weight.shape, layer.bias
        packed = layer.weight.detach().flatten().view(torch.uint8)[:, None]
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.flatten().view(torch.float32).view(self.shape), self.bias)


def replace_all(model: nn.Module, kinds: type | tuple[type, ...], make: Callable[[nn.Module], nn.Module]) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, kinds):
                setattr(module, name, make(child))


def empty_between_calls(model: nn.Module) -> None:
    """As ZeRO-3 does: a layer's parameters have no elements but while it runs."""
    for module in model.modules():
        own = list(module._parameters.items())
        if not own:
            continue
        whole = {name: parameter.data for name, parameter in own if parameter is not None}

        def gather(module, _, whole=whole):
            for name, tensor in whole.items():
                module._parameters[name].data = tensor

        def release(module, *_, whole=whole):
            for name, tensor in whole.items():
                module._parameters[name].data = tensor.new_empty(0)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)


def parametrise(model: nn.Module) -> None:
    for module in list(model.modules()):
        if isinstance(module, nn.Linear | nn.Embedding):
            weight_norm(module)


def offload_to_disk(model: nn.Module, directory: Path) -> None:
    accelerate.disk_offload(model, str(directory), execution_device=torch.device("cpu"))


WAYS: dict[str, Callable[[nn.Module, Path], object]] = {
    "wrapped linear layers": lambda model, _: replace_all(model, nn.Linear, Wrapped),
    "wrapped embeddings": lambda model, _: replace_all(model, nn.Embedding, Wrapped),
    "wrapped norms": lambda model, _: replace_all(model, nn.LayerNorm, Wrapped),
    "packed weights": lambda model, _: replace_all(model, nn.Linear, Packed),
    "empty weights": lambda model, _: empty_between_calls(model),
    "parametrised": lambda model, _: parametrise(model),
    "offloaded to the CPU": lambda model, _: accelerate.cpu_offload(model, execution_device=torch.device("cpu")),
    "offloaded to the disk": offload_to_disk,
}


def read(model: MemorizingTransformer) -> Tensor:
    memories, cache, logits = model.create_knn_memories(batch_size=BATCH, device="cpu"), None, []
    with torch.no_grad():
        for x in TOKENS.split(LENGTH, dim=1):  # quantised embeddings take contiguous ids
            out, cache = model(x.contiguous(), memories, cache)
            logits.append(out)
    assert memories[0].lengths.tolist() == [3 * LENGTH - 4] * BATCH
    return torch.stack(logits)


@pytest.mark.parametrize("way", WAYS)
def test_22_8_a_model_reads_and_writes_the_same_whatever_its_layers_became(way: str, tmp_path: Path) -> None:
    model = build(memory_offset=0.5)
    expected, text = read(model), generate(model, TOKENS, tokens=12, segment=LENGTH, temperature=0)
    WAYS[way](model, tmp_path)
    assert_close(read(model), expected, SAME_GRAPH)
    assert torch.equal(generate(model, TOKENS, tokens=12, segment=LENGTH, temperature=0), text)


@pytest.mark.parametrize("way", [way for way in WAYS if "embeddings" not in way])
def test_22_8_so_does_a_memorizing_layer_by_itself(way: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    attention, x = KNNAttention(dim=16, heads=2, dim_head=8, gate_output=True), torch.randn(2, LENGTH, 16)
    attention.output_gate.data.fill_(1.0)

    def twice(layer: nn.Module) -> Tensor:
        memory = KNNMemory(dim=8, max_memories=20, num_indices=2)
        with torch.no_grad():
            return torch.stack([layer(x, knn_memory=memory)[0] for _ in range(2)])

    expected = twice(attention)
    WAYS[way](attention, tmp_path)
    assert_close(twice(attention), expected, SAME_GRAPH)


@pytest.mark.parametrize("kind", [nn.Linear, (nn.Linear, nn.Embedding)])
def test_22_8_dynamically_quantised_layers_have_no_weight_to_read(kind) -> None:
    model = build(dim=64)
    expected, kinds = read(model), {nn.Linear: torch.ao.quantization.default_dynamic_qconfig}
    if kind is not nn.Linear:
        kinds[nn.Embedding] = torch.ao.quantization.float_qparams_weight_only_qconfig
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), kinds)
    assert not isinstance(quantised.to_logits[1], nn.Linear)
    logits = read(quantised)
    assert not torch.equal(logits, expected)
    assert nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.99
    assert generate(quantised, TOKENS, tokens=4, segment=LENGTH).shape == (BATCH, 4)


def test_22_8_a_wrong_input_is_still_refused_by_name_where_the_layer_is_torchs_own() -> None:
    layer = Attention(dim=16, heads=2, dim_head=8)
    with pytest.raises(TypeError, match=r"x must be torch.float32 like the weights .*, got torch.float64"):
        layer(torch.randn(1, 4, 16, dtype=torch.float64))
    layer.to_q = Wrapped(layer.to_q)
    with pytest.raises(RuntimeError):  # the layer inside judges
        layer(torch.randn(1, 4, 16, dtype=torch.float64))


def test_22_8_a_bias_without_weights_of_its_own_gives_its_table() -> None:
    bias = T5RelativePositionBias(scale=1.0, heads=2)
    expected = bias(3, 5)
    bias.relative_attention_bias = Wrapped(bias.relative_attention_bias)
    assert torch.equal(bias(3, 5), expected)


@pytest.mark.parametrize(
    "head", [nn.Linear(16, 5), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 5)), nn.Sequential(nn.LayerNorm(16))]
)
def test_22_8_a_replaced_head_is_called_and_has_no_embeddings_to_return(head: nn.Module) -> None:
    model = build(memorizing_layers=(), xl_max_memories=0)
    model.to_logits = head
    classes = head(torch.zeros(1, 16)).shape[-1]
    assert model(TOKENS).shape == (BATCH, 3 * LENGTH, classes)
    model(TOKENS, labels=TOKENS % classes).backward()
    with pytest.raises(ValueError, match=r"return_embeddings must be False beside a to_logits that is not the model's"):
        model(TOKENS, return_embeddings=True)


def test_22_8_a_refused_call_for_embeddings_leaves_the_memory_as_it_was() -> None:
    model = build(xl_max_memories=0)
    memories, model.to_logits = model.create_knn_memories(batch_size=BATCH), Wrapped(model.to_logits)
    with pytest.raises(ValueError, match=r"return_embeddings must be False .*, got Wrapped"):
        model(TOKENS, memories, return_embeddings=True)
    assert memories[0].lengths.tolist() == [0] * BATCH


def test_22_8_hooks_of_the_head_fire() -> None:
    model, fired = build(memorizing_layers=(), xl_max_memories=0), []
    model.to_logits.register_forward_hook(lambda *_: fired.append("head"))
    model(TOKENS)
    assert fired == ["head"]


def test_22_8_an_offloaded_model_is_not_saved_without_its_numbers(tmp_path: Path) -> None:
    model = build()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"must hold its weights to be saved, got token_emb\.weight.* offloaded"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------- bitsandbytes, on the CPU


def in_four_bits(layer: nn.Linear) -> nn.Module:
    bits = package("bitsandbytes").nn
    packed = bits.Linear4bit(
        layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=torch.float32, quant_type="nf4"
    )
    packed.weight = bits.Params4bit(layer.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    packed.bias = layer.bias
    # Its own arithmetic on CPUs that have it takes widths of multiples of 32 alone, and rounds to bfloat16.
    packed.support_avx512bf16_for_cpu = False
    return packed.to("cpu")  # which packs


def in_eight_bits(layer: nn.Linear) -> nn.Module:
    bits = package("bitsandbytes").nn
    packed = bits.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False, threshold=6.0
    )
    packed.weight = bits.Int8Params(layer.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    packed.bias = layer.bias
    return packed.to("cpu")


def unpacked(model: nn.Module) -> MemorizingTransformer:
    """A model of plain layers with the weights that 4-bit ones stand for."""
    plain, functional = build(dim=64), package("bitsandbytes").functional
    layers = dict(plain.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, package("bitsandbytes").nn.Linear4bit):
            layers[name].weight.data = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return plain


@pytest.mark.slow
def test_22_8_four_bits_of_bitsandbytes_read_and_write_as_the_weights_that_they_stand_for() -> None:
    model = build(dim=64)
    before = read(model)
    replace_all(model, nn.Linear, in_four_bits)
    assert model.to_logits[1].weight.dtype == torch.uint8
    expected = unpacked(model)
    assert not torch.equal(read(expected), before)
    assert_close(read(model), read(expected), SAME_GRAPH)
    texts = [generate(each, TOKENS, tokens=12, segment=LENGTH, temperature=0) for each in (model, expected)]
    assert torch.equal(*texts)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_22_8_eight_bits_of_bitsandbytes_are_read_and_written_with() -> None:
    model = build(dim=64)
    expected = read(model)
    replace_all(model, nn.Linear, in_eight_bits)
    logits = read(model)
    assert not torch.equal(logits, expected)
    assert nn.functional.cosine_similarity(logits.flatten(), expected.flatten(), dim=0) > 0.99
    assert generate(model, TOKENS, tokens=4, segment=LENGTH).shape == (BATCH, 4)


@pytest.mark.slow
def test_22_8_adapters_learn_beside_four_bits() -> None:
    """As QLoRA has it: what is packed stays, low-rank matrices beside it learn."""
    model = build(dim=64)
    replace_all(model, nn.Linear, in_four_bits)
    model.is_loaded_in_4bit = True
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["to_q", "to_kv", "to_out"], lora_alpha=8))
    layer = adapted.base_model.model.layers[1][0].fn.to_q
    packed = layer.base_layer.weight.clone()
    moving, losses = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=1e-2), []
    for _ in range(8):
        memories, cache = model.create_knn_memories(batch_size=BATCH), None
        first, second, _ = TOKENS.split(LENGTH, dim=1)
        _, cache = adapted(first, memories, cache)
        loss, _ = adapted(second, memories, cache, labels=second.roll(-1, 1))
        loss.backward()
        moving.step()
        moving.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] and torch.equal(layer.base_layer.weight, packed)
