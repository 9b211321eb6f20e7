"""Where the encoder columns of each family lie, found out by changing one pixel and looking what changes.

The branches beside the residual stream are set to zero, so that a pixel reaches the columns that contain it,
and no others.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers
from generation import generate

import kvprune
from kvprune.adapters.families import FAMILIES
from kvprune.adapters.families.texts import BartAdapter
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.adapters.tiny.media import _TROCR, _VIT
from kvprune.adapters.tiny.models import random_model
from kvprune.errors import UnsupportedModelError
from kvprune.tokens.layout import AUDIO_FRAME, ENCODER_TOKEN, IMAGE_PATCH, TEXT_TOKEN

SEEN: list = []


@dataclass(frozen=True, kw_only=True)
class Looker(kvprune.FeatureScoringPolicy):
    """Notes each view and keeps everything."""

    name = "looker"

    def score(self, view):
        assert view.layout is view.layout  # computed now: nobody knows it after the block
        SEEN.append(view)
        return torch.zeros(view.batch, 1, view.columns)


@dataclass(frozen=True, kw_only=True)
class Square(Looker):
    """The same, and says that it needs a grid."""

    name = "square"
    needs = frozenset({"grid"})


def views_of(model, run, policy=Looker):
    """What a policy sees while a function runs."""
    SEEN.clear()
    with kvprune.compress(model, policy(keep_ratio=1.0)), torch.no_grad():
        run()
    return list(SEEN)


def layout_of(model, inputs, **options):
    """The layout that a policy sees in one forward call."""
    calls = {**inputs, **options}
    calls.setdefault("decoder_input_ids", torch.full((2, 2), 3))
    if type(model).__name__.startswith("Blip"):
        calls["input_ids"] = calls.pop("decoder_input_ids")
    (view,) = views_of(model, lambda: model(**calls))
    return view.layout


def without_branches(model, *ends):
    """Set the last weights of all attention and feed-forward branches of the encoder to zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(end in name for end in ends):
                parameter.zero_()
    return model


def columns_touched(encode, pixels, row, column):
    """Columns ``[n]`` of the first sample that change with a pixel."""
    changed = pixels.clone()
    changed[0, :, row, column] += 3
    with torch.no_grad():
        return (encode(changed) - encode(pixels))[0].abs().amax(-1).gt(1e-6).nonzero().squeeze(1)


