"""Decoder blocks and what stands around them are found by structure, in every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import DECODERS, HIDDEN, LAYERS, build, common, llama, llava, roberta_classifier, roberta_masked, t5
from torch import nn

from lisa_kernels.errors import InputError
from lisa_kernels.layers import find_blocks, split_model


def names_of(model: nn.Module) -> dict[int, str]:
    return {id(param): name for name, param in model.named_parameters()}


@pytest.mark.parametrize("name", DECODERS)
def test_each_family_splits_into_blocks_embeddings_and_head(name: str) -> None:
    """Every language parameter is in exactly one part, tied ones once, and nothing of a vision tower is in any."""
    family = DECODERS[name]
    model = family.make()
    parts, names = split_model(model), names_of(model)
    assert parts.path == family.path
    assert list(parts.blocks) == list(model.get_submodule(family.path))
    assert {names[id(param)] for param in parts.embeddings} == set(family.embeddings)
    assert {names[id(param)] for param in parts.head} == set(family.head)
    inside = [id(param) for block in parts.blocks for param in block.parameters()]
    everything = inside + [id(param) for param in parts.outer]
    language = {key for key, name in names.items() if not name.startswith(family.foreign or ("-",))}
    assert len(everything) == len(set(everything))
    assert set(everything) == language


def test_a_vision_tower_of_equal_length_is_told_apart() -> None:
    """LLaVA's CLIP tower has as many layers as its language model: only the latter is found."""
    model = llava()
    assert len(model.model.vision_tower.encoder.layers) == LAYERS
    assert find_blocks(model)[0] == "model.language_model.layers"


def test_a_single_layer_is_found() -> None:
    """With a configuration that says so, a list of one block is enough."""
    model = llama(layers=1)
    assert find_blocks(model) == ("model.layers", (model.model.layers[0],))


@pytest.mark.parametrize("make", [roberta_classifier, roberta_masked])
def test_an_encoder_loses_no_parameter(make: Any) -> None:
    """RoBERTa's embedding norm, pooler and head stand around its blocks; position tables count as embeddings."""
    model = make()
    parts, names = split_model(model), names_of(model)
    assert parts.path == "roberta.encoder.layer"
    inside = {id(param) for block in parts.blocks for param in block.parameters()}
    assert inside | {id(param) for param in parts.outer} == set(names)
    assert all(name.startswith("roberta.embeddings.") for name in (names[id(p)] for p in parts.embeddings))


def test_a_sequence_classifier_has_its_classifier_in_the_head() -> None:
    """The score layer of a Llama classifier is the head."""
    model = build("LlamaForSequenceClassification", "LlamaConfig", **common(num_labels=2))
    parts, names = split_model(model), names_of(model)
    assert {names[id(param)] for param in parts.head} == {"model.norm.weight", "score.weight"}


def test_the_decoder_of_an_encoder_decoder_can_be_named() -> None:
    """T5's two stacks are ambiguous; with the decoder named, the encoder stays out."""
    model = t5()
    with pytest.raises(InputError, match="blocks="):
        find_blocks(model)
    parts, names = split_model(model, "decoder.block"), names_of(model)
    assert list(parts.blocks) == list(model.decoder.block)
    assert {names[id(param)] for param in parts.embeddings} == {"shared.weight"}
    assert not any(names[id(param)].startswith("encoder.") for param in parts.outer)
    assert "decoder.final_layer_norm.weight" in {names[id(param)] for param in parts.head}


def test_an_encoder_that_shares_the_configuration_stays_out() -> None:
    """BART's encoder has the decoder's own configuration; its stack of blocks tells it apart from a head."""
    model = build(
        "BartForConditionalGeneration", "BartConfig", vocab_size=61, d_model=HIDDEN, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_position_embeddings=32,
    )  # fmt: skip
    parts, names = split_model(model, "model.decoder.layers"), names_of(model)
    around = {names[id(param)] for param in parts.outer}
    assert around
    assert not any(name.startswith("model.encoder.") for name in around)


class TwoTowers(nn.Module):
    """A vision-language model of the user's own whose projector is a direct child of the model."""

    def __init__(self) -> None:
        super().__init__()
        language = llama()
        self.config = language.config.__class__(**{**language.config.to_dict(), "vocab_size": 99})
        self.config.get_text_config = lambda: language.config
        self.vision = nn.ModuleList([nn.TransformerEncoderLayer(HIDDEN, 2, 16) for _ in range(LAYERS)])
        self.projector = nn.Linear(HIDDEN, HIDDEN)
        self.language = language.model
        self.head = language.lm_head


def test_a_projector_before_the_language_tower_is_no_head() -> None:
    """What the model holds before its language tower feeds it; what follows is the head."""
    model = TwoTowers()
    parts, names = split_model(model), names_of(model)
    assert parts.path == "language.layers"
    assert {names[id(param)] for param in parts.embeddings} == {"language.embed_tokens.weight"}
    assert {names[id(param)] for param in parts.head} == {"language.norm.weight", "head.weight"}


class Plain(nn.Module):
    """A model of the user's own, without a configuration."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, HIDDEN)
        block = nn.TransformerEncoderLayer(HIDDEN, 2, 16)
        other: nn.Module = nn.Sequential(nn.Linear(HIDDEN, HIDDEN)) if mixed else block
        self.body = nn.Module()
        self.body.layers = nn.ModuleList([block, other, nn.TransformerEncoderLayer(HIDDEN, 2, 16)])
        self.norm = nn.LayerNorm(HIDDEN)
        self.out = nn.Linear(HIDDEN, 7)


def test_a_model_without_configuration_is_split_as_well() -> None:
    """Its one list of modules of one type holds the blocks; tables are embeddings and all else is head."""
    model = Plain()
    parts = split_model(model)
    assert parts.path == "body.layers"
    assert [id(param) for param in parts.embeddings] == [id(model.embed.weight)]
    assert {id(p) for p in parts.head} == {id(p) for part in (model.norm, model.out) for p in part.parameters()}


def test_a_hybrid_with_blocks_of_several_types_is_found() -> None:
    """Attention and recurrent blocks in one list are still the blocks, when no list of one type is there."""
    assert find_blocks(Plain(mixed=True))[0] == "body.layers"


@pytest.mark.parametrize("path", ["model.layer", "model.layers.0", "lm_head", ""])
def test_a_path_that_names_no_list_is_refused_with_the_candidates(path: str) -> None:
    """A misspelt `blocks=` says which lists there are."""
    with pytest.raises(InputError, match=r"model\.layers"):
        find_blocks(llama(), path)


def test_a_model_without_blocks_is_refused() -> None:
    """A model that is no stack says what to do."""
    with pytest.raises(InputError, match="LoRAFA"):
        find_blocks(nn.Sequential(nn.Linear(4, 4)))


def test_several_lists_are_refused_by_name() -> None:
    """Two stacks that could both be meant are both named."""
    model = nn.Module()
    model.left = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    model.right = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    with pytest.raises(InputError, match=r"left, right"):
        find_blocks(model)


def test_splitting_changes_nothing() -> None:
    """Reading a model's structure leaves weights and flags alone."""
    model = llama()
    before = {name: (param.requires_grad, param.detach().clone()) for name, param in model.named_parameters()}
    split_model(model)
    for name, param in model.named_parameters():
        assert param.requires_grad == before[name][0]
        assert torch.equal(param, before[name][1])
