"""Generation: reproducible, row by row what each prompt gets alone, and clear about what it does not take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.devices import DEVICE, default_dtype, seeded

from memtrans import MemorizingTransformer, generate
from memtrans.generation.decoder import Decoder
from memtrans.generation.generate import stream
from memtrans.generation.sampling import NoTokenError, Sampling, check_chosen

pytestmark = pytest.mark.device

SEGMENT, VOCABULARY = 8, 40
OPTIONS = [{"temperature": 0}, {"temperature": -1.0}, {"seed": 3}, {"top_k": 5, "top_p": 0.7}]
PROMPTS = [list(range(2, 31)), [5, 6, 7], list(range(2, 18))]


def build(**options) -> MemorizingTransformer:
    torch.manual_seed(0)
    small = {"num_tokens": VOCABULARY, "dim": 16, "depth": 3, "dim_head": 8, "heads": 2, "memorizing_layers": (2,)}
    return MemorizingTransformer(**{**small, "max_knn_memories": 50, "xl_max_memories": 6, **options})


@pytest.mark.parametrize(
    "options", [{"temperature": 0}, {"temperature": -1.0}, {"seed": 3}, {"top_k": 5, "top_p": 0.7}]
)
def test_a_batch_gives_each_row_what_it_gets_alone(options):
    model = build()
    together = generate(model, PROMPTS, 30, segment=SEGMENT, **options)
    assert together.shape == (3, 30)
    for row, prompt in enumerate(PROMPTS):
        alone = generate(model, prompt, 30, segment=SEGMENT, **{**options, "seed": options.get("seed", 0) + row})
        assert together[row].tolist() == alone[0].tolist()


def test_greedy_tokens_are_the_likeliest_of_a_forward_over_the_whole_text():
    model = build().eval()
    prompt = torch.tensor(PROMPTS[2])
    new = generate(model, prompt, 7, temperature=0, segment=SEGMENT)
    memories, caches = model.create_knn_memories(batch_size=1), None
    for segment in torch.cat((prompt[None], new), dim=1)[:, :23].split(SEGMENT, dim=1):
        logits, caches = model(segment, memories, caches)
    assert logits.argmax(dim=-1)[0].tolist() == [*new[0].tolist()[1:], int(logits[0, -1].argmax())]


def test_the_seed_determines_the_tokens_and_more_tokens_begin_with_the_same_ones():
    model = build()
    first, again, longer, other = (
        generate(model, PROMPTS[0], count, segment=SEGMENT, seed=seed).tolist()[0]
        for count, seed in ((20, 1), (20, 1), (40, 1), (20, 2))
    )
    assert first == again == longer[:20]
    assert first != other


def test_a_row_ends_with_its_stop_token_and_the_result_with_the_last_row():
    model = build()
    free = generate(model, PROMPTS, 30, segment=SEGMENT).tolist()
    stop = free[0][10]
    stopped = generate(model, PROMPTS, 30, segment=SEGMENT, stop=stop).tolist()
    ends = [row.index(stop) if stop in row else 29 for row in free]
    for row, end in enumerate(ends):
        assert stopped[row][: end + 1] == free[row][: end + 1]
        assert set(stopped[row][end + 1 :]) <= {stop}
    assert len(stopped[0]) == max(ends) + 1


@pytest.mark.parametrize("empty", ["", b"", [], torch.tensor([], dtype=torch.int64)])
def test_an_empty_prompt_stands_for_the_start_token(empty):
    assert torch.equal(generate(build(), empty, 5), generate(build(), [0], 5))
    assert torch.equal(generate(build(), empty, 5, start=9), generate(build(), [9], 5))
    model = build(clear_memories_on_sos_token_id=7)
    assert torch.equal(generate(model, empty, 5), generate(model, [7], 5))
    assert torch.equal(generate(model, [empty, [3, 4]], 5), generate(model, [[7], [3, 4]], 5))


def test_a_prompt_may_be_ids_bytes_or_text_one_or_several():
    model = build(num_tokens=256)
    expected = generate(model, list("né".encode()), 4).tolist()
    for prompt in ("né", "né".encode(), torch.tensor(list("né".encode())), ["né"], torch.tensor([[110, 195, 169]])):
        assert generate(model, prompt, 4).tolist() == expected
    assert generate(model, torch.ones(3, 4, dtype=torch.int32), 4).shape == (3, 4)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.uint16])
def test_a_prompt_may_be_arrays_of_numpy(dtype):
    model = build()
    first, second = (np.array(prompt, dtype=dtype) for prompt in PROMPTS[:2])
    second.flags.writeable = False
    expected = generate(model, PROMPTS[:2], 4)
    assert torch.equal(generate(model, [first, second], 4), expected)
    assert torch.equal(generate(model, second, 4), generate(model, PROMPTS[1], 4))
    assert torch.equal(generate(model, list(second), 4), generate(model, PROMPTS[1], 4))
    assert torch.equal(generate(model, np.stack([second, second]), 4), generate(model, [PROMPTS[1]] * 2, 4))


def test_the_wrapper_of_a_model_is_refused_with_what_to_give_instead():
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(TypeError, match=r"model must be a Mem.*, got a Wrapper around one: give its model\.module"):
        generate(Wrapper(build()), [1], 2)
    with pytest.raises(TypeError, match=r"give its model\.module"):
        Decoder(Wrapper(build()), 1)


def test_what_was_read_and_written_stays_in_the_memories_that_were_given():
    model = build(xl_max_memories=0)
    memories = model.create_knn_memories(batch_size=1)
    generate(model, PROMPTS[0], 4, segment=SEGMENT, memories=memories)
    assert memories[0].lengths.tolist() == [32], "29 of the prompt, 3 new ones; the last one was not read"


def test_the_model_stays_in_the_mode_that_it_was_in_and_dropout_is_off():
    model = build(attn_dropout=0.5, ff_dropout=0.5)
    assert torch.equal(generate(model, PROMPTS, 10), generate(model, PROMPTS, 10))
    assert model.training
    model.eval()
    generate(model, PROMPTS, 1)
    assert not model.training


def test_a_layer_that_was_kept_from_training_still_is():
    model = build().train()
    model.layers[0].eval()
    generate(model, PROMPTS, 1)
    assert model.layers[1].training and not model.layers[0].training


def test_a_stream_yields_what_generate_returns():
    model = build().eval()
    decoder = Decoder(model, 3, segment=SEGMENT)
    decoder.read([torch.tensor(prompt) for prompt in PROMPTS])
    tokens = torch.stack(list(stream(decoder, 12, Sampling(seed=5))), dim=1)
    assert torch.equal(tokens, generate(model, PROMPTS, 12, seed=5, segment=SEGMENT))


@torch.no_grad()
def test_after_rows_have_stopped_a_stream_goes_on_as_for_rows_that_read_the_same():
    model = build().eval()
    stop = generate(model, PROMPTS, 20, segment=SEGMENT).tolist()[0][10]
    decoder, other = (Decoder(model, 3, segment=SEGMENT) for _ in range(2))
    decoder.read([torch.tensor(prompt) for prompt in PROMPTS])
    written = torch.stack(list(stream(decoder, 20, stop=stop)), dim=1).tolist()
    read = [row[: row.index(stop)] if stop in row else row[:-1] for row in written]
    assert len({len(row) for row in read}) == 3, "rows stop at different places"
    other.read([torch.tensor(prompt + row) for prompt, row in zip(PROMPTS, read, strict=True)])
    for _ in range(2):  # the second one begins behind what the first one left
        tokens, expected = (list(stream(of, 30, Sampling(temperature=0))) for of in (decoder, other))
        assert torch.equal(torch.stack(tokens), torch.stack(expected))


def test_a_captured_step_gives_what_the_same_step_gives_call_by_call():
    """On a GPU; elsewhere nothing is captured. Rows end segments and stop in the middle of it."""
    model = build().eval()
    stop = generate(model, PROMPTS, 20, segment=SEGMENT).tolist()[1][15]
    found = []
    for capture in (True, False):
        decoder = Decoder(model, 3, segment=SEGMENT)
        decoder.read([torch.tensor(prompt) for prompt in PROMPTS])
        tokens = list(stream(decoder, 40, Sampling(), stop, capture=capture))
        found.append((torch.stack(tokens).tolist(), decoder.logits, decoder.memories[0].lengths.tolist()))
    (tokens, logits, lengths), (plain_tokens, plain_logits, plain_lengths) = found
    assert (tokens, lengths) == (plain_tokens, plain_lengths)
    assert torch.equal(logits, plain_logits)


# ----------------------------------------------------------------------------------------------------------- sampling


def drawn(sampling: Sampling, logits: torch.Tensor, count: int = 4000) -> torch.Tensor:
    """How often each token was drawn (V,)."""
    draws = torch.rand(count, generator=seeded(0))
    tokens = sampling.choose(logits.expand(count, -1), draws)
    return torch.bincount(tokens, minlength=len(logits)) / count


LOGITS = [1.0, 3.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3]),
        (Sampling(temperature=0.5), [0, 1, 2, 3]),
        (Sampling(top_k=2), [1, 3]),
        (Sampling(top_k=100), [0, 1, 2, 3]),
        (Sampling(top_p=1.0), [0, 1, 2, 3]),
        (Sampling(top_p=0.7), [1, 3]),  # the likeliest has 0.64
        (Sampling(top_p=0.6), [1]),
        (Sampling(top_p=1e-9), [1]),
        (Sampling(top_p=5e-324), [1]),
        (Sampling(temperature=2.0, top_p=0.7), [1, 3]),  # 0.45, 0.28
        (Sampling(top_k=1), [1]),
    ],
)
def test_tokens_are_drawn_as_often_as_their_probability_says(sampling, kept):
    logits = torch.tensor(LOGITS)
    expected = torch.zeros(4)
    expected[kept] = (logits / sampling.temperature).softmax(dim=0)[kept]
    assert (drawn(sampling, logits) - expected / expected.sum()).abs().max() < 0.03


def test_the_largest_draw_takes_a_token_that_is_allowed():
    logits = torch.randn(50, 300, generator=seeded(1))
    almost_one = torch.full((50,), 1 - 2**-24)
    for sampling in (Sampling(), Sampling(top_p=0.5), Sampling(top_k=7)):
        token = sampling.choose(logits, almost_one)
        rank = (logits > logits.gather(1, token[:, None])).sum(dim=1)
        assert (rank < (sampling.top_k or 300)).all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=1.0), Sampling(top_k=4900)])
def test_no_draw_takes_a_banned_token(sampling):
    logits = torch.randn(40, 5000, generator=seeded(1))
    logits[:, ::3] = -torch.inf
    for steps in range(1, 6):  # below 1
        token = sampling.choose(logits, torch.full((40,), 1 - steps * 2**-24))
        assert logits.gather(1, token[:, None]).isfinite().all()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.5), Sampling(top_p=1e-50), Sampling(top_k=1)])
def test_the_smallest_draw_takes_the_likeliest_token(sampling):
    logits = torch.randn(40, 5, generator=seeded(1))
    assert torch.equal(sampling.choose(logits, torch.zeros(40)), logits.argmax(dim=1))


def test_draws_of_a_row_are_those_of_a_single_row_with_its_own_seed():
    draws = Sampling(seed=4).draws(3, 50, torch.device(DEVICE))
    for row in range(3):
        assert torch.equal(draws[row], Sampling(seed=4 + row).draws(1, 50, torch.device(DEVICE))[0])
    assert draws.min() >= 0 and draws.max() < 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"prompt": [VOCABULARY]}, IndexError, r"prompt must be token ids in \[0, 40\), got 40"),
        ({"prompt": "text"}, IndexError, r"prompt must be token ids in \[0, 40\), got 116"),
        ({"start": 99}, ValueError, r"start must be a token id in \[0, 40\), got 99"),
        ({"stop": 40}, ValueError, r"stop must be a token id in \[0, 40\), got 40"),
        ({"stop": b"."}, TypeError, r"stop must be an integer, got b'.'"),
        ({"top_k": 2.5}, TypeError, "top_k must be an integer, got 2.5"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"temperature": "hot"}, ValueError, "temperature must be finite, got 'hot'"),
        (
            {"prompt": torch.ones(3)},
            ValueError,
            r"texts of token ids \(P,\), got torch.float32 \(3,\)",
        ),
        ({"prompt": torch.ones(3, dtype=torch.bool)}, ValueError, r"token ids \(P,\), got torch.bool \(3,\)"),
        ({"prompt": [[1, 2.5]]}, TypeError, "a token id of prompt must be an integer, got 2.5"),
        ({"prompt": [1, 2.5]}, TypeError, "a token id of prompt must be an integer, got 2.5"),
        ({"prompt": [1, True]}, TypeError, "a token id of prompt must be an integer, got True"),
        ({"prompt": [[1], None]}, TypeError, "prompt must be a text .* or a sequence of texts, got None"),
        ({"prompt": None}, TypeError, "prompt must be a text .* or a sequence of texts, got None"),
        ({"prompt": 5}, TypeError, "prompt must be a text .* or a sequence of texts, got 5"),
        ({"prompt": [[[1]]]}, TypeError, r"a token id of prompt must be an integer, got \[1\]"),
        ({"prompt": np.ones(3)}, ValueError, r"texts of token ids \(P,\), got torch.float64 \(3,\)"),
        ({"prompt": np.array(["a"])}, TypeError, r"texts of token ids \(P,\), got an array of <U1"),
        ({"prompt": torch.ones(1, 1, 1).long()}, ValueError, r"prompt must hold texts of token ids .* \(1, 1, 1\)"),
        ({"prompt": torch.ones(0, 5).long()}, ValueError, "prompt must hold at least one text, got none"),
        ({"tokens": 0}, ValueError, "tokens must be at least 1, got 0"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
        ({"top_p": float("nan")}, ValueError, r"top_p must be in \(0, 1\], got nan"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
        ({"temperature": float("inf")}, ValueError, "temperature must be finite, got inf"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\*\*63\), got -1"),
        ({"segment": 0}, ValueError, "segment must be at least 1, got 0"),
    ],
)
def test_a_wrong_option_names_argument_value_and_expectation(options, error, message):
    model = build()
    with pytest.raises(error, match=message):
        generate(model, **{"prompt": [1, 2], "tokens": 3, **options})
    assert model.training


def broken(how: str) -> MemorizingTransformer:
    model = build()
    with torch.no_grad():
        if how == "a weight that is no number":
            model.layers[0][1].fn.net[0].weight[0, 0] = float("nan")
        elif how == "an infinite logit":
            model.to_logits[1].bias[3] = float("inf")
        else:
            model.to_logits[1].bias.fill_(-float("inf"))
    return model


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("how", ["a weight that is no number", "an infinite logit", "every token banned"])
def test_21_12_logits_that_name_no_token_are_refused_with_the_token(how, options):
    with pytest.raises(NoTokenError, match=r"logits must name a next token, .* at token 0 of rows \[0, 1, 2\]"):
        generate(broken(how).to(DEVICE), PROMPTS, 5, segment=SEGMENT, **options)


def test_21_12_a_memory_that_holds_no_numbers_is_refused_for_its_row_alone():
    model = build().to(DEVICE)
    memories = model.create_knn_memories(batch_size=3, device=DEVICE, dtype=torch.float32, spare=SEGMENT)
    Decoder(model.eval(), 3, segment=SEGMENT, memories=memories).read([torch.arange(2, 31)] * 3)
    memories[0]._ring.values[1] = float("nan")
    with pytest.raises(NoTokenError, match=r"at token 0 of rows \[1\]"):
        generate(model, PROMPTS, 20, segment=SEGMENT, memories=memories)


@pytest.mark.parametrize("options", OPTIONS)
def test_21_12_a_token_that_fails_later_is_named_by_its_number(options):
    decoder = Decoder(build().eval().to(DEVICE), 2, segment=SEGMENT)
    decoder.read([torch.arange(2, 7)] * 2)
    tokens = []
    for token in stream(decoder, 6, Sampling(**options)):
        tokens.append(token)
        if len(tokens) == 3:
            decoder.model.token_emb.weight.data.fill_(float("nan"))
    with pytest.raises(NoTokenError, match=r"at token 3 of rows \[0, 1\]"):
        check_chosen(torch.stack(tokens, dim=1))


def test_21_12_some_banned_tokens_and_the_coldest_temperature_are_fine():
    logits = torch.tensor([[-float("inf"), 3.0, 1.0]])
    for sampling in (Sampling(temperature=0), Sampling(temperature=1e-40), Sampling(temperature=5e-324)):
        assert sampling.choose(logits, torch.tensor([0.5])).tolist() == [1]


@pytest.mark.parametrize("options", OPTIONS)
def test_21_16_a_default_dtype_of_bfloat16_generates_what_the_model_in_bfloat16_does(options):
    model = build().to(DEVICE, torch.bfloat16)
    expected = generate(model, PROMPTS, 12, segment=SEGMENT, **options)
    with default_dtype(torch.bfloat16):
        assert torch.equal(generate(model, PROMPTS, 12, segment=SEGMENT, **options), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"tokens": -1}, "tokens must be at least 0, got -1"), ({"stop": VOCABULARY}, "stop must be a token id")],
)
def test_a_stream_refuses_what_generate_refuses(options, message):
    decoder = Decoder(build().eval(), 1)
    with pytest.raises(ValueError, match=message):
        next(stream(decoder, **{"tokens": 3, **options}))
    assert not list(stream(decoder, 0))