def require_true_places(layout, encode, pixels, patch, step=1):
    """Each pixel reaches columns at its own place, and no column of another place."""
    height, width = pixels.shape[-2:]
    met = set()
    for row in range(0, height, step):
        for column in range(0, width, step):
            touched = columns_touched(encode, pixels, row, column)
            places = {tuple(layout.places[0, one].tolist()) for one in touched} - {(-1, -1)}
            assert places == {(row // patch, column // patch)}
            met |= places
    assert met == {tuple(place) for place in layout.places[0].tolist()} - {(-1, -1)}


def vision(name, config, patch=4):
    """A vision encoder-decoder with an encoder of some kind, and what encodes."""
    encoder = getattr(transformers, f"{name}Config")(**config)
    decoder = transformers.TrOCRConfig(**_TROCR)
    pair = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    pair.decoder_start_token_id, pair.pad_token_id = 3, 0
    model = random_model(transformers.VisionEncoderDecoderModel, pair, 0, torch.float32, "eager")
    branches = "o_proj", "out_proj", "fc2", "output.dense", "attention.output", "layerscale"
    return without_branches(model, *(f"{end}." for end in branches), "lambda_1", "lambda_2")


_SWIN = {
    "image_size": [16, 32],
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 1, 1],
    "num_heads": [1, 2, 4],
    "window_size": 2,
}
_DINO = {**_VIT, "mlp_ratio": 2}
del _DINO["intermediate_size"]


@pytest.mark.parametrize(
    ("name", "config", "size", "patch", "classes", "nowhere"),
    [
        ("ViT", _VIT, (16, 16), 4, 1, 1),
        ("ViT", {**_VIT, "image_size": [8, 24]}, (8, 24), 4, 1, 1),
        ("DeiT", _VIT, (16, 16), 4, 2, 2),
        ("Beit", _VIT, (16, 16), 4, 1, 1),
        ("Data2VecVision", _VIT, (16, 16), 4, 1, 1),
        ("Dinov2", _DINO, (16, 16), 4, 1, 1),
        ("Dinov2WithRegisters", {**_DINO, "num_register_tokens": 3}, (16, 16), 4, 1, 4),
        ("CLIPVision", _VIT, (16, 16), 4, 1, 1),
        ("SiglipVision", _VIT, (16, 16), 4, 0, 0),
        ("Swin", _SWIN, (16, 32), 8, 0, 0),
        ("DonutSwin", _SWIN, (16, 32), 8, 0, 0),
        ("DonutSwin", _SWIN, (30, 20), 8, 0, 0),  # any size, padded to whole patches
        ("Swinv2", _SWIN, (16, 16), 8, 0, 0),
    ],
)
def test_patches_of_a_vision_encoder_are_where_their_pixels_are(name, config, size, patch, classes, nowhere):
    model = vision(name, config)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    layout = layout_of(model, {"pixel_values": pixels})
    assert (layout.geometry, layout.units) == ("grid", (IMAGE_PATCH,))
    assert (layout.places < 0).all(-1).sum() == nowhere
    assert (0 if layout.class_tokens is None else int(layout.class_tokens.sum())) == classes
    if classes:
        assert layout.class_tokens[0, :classes].all()
    require_true_places(layout, lambda p: model.encoder(p)[0], pixels, patch, step=2)


def test_a_picture_of_another_size_has_another_grid():
    model = vision("ViT", _VIT)
    pixels = torch.randn(2, 3, 8, 32, generator=torch.Generator().manual_seed(0))
    layout = layout_of(model, {"pixel_values": pixels}, interpolate_pos_encoding=True)
    assert layout.places.amax((0, 1)).tolist() == [1, 7]


def test_the_patches_of_blip_are_where_their_pixels_are():
    name = "BlipForConditionalGeneration"
    model = without_branches(
        TINY_FAMILIES[name].model(name, attn_implementation="eager"), "projection.", "fc2."
    )
    inputs = TINY_FAMILIES[name].batch(torch.float32, False)
    layout = layout_of(model, inputs)
    assert layout.class_tokens.sum() == 1
    require_true_places(layout, lambda p: model.vision_model(p)[0], inputs["pixel_values"], 4)


def test_the_columns_of_pp_formulanet_are_where_their_pixels_are():
    name = "PPFormulaNetForConditionalGeneration"
    model = TINY_FAMILIES[name].model(name)
    without_branches(model.model.encoder, "attn.proj.", "lin2.")
    for module in model.model.encoder.modules():  # convolutions that look at their middle only
        if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
            middle = module.weight.data[:, :, 1, 1].clone()
            module.weight.data.zero_()[:, :, 1, 1] = middle
    inputs = TINY_FAMILIES[name].batch(torch.float32, False)
    layout = layout_of(model, inputs)
    require_true_places(
        layout, lambda p: model.model.encoder(p).pooler_output, inputs["pixel_values"], 4, step=4
    )


def test_the_columns_of_florence_are_where_their_pixels_are():
    name = "Florence2ForConditionalGeneration"
    ends = "conv1.", "conv2.", ".proj.", "fc2.", "out_proj."
    model = without_branches(TINY_FAMILIES[name].model(name), *ends)
    inputs = TINY_FAMILIES[name].batch(torch.float32, True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    # Text before the picture, too; the second sample has less of it.
    early = torch.tensor([[5, 6, 7], [5, 6, 6]])
    inputs["input_ids"] = torch.cat([early, ids], 1)
    inputs["input_ids"][1, 2], inputs["input_ids"][1, 19] = 61, 9
    inputs["attention_mask"] = torch.cat([torch.ones_like(early), mask], 1)
    layout = layout_of(model, inputs)
    assert (layout.unit, layout.units) == (ENCODER_TOKEN, (IMAGE_PATCH, TEXT_TOKEN))
    shown = inputs["input_ids"] == 61
    assert torch.equal(layout.kinds, (~shown).long())
    assert layout.runs[0].unique_consecutive().tolist() == [0, 1, 2]
    # The mean of the picture has no place, and neither has the text.
    assert ((layout.places >= 0).all(-1).sum(-1) == 16).all()
    grid = [[row, column] for row in range(4) for column in range(4)]
    assert layout.places[1, 3:19].tolist() == grid

    def encode(pixels):
        return model(**{**inputs, "pixel_values": pixels}, decoder_input_ids=torch.full((2, 1), 3))[
            "encoder_last_hidden_state"
        ]

    require_true_places(layout, encode, inputs["pixel_values"], 4, step=2)
    del inputs["pixel_values"]
    inputs["input_ids"] = ids.masked_fill(ids == 61, 5)
    inputs["attention_mask"] = mask
    layout = layout_of(model, inputs)
    assert (layout.geometry, layout.unit) == ("line", TEXT_TOKEN)


def test_the_columns_of_udop_are_where_their_pixels_are():
    name = "UdopForConditionalGeneration"
    model = without_branches(TINY_FAMILIES[name].model(name), "SelfAttention.o.", "DenseReluDense.wo.")
    inputs = TINY_FAMILIES[name].batch(torch.float32, True)
    inputs["bbox"][:, 0] = 0.0  # a special token has no box
    inputs["bbox"][:, 1] = 1.0
    inputs["bbox"][:, 3] = inputs["bbox"][:, 4]  # two words in one patch
    layout = layout_of(model, inputs)
    words = inputs["input_ids"].shape[1]
    assert layout.units == (TEXT_TOKEN, IMAGE_PATCH)
    assert layout.kinds.sum(-1).eq(16).all()
    assert not layout.kinds[:, :words].any()
    assert (layout.places[:, :2] == -1).all()

    def encode(pixels):
        named = {k: v.clone() for k, v in inputs.items()}
        return model.encoder(**{**named, "pixel_values": pixels})[0]

    pixels = inputs["pixel_values"]
    for row in range(0, 16, 2):
        for column in range(0, 16, 2):
            touched = columns_touched(encode, pixels, row, column)
            places = {tuple(layout.places[0, one].tolist()) for one in touched}
            # The patches under special tokens are taken by these, which do not look at them.
            assert places <= {(row // 4, column // 4)}
            assert places or (row // 4, column // 4) in {(0, 0), (3, 3)}
    kept = {tuple(place) for place in layout.places[0, words:].tolist()} - {(-1, -1)}
    assert not kept & {tuple(place) for place in layout.places[0, :words].tolist()}
    # Without a picture, words alone lie on the page.
    del inputs["pixel_values"]
    alone = layout_of(model, inputs)
    assert alone.unit == TEXT_TOKEN
    assert torch.equal(alone.places, layout.places[:, :words])


def test_the_patches_of_pix2struct_are_where_their_pixels_are():
    name = "Pix2StructForConditionalGeneration"
    model = without_branches(TINY_FAMILIES[name].model(name), "attention.output.", "mlp.wo.")
    pixels = torch.randn(2, 1, 8, 7, generator=torch.Generator().manual_seed(0))  # patches of 2 x 7 pixels

    def encode(pixels):
        flat = torch.zeros(2, 6, 16)  # two of them are padding
        for row in range(4):
            flat[:, row, :2] = torch.tensor([row + 1, 1])
            flat[:, row, 2:] = pixels[:, 0, 2 * row : 2 * row + 2].flatten(1)
        return flat

    layout = layout_of(model, {"flattened_patches": encode(pixels)})
    assert layout.places[0].tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [-1, -1], [-1, -1]]
    for row in range(8):
        touched = columns_touched(lambda p: model.encoder(encode(p))[0], pixels, row, 3)
        assert layout.places[0, touched].tolist() == [[row // 2, 0]]


@pytest.mark.parametrize(
    "name",
    [
        "VisionEncoderDecoderModel",
        "Pix2StructForConditionalGeneration",
        "UdopForConditionalGeneration",
        "Florence2ForConditionalGeneration",
        "PPFormulaNetForConditionalGeneration",
    ],
)
def test_generate_with_beams_has_the_layout_of_its_samples(name):
    model = TINY_FAMILIES[name].model(name, attn_implementation="eager")
    inputs = TINY_FAMILIES[name].batch(torch.float32, True)
    one = layout_of(model, inputs)
    SEEN.clear()
    with kvprune.compress(model, Looker(keep_ratio=1.0)):
        generate(model, inputs, steps=2, num_beams=3)
    assert torch.equal(SEEN[0].layout.places.expand(2, -1, -1), one.places.expand(2, -1, -1))


def test_states_are_recognised_among_several_calls():
    model = vision("DonutSwin", _SWIN)
    wide, high = torch.randn(2, 3, 16, 64), torch.randn(2, 3, 64, 16)  # 16 columns each
    ids = torch.full((2, 2), 3)

    def run():
        first, second = model.encoder(wide), model.encoder(high)
        for encoded in (first, second, first):
            model(encoder_outputs=encoded, decoder_input_ids=ids)

    found = [view.places.amax((0, 1)).tolist() for view in views_of(model, run)]
    assert found == [[1, 7], [7, 1], [1, 7]]


def test_projected_states_are_recognised_too():
    model = vision("DonutSwin", {**_SWIN, "embed_dim": 12})
    assert model.encoder.config.hidden_size != model.decoder.config.hidden_size
    wide, high = torch.randn(2, 3, 16, 64), torch.randn(2, 3, 64, 16)
    ids = torch.full((2, 2), 3)

    def run():
        first, second = model.encoder(wide), model.encoder(high)
        twice = transformers.modeling_outputs.BaseModelOutput(first[0].repeat_interleave(2, 0))
        model(encoder_outputs=second, decoder_input_ids=ids)
        model(encoder_outputs=twice, decoder_input_ids=ids.repeat(2, 1))
        other = transformers.modeling_outputs.BaseModelOutput(first[0] + 1)
        model(encoder_outputs=other, decoder_input_ids=ids)

    views = views_of(model, run)
    assert [view.places.amax((0, 1)).tolist() for view in views[:2]] == [[7, 1], [1, 7]]
    assert views[2].layout.geometry == "unknown"


def test_states_from_elsewhere_have_no_known_place():
    model = vision("ViT", _VIT)
    with torch.no_grad():
        encoded = model.encoder(torch.randn(2, 3, 16, 16))
    ids = torch.full((2, 2), 3)
    (view,) = views_of(model, lambda: model(encoder_outputs=encoded, decoder_input_ids=ids))
    assert (view.layout.geometry, view.layout.unit) == ("unknown", IMAGE_PATCH)
    assert (view.layout.places == -1).all()
    with pytest.raises(UnsupportedModelError, match=r"asks where image patches lie, .*encoder_outputs"):
        _ = view.places
    with pytest.raises(UnsupportedModelError, match=r"'square' asks where image patches lie"):
        views_of(model, lambda: model(encoder_outputs=encoded, decoder_input_ids=ids), Square)
    assert not SEEN


def test_an_encoder_that_nobody_knows_has_no_known_grid():
    model = vision("ViT", _VIT)
    model.encoder.config.model_type = "foreign"
    pixels = {"pixel_values": torch.randn(2, 3, 16, 16)}
    layout = layout_of(model, pixels)
    assert layout.geometry == "unknown"
    assert "how ViTModel arranges 17 columns of 16 x 16 pixels is unknown" in layout.reason


@pytest.mark.parametrize("name", ["WhisperForConditionalGeneration", "BartForConditionalGeneration"])
def test_a_line_is_no_grid(name):
    model = TINY_FAMILIES[name].model(name)
    inputs = TINY_FAMILIES[name].batch(torch.float32, True)
    layout = layout_of(model, inputs)
    assert layout.geometry == "line"
    with pytest.raises(UnsupportedModelError, match=r"'square' needs 'grid', which the .* does not provide"):
        kvprune.compress(model, Square())
    (view,) = views_of(model, lambda: model(**inputs, decoder_input_ids=torch.full((2, 2), 3)))
    with pytest.raises(UnsupportedModelError, match="needs a grid, rows and columns of a picture"):
        _ = view.grid


@pytest.mark.parametrize("name", sorted(TINY_FAMILIES))
def test_units_follow_from_what_the_encoder_reads(name):
    adapter = next(one for one in FAMILIES if name.split()[0] in one.model_classes)
    unit = adapter(TINY_FAMILIES[name].model(name, attn_implementation="eager")).column_unit
    inputs = TINY_FAMILIES[name].batch(torch.float32, False)
    sound = {"input_features", "input_values"} & inputs.keys()
    picture = {"pixel_values", "flattened_patches"} & inputs.keys()
    if sound:
        assert unit == AUDIO_FRAME
    elif picture:
        mixed = "input_ids" in inputs
        assert unit == (ENCODER_TOKEN if mixed else IMAGE_PATCH)
    else:
        assert unit == TEXT_TOKEN


def test_hooks_of_the_encoder_are_gone_afterwards():
    model = vision("ViT", _VIT)
    adapter = kvprune.compress(model, Looker())
    with adapter, torch.no_grad():
        model(pixel_values=torch.randn(1, 3, 16, 16), decoder_input_ids=torch.full((1, 2), 3))
        assert model.encoder._forward_hooks
    assert not any(module._forward_hooks for module in model.modules())
    assert adapter._adapter.notes.of(torch.zeros(1, 17, 32)) is None


def test_an_unknown_layout_says_what_to_do():
    class Odd(BartAdapter):
        unit = ENCODER_TOKEN

    name = "BartForConditionalGeneration"
    odd = Odd(TINY_FAMILIES[name].model(name))
    layout = odd.layout(torch.zeros(1, 3, 32))
    assert layout.geometry == "unknown"
    assert "Odd does not say it" in layout.reason
