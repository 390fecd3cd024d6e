"""Rows of tokens: what is supervised, what is packed, and that packed examples do not see each other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from lisa_kernels.errors import InputError
from lisa_kernels.train.models import train_tokenizer
from lisa_kernels.train.records import Records
from lisa_kernels.train.tokenize import (
    IGNORED,
    TokenizedData,
    accepts_position_ids,
    collate,
    isolates_packed_examples,
    pad_token_id,
    preview,
    split_records,
    tokenize_records,
    tokenize_split,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# like Qwen 3: an empty reasoning block is written before the last answer only
LAST_ONLY = CHATML.replace(
    "m['role'] + '\n' +", "m['role'] + '\n' + ('<think></think>' if loop.last and m['role'] == 'assistant' else '') +"
)
TAGGED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}A: {% generation %}{{ m['content'] + '.' }}"
    "{% endgeneration %}{% else %}U: {{ m['content'] }}{% endif %}\n{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Bé brief."},
    {"role": "user", "content": "Hallo wörld?"},
    {"role": "assistant", "content": "Ünder way"},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": " done "},
]


@pytest.fixture
def tokenizer() -> Any:
    return train_tokenizer(["the prompt and the answer, done. Hallo <|im_start|>assistant user system"] * 9, 300)


def text(*items: str) -> Records:
    return Records("text", list(items), "memory")


def prompts(*pairs: tuple[str, str]) -> Records:
    return Records("prompt", [{"prompt": p, "completion": c} for p, c in pairs], "memory")


def supervised_text(row: dict[str, torch.Tensor], tokenizer: Any) -> str:
    return str(tokenizer.decode([label for label in row["labels"].tolist() if label != IGNORED]))


class TestSplit:
    def test_documents_are_drawn_by_seed_and_every_one_lands_in_exactly_one_part(self) -> None:
        records = text(*(f"document {n}" for n in range(40)))
        trained, held = split_records(records, 0.1, seed=3)
        assert len(held) == 4
        assert sorted([*trained.items, *held.items]) == sorted(records.items)
        assert held.items == split_records(records, 0.1, seed=3)[1].items
        assert held.items != split_records(records, 0.1, seed=4)[1].items
        assert trained.items == [item for item in records.items if item not in held.items]

    def test_too_few_texts_are_cut_by_position_whatever_the_seed(self) -> None:
        trained, held = split_records(text("a" * 50, "b" * 40, "c" * 10), 0.2, seed=1)
        assert (trained.items, held.items) == (["a" * 50, "b" * 30], ["b" * 10, "c" * 10])
        assert split_records(text("0123456789"), 0.2, seed=9)[1].items == ["89"]

    def test_few_prompts_hold_out_one_and_a_single_prompt_is_refused(self) -> None:
        trained, held = split_records(prompts(("a", "b"), ("c", "d"), ("e", "f")), 0.01, seed=0)
        assert (len(trained), len(held)) == (2, 1)
        with pytest.raises(InputError, match="one example"):
            split_records(prompts(("a", "b")), 0.01, seed=0)

    def test_zero_holds_nothing_out(self) -> None:
        trained, held = split_records(text("a"), 0.0, seed=0)
        assert (trained.items, held.items, held.kind) == (["a"], [], "text")

    @pytest.mark.parametrize("fraction", [-0.1, 0.51, float("nan")])
    def test_a_fraction_outside_its_range_is_refused(self, fraction: float) -> None:
        with pytest.raises(InputError, match=r"outside 0 to 0\.5"):
            split_records(text("a"), fraction, seed=0)

    def test_a_text_too_short_to_split_is_refused(self) -> None:
        with pytest.raises(InputError, match="too few"):
            split_records(text("a"), 0.1, seed=0)


class TestText:
    def test_documents_are_joined_by_the_end_token_into_full_rows(self, tokenizer: Any) -> None:
        data = tokenize_records(text("the prompt", "answer", "done. " * 20), tokenizer, seq_len=8)
        stream = torch.cat([row["input_ids"] for row in data.rows]).tolist()
        joined = tokenizer.encode("the prompt<|endoftext|>answer<|endoftext|>" + "done. " * 20)
        assert stream == joined[: len(joined) // 8 * 8]
        assert {len(row["input_ids"]) for row in data.rows} == {8}
        assert all(torch.equal(row["labels"], row["input_ids"]) and len(row) == 2 for row in data.rows)
        assert (data.tokens, data.supervised_tokens, data.examples) == (8 * len(data), 7 * len(data), 3)

    def test_a_remainder_stays_when_it_is_all_there_is(self, tokenizer: Any) -> None:
        data = tokenize_records(text("the xyz"), tokenizer, seq_len=512)
        assert tokenizer.decode(data[0]["input_ids"]) == "the xyz"

    def test_a_begin_token_that_the_tokenizer_adds_stands_before_every_document(self, tokenizer: Any) -> None:
        from tokenizers.processors import TemplateProcessing

        tokenizer.add_special_tokens({"bos_token": "<s>"})
        begin = tokenizer.bos_token_id
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", begin)]
        )
        ids = tokenize_records(text("the", "the"), tokenizer, seq_len=512)[0]["input_ids"].tolist()
        one = tokenizer.encode("the", add_special_tokens=False)
        assert ids == [begin, *one, tokenizer.eos_token_id, begin, *one]
        pair = tokenize_records(prompts(("the", "the")), tokenizer, seq_len=512)[0]["input_ids"].tolist()
        assert pair == [begin, *one, *one, tokenizer.eos_token_id]

    def test_one_token_predicts_nothing_and_is_refused(self, tokenizer: Any) -> None:
        with pytest.raises(InputError, match="only 1 tokens"):
            tokenize_records(text("a"), tokenizer, seq_len=8)
        with pytest.raises(InputError, match="sequence length 1"):
            tokenize_records(text("the prompt"), tokenizer, seq_len=1)

    def test_nothing_held_out_makes_no_rows(self, tokenizer: Any) -> None:
        data = tokenize_records(text(), tokenizer, seq_len=8)
        assert (len(data), data.max_token_id) == (0, -1)


class TestPrompts:
    def test_only_the_completion_and_its_end_token_are_supervised(self, tokenizer: Any) -> None:
        data = tokenize_records(prompts(("the prompt", " answer")), tokenizer, 64, packing=False)
        prompt, answer = (tokenizer.encode(part) for part in ("the prompt", " answer"))
        end = tokenizer.eos_token_id
        assert data[0]["input_ids"].tolist() == [*prompt, *answer, end]
        assert data[0]["labels"].tolist() == [IGNORED] * len(prompt) + [*answer, end]
        assert data.supervised_tokens == len(answer) + 1
        assert "position_ids" not in data[0]

    def test_a_long_example_is_cut_on_the_right_or_dropped_and_counted(self, tokenizer: Any) -> None:
        records = prompts(("the", "z" * 90), ("z" * 90, "the"), ("the", "a"))
        data = tokenize_records(records, tokenizer, 16, packing=False)
        assert (len(data), data.examples, data.truncated, data.dropped) == (2, 2, 1, 1)
        assert len(data[0]["input_ids"]) == 16
        assert data.rows[0]["labels"][-1] != IGNORED
        assert data.notes == [
            "2 of 3 rows are longer than --seq-len 16 and are cut: 1 answers lose their end, 1 rows have nothing left"
            " to learn and are left out"
        ]

    def test_prompts_longer_than_the_row_are_an_early_error(self, tokenizer: Any) -> None:
        with pytest.raises(InputError, match=r"--seq-len 16 or longer \(the shortest has 20 tokens\); give a longer"):
            tokenize_records(prompts(("z" * 30, "a"), ("z" * 20, "b")), tokenizer, 16)

    def test_packing_puts_whole_examples_side_by_side_without_labels_across_borders(self, tokenizer: Any) -> None:
        pairs = [("", "z" * 9), ("xy", "z" * 12), ("", "y"), ("x", "yy")]
        packed = tokenize_records(prompts(*pairs), tokenizer, 16)
        alone = tokenize_records(prompts(*pairs), tokenizer, 16, packing=False)
        assert [len(row["input_ids"]) for row in packed.rows] == [10 + 2 + 4, 15]
        assert packed[0]["position_ids"].tolist() == [*range(10), *range(2), *range(4)]
        order = [alone[0], alone[2], alone[3]]
        for name in ("input_ids", "labels"):
            assert torch.equal(packed[0][name], torch.cat([row[name] for row in order]))
        assert all(row["labels"][0] == IGNORED for row in alone.rows)
        assert packed.supervised_tokens == alone.supervised_tokens == 9 + 13 + 1 + 3


class TestConversations:
    @pytest.mark.parametrize("packing", [True, False])
    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            (CHATML, "Ünder way<|im_end|> done <|im_end|>"),
            (TAGGED, "Ünder way. done ."),
            (LAST_ONLY, "Ünder way<|im_end|><think></think> done <|im_end|>"),
            (None, "Ünder way<|endoftext|> done <|endoftext|>"),
        ],
        ids=["growing-prefix", "generation-tags", "last-answer-differs", "no-template"],
    )
    def test_what_the_assistant_says_and_its_end_marker_are_supervised(
        self, template: str | None, expected: str, packing: bool, tokenizer: Any
    ) -> None:
        tokenizer.chat_template = template
        data = tokenize_records(Records("messages", [CHAT], "memory"), tokenizer, 512, packing)
        assert supervised_text(data[0], tokenizer) == expected
        whole = tokenizer.decode(data[0]["input_ids"])
        assert "Hallo wörld?" in whole
        assert [note for note in data.notes if "no chat template" in note] == data.notes
        assert bool(data.notes) == (template is None)

    def test_blanks_stay_where_they_are_the_end_marker(self, tokenizer: Any) -> None:
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
        data = tokenize_records(Records("messages", [CHAT[1:3]], "memory"), tokenizer, 512)
        assert supervised_text(data[0], tokenizer) == "Ünder way\n<|endoftext|>"
        assert any("no end marker" in note for note in data.notes)

    @pytest.mark.parametrize(
        ("template", "said"),
        [
            ("{% for m in messages %}{{ m['content']|length }} {{ m['content'] }}{% endfor %}", "depends on its text"),
            ("{{ raise_exception('roles must alternate') }}", "refuses conversation 1: roles must alternate"),
        ],
        ids=["length-before-text", "template-raises"],
    )
    def test_a_template_that_does_not_serve_is_explained(self, template: str, said: str, tokenizer: Any) -> None:
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=said):
            tokenize_records(Records("messages", [CHAT], "memory"), tokenizer, 512)

    def test_an_opening_assistant_turn_is_learnt_without_its_header(self, tokenizer: Any) -> None:
        tokenizer.chat_template = CHATML
        data = tokenize_records(Records("messages", [CHAT[2:4]], "memory"), tokenizer, 512)
        assert supervised_text(data[0], tokenizer) == "Ünder way<|im_end|>"

    def test_a_slow_tokenizer_is_refused(self) -> None:
        class SlowTokenizer:
            is_fast = False

        with pytest.raises(InputError, match="SlowTokenizer is a slow one"):
            tokenize_records(Records("messages", [CHAT], "memory"), SlowTokenizer(), 512)

    def test_a_template_that_marks_nothing_is_an_early_error(self, tokenizer: Any) -> None:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m['content'] }}{% endfor %}"
            "{% if false %}{% generation %}x{% endgeneration %}{% endif %}"
        )
        with pytest.raises(InputError, match="tags mark nothing"):
            tokenize_records(Records("messages", [CHAT], "memory"), tokenizer, 512)


class TestEdges:
    def test_a_pair_is_encoded_as_the_one_text_that_a_model_meets(self) -> None:
        """A tokenizer that puts a blank before each text puts none between prompt and completion."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words = Tokenizer(models.WordLevel({"▁ab": 1, "▁cd": 2, "▁a": 3, "abcd": 4, "▁abcd": 5, "</s>": 0}, "</s>"))
        words.pre_tokenizer = pre_tokenizers.Metaspace()
        spaced = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        row = tokenize_records(prompts(("ab", "cd")), spaced, 16)[0]
        # the token that holds the end of the prompt and the answer is learnt
        assert row["input_ids"].tolist() == [5, 0]
        apart = tokenize_records(prompts(("ab ", "cd")), spaced, 16)[0]
        assert (apart["input_ids"].tolist(), apart["labels"].tolist()) == ([1, 2, 0], [IGNORED, 2, 0])

    def test_an_answer_of_weight_0_is_not_learnt_in_templates_of_both_sorts(self, tokenizer: Any) -> None:
        chat = [CHAT[1], {**CHAT[2], "weight": 0}, CHAT[3], {"role": "assistant", "content": "done"}]
        for template in (CHATML, TAGGED):
            tokenizer.chat_template = template
            data = tokenize_records(Records("messages", [chat], "memory"), tokenizer, 512)
            assert supervised_text(data[0], tokenizer).strip() == ("done<|im_end|>" if template == CHATML else "done.")
            assert "1 answers are marked as not to be learnt" in data.notes

    def test_text_that_a_template_leaves_out_beside_a_call_is_told_of(self, tokenizer: Any) -> None:
        call = {"type": "function", "function": {"name": "look_up", "arguments": {}}}
        chat = [CHAT[1], {"role": "assistant", "content": "Let me see.", "tool_calls": [call]}]
        told = "the chat template leaves the text of 1 answers out or apart: it is not learnt"
        for beside, notes in (("{{ m['content'] }}", []), ("", [told])):
            tokenizer.chat_template = (
                "{% for m in messages %}<|im_start|>{{ m['role'] }}: {% if m['tool_calls'] %}" + beside
                + "[{{ m['tool_calls'][0]['function']['name'] }}]{% else %}{{ m['content'] }}{% endif %}<|im_end|>"
                "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
            )  # fmt: skip
            data = tokenize_records(Records("messages", [chat], "memory"), tokenizer, 512)
            assert data.notes == notes

    def test_a_row_too_long_for_its_part_never_stops_a_split(self, tokenizer: Any) -> None:
        records = prompts(("z" * 90, "b"), ("the", "a"), ("the", "b"))
        for seed in range(4):
            train, held = tokenize_split(records, tokenizer, 16, False, 0.3, seed)
            assert (len(train), len(held)) == (1, 1)
        train, held = tokenize_split(prompts(("z" * 90, "b"), ("the", "a")), tokenizer, 16, False, 0.3, 0)
        assert (len(train), len(held)) == (1, 0)
        assert "nothing is held out: only one row has anything to learn" in train.notes


class TestBatches:
    def test_padding_is_unsupervised_and_masked(self) -> None:
        rows = [{"input_ids": torch.arange(n), "labels": torch.arange(n)} for n in (3, 1)]
        batch = collate(rows, pad_token_id=9)
        assert {name: value.tolist() for name, value in batch.items()} == {
            "input_ids": [[0, 1, 2], [0, 9, 9]],
            "labels": [[0, 1, 2], [0, IGNORED, IGNORED]],
            "attention_mask": [[1, 1, 1], [1, 0, 0]],
        }
        assert {value.dtype for value in batch.values()} == {torch.int64}
        assert set(collate(rows[:1] * 2, 9)) == {"input_ids", "labels"}

    def test_padding_of_packed_rows_is_one_more_sequence(self) -> None:
        rows = [{"input_ids": torch.ones(n).long(), "labels": torch.ones(n).long()} for n in (4, 2)]
        for row, positions in zip(rows, ([0, 1, 0, 1], [0, 1])):
            row["position_ids"] = torch.tensor(positions)
        batch = collate(rows, pad_token_id=0)
        assert batch["position_ids"].tolist() == [[0, 1, 0, 1], [0, 1, 0, 1]]
        assert "attention_mask" not in batch

    def test_pad_token_falls_back_to_the_end_token(self, tokenizer: Any) -> None:
        assert pad_token_id(tokenizer) == tokenizer.pad_token_id
        tokenizer.pad_token = None
        assert pad_token_id(tokenizer) == tokenizer.eos_token_id

    def test_packed_examples_give_the_logits_that_they_give_alone(self, tokenizer: Any) -> None:
        model = tiny_model("llama")
        pairs = [("the prompt", " answer"), ("Hallo", ", done."), ("xyz", "zyx"), ("zzzz", "yyyyyyyyyyy")]
        alone = tokenize_records(prompts(*pairs), tokenizer, 16, packing=False)
        packed = tokenize_records(prompts(*pairs), tokenizer, 16)
        assert len(packed) < len(alone)
        batch = collate(packed.rows, pad_token_id=0)
        assert len({len(row["input_ids"]) for row in packed.rows}) > 1, "some row must be padded"
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            expected = {tuple(r["input_ids"].tolist()): model(r["input_ids"][None]).logits[0] for r in alone.rows}
        for row, positions, found in zip(batch["input_ids"], batch["position_ids"], logits):
            borders = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
            for start, end in pairwise(borders):
                key = tuple(row[start:end].tolist())
                if key in expected:
                    torch.testing.assert_close(found[start:end], expected.pop(key))
        assert not expected, "every example was compared"

    @pytest.mark.parametrize(
        ("family", "accepts", "isolates"),
        [("llama", True, True), ("gpt2", True, True), ("opt", True, False), ("bloom", False, False)],
    )
    def test_models_that_would_mix_packed_examples_are_told_apart(
        self, family: str, accepts: bool, isolates: bool
    ) -> None:
        model = tiny_model(family).train()
        assert accepts_position_ids(model) == accepts
        assert isolates_packed_examples(model) == isolates
        assert model.training


class TestPreview:
    def test_shows_the_first_example_with_supervised_text_in_brackets(self, tokenizer: Any) -> None:
        data = tokenize_records(prompts(("the prompt", " answer"), ("x", "y")), tokenizer, 64)
        shown = preview(data[0], tokenizer)
        assert shown.plain == "the prompt⟦ answer<|endoftext|>⟧"
        assert [str(span.style) for span in shown.spans] == ["dim", "bold green"]

    def test_long_rows_are_shortened(self, tokenizer: Any) -> None:
        data: TokenizedData = tokenize_records(text("z" * 50), tokenizer, 50)
        assert preview(data[0], tokenizer, max_tokens=3).plain == "⟦zzz⟧ … (47 more tokens)"


def tiny_model(family: str) -> Any:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "vocab_size": 300, "pad_token_id": None, "bos_token_id": None}
    if family == "opt":
        sizes |= {"ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": 1}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 300}
    config = transformers.AutoConfig.for_model(family, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
