"""The doctor looks at a checkpoint without reading its weights, and says what is wrong with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from generation import bart, generate, mllama, whisper
from typer.testing import CliRunner

import kvprune
import kvprune.demo
from kvprune.adapters.tiny.families import TINY_FAMILIES
from kvprune.adapters.tiny.models import example_bart, example_mllama, example_whisper
from kvprune.cli import app
from kvprune.cli.doctor_model import examine_model
from kvprune.errors import UnsupportedModelError


def saved(folder: Path, config: Any, *names: str, **changes: Any) -> str:
    """Write a config.json that names classes; return its folder."""
    config.architectures = list(names)
    config.save_pretrained(folder)
    if changes:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}))
    return str(folder)


def run(*arguments: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of `kvprune doctor`."""
    result = CliRunner().invoke(app, ["doctor", *arguments])
    return result.exit_code, " ".join(result.stdout.split()), " ".join(result.stderr.split())


def rows(name: str) -> dict[str, str]:
    """Return what the doctor says, by what it is about."""
    return {check.name: check.detail for check in examine_model(name)}


def test_a_supported_model_is_described(tmp_path: Path) -> None:
    config = transformers.WhisperConfig(
        d_model=1280,
        decoder_layers=32,
        decoder_attention_heads=20,
        encoder_layers=1,
        encoder_attention_heads=20,
        dtype=torch.float16,
    )
    code, out, err = run("--model", saved(tmp_path, config, "WhisperForConditionalGeneration"))
    assert (code, err) == (0, "")
    for line in (
        "- WhisperForConditionalGeneration: model_type whisper, ",
        "M parameters, float16",
        "- weights: none in the folder; none are needed here",
        "ok Whisper: WhisperAdapter of plugin builtin-adapters (kvprune)",
        "- policies see: features, guidance, queries, raw_keys, reconstruction, text",
        "cross-attention in 32 layers - layers: 0 to 31 - module: model.decoder.layers.*.encoder_attn",
        "- heads: 20 for queries, 20 for keys and values, of width 64",
        "- arguments: encoder states in key_value_states, mask in attention_mask",
        "- a column: audio frame, 0.02 s of sound",
        "- holds: 163,840 bytes in all layers, keys and values, float16",
        "- a sample: 1500 for any sound, padded to 30 seconds: 234.4 MiB",
        "- visionzip is refused: policy 'visionzip' needs 'class_attention', which the Whisper adapter",
        "- reread=True: works; prompts that end with padding are refused",
        "- attention: eager and sdpa work; flex_attention works if all heads keep the same tokens",
        "- gradient checkpointing: refused while training",
    ):
        assert line in out
    policies = re.search(r"policies, (\d+) of (\d+) with their default options ok run: ([\w, -]+) - ", out)
    assert policies is not None
    assert "trim" in policies[3].split(", ")
    assert "visionzip" not in policies[3].split(", ")
    assert int(policies[1]) == len(policies[3].split(", ")) < int(policies[2]) == len(kvprune.list_policies())


def test_weights_are_named_and_those_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    found = rows(saved(tmp_path, mllama().config, "MllamaForConditionalGeneration"))
    assert "quecc" not in found["run"].split(", ")
    assert "(embedded demo), but this model has" in found["quecc is refused"]
    assert "(kvprune train quecc:k=2,query=prompt --model MODEL " in found["quecc is refused"]
    told = "weights demo of attnpred (digest d2fa269a4adc): trained on the embedded model"
    assert found["attnpred runs with"].startswith(told)
    embedded = rows(str(kvprune.demo.model_path()))
    assert "quecc" in embedded["run"].split(", ")
    assert embedded["quecc runs with"].endswith("trained on embedded demo")


@pytest.mark.parametrize("name", TINY_FAMILIES)
def test_every_declared_class_is_found_without_weights(tmp_path: Path, name: str) -> None:
    config, cls = TINY_FAMILIES[name].config(transformers), name.split()[0]
    checks = examine_model(saved(tmp_path, config, cls))
    assert not [check for check in checks if check.ok is False]
    found = {check.name: check.detail for check in checks}
    assert {"layers", "module", "heads", "arguments", "a column", "a sample", "run", "reread=True"} <= set(
        found
    )


EXAMPLES = [
    pytest.param(bart, example_bart, None, id="BART"),
    pytest.param(whisper, example_whisper, 50, id="Whisper"),
    pytest.param(mllama, example_mllama, 20, id="Mllama"),
]


@pytest.mark.parametrize(("model", "example", "usual"), EXAMPLES)
def test_bytes_and_columns_are_those_of_a_run(
    tmp_path: Path, model: Any, example: Any, usual: int | None
) -> None:
    _, inputs = example(torch.float32)
    first = {name: tensor[:1] for name, tensor in inputs.items()}
    with kvprune.compress(model(), "full") as run:
        generate(model(), first, steps=2)
    found = rows(saved(tmp_path, model().config, type(model()).__name__))
    each = int(found["holds"].split()[0].replace(",", ""))
    columns = run.selections[run.report.layers[0].layer_idx].columns
    images = 2 if usual == 20 else 1  # the Mllama example has two in its first sample
    assert run.report.bytes_full == each * columns
    if usual is not None:
        assert found["a sample"].startswith(f"{usual} for ")
        assert usual * images == columns


def picture(encoder: Any) -> Any:
    return transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, transformers.TrOCRConfig(decoder_layers=1)
    )


@pytest.mark.parametrize(
    ("encoder", "columns"),
    [
        (transformers.ViTConfig(image_size=384, num_hidden_layers=1), 577),
        (transformers.DeiTConfig(image_size=384, num_hidden_layers=1), 578),
        (transformers.BeitConfig(image_size=64, num_hidden_layers=1), 17),
        (transformers.Dinov2Config(image_size=56, num_hidden_layers=1), 17),
        (transformers.SwinConfig(image_size=224, depths=[1, 1, 1], num_heads=[3, 6, 12]), 196),
        (
            transformers.DonutSwinConfig(
                image_size=[448, 224], depths=[1, 1, 1, 1], num_heads=[3, 6, 12, 24]
            ),
            98,
        ),
    ],
)
def test_columns_of_pictures_are_those_of_the_encoder(tmp_path: Path, encoder: Any, columns: int) -> None:
    found = rows(saved(tmp_path, picture(encoder), "VisionEncoderDecoderModel"))
    assert found["a column"] == "image patch"
    assert found["a sample"].startswith(f"{columns} for a picture: ")
    size = encoder.image_size if isinstance(encoder.image_size, list) else [encoder.image_size] * 2
    model = transformers.AutoModel.from_config(encoder).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, *size)).last_hidden_state.shape[1] == columns


def test_what_a_column_is_follows_from_what_the_encoder_reads(tmp_path: Path) -> None:
    kinds = {
        "T5ForConditionalGeneration": "text token",
        "UdopForConditionalGeneration": "encoder token",
        "Florence2ForConditionalGeneration": "encoder token",
        "Pix2StructForConditionalGeneration": "image patch",
        "BlipForConditionalGeneration": "image patch",
        "MoonshineForConditionalGeneration": "audio frame, 0.024 s of sound",
        "SpeechEncoderDecoderModel": "audio frame, 0.00125 s of sound",
    }
    for name, kind in kinds.items():
        found = rows(saved(tmp_path / name, TINY_FAMILIES[name].config(transformers), name))
        assert found["a column"] == kind
    led = transformers.LEDConfig(encoder_layers=1, decoder_layers=1)
    found = rows(saved(tmp_path / "led", led, "LEDForConditionalGeneration"))
    assert found["a sample"].startswith("their number depends on the text (at most 16384 tokens); 1000 take ")


def test_an_11b_model_takes_no_memory(tmp_path: Path) -> None:
    config = transformers.MllamaConfig(dtype=torch.bfloat16)
    config.vision_config.image_size = 560
    found = rows(saved(tmp_path, config, "MllamaForConditionalGeneration"))
    assert found["layers"] == "3, 8, 13, 18, 23, 28, 33, 38"
    assert found["holds"] == "32,768 bytes in all layers, keys and values, bfloat16"
    assert found["a sample"] == "6404 for a picture, held as 4 tiles whatever its size: 200.1 MiB"
    assert found["norms"] == "of queries and keys"
    assert "visionzip" in found["run"].split(", ")


def test_weights_are_named_and_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, bart().config, "BartForConditionalGeneration", use_cache=False)
    (tmp_path / "model.safetensors").write_bytes(b"no weights" * 1_000_000)
    found = rows(folder)
    assert found["weights"] == "0.01 GB, not read"
    assert found["use_cache"].startswith("False in config.json: pass use_cache=True")


def test_code_of_the_checkpoint_is_named_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit('run')")
    changes = {"auto_map": {"AutoModel": "own.Own", "AutoConfig": "own.Own"}, "dtype": None}
    folder = saved(tmp_path, bart().config, "BartForConditionalGeneration", torch_dtype="bfloat16", **changes)
    found = rows(folder)
    assert found["code"].startswith("comes with the checkpoint and is not run; what follows is about Bart")
    assert found["BART"].startswith("BartAdapter")
    assert found["holds"].endswith("bfloat16")


def test_a_checkpoint_in_the_local_cache_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--bart"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    saved(repository / "snapshots" / "0123", bart().config, "BartForConditionalGeneration")
    assert rows("someone/bart")["BART"] == "BartAdapter of plugin builtin-adapters (kvprune)"
    code, out, err = run("--model", "someone/else")
    assert (code, out) == (2, "")
    assert "no checkpoint of that name in the local cache of the Hub; nothing is downloaded here" in err
    assert "hf download someone/else config.json" in err


# Models that kvprune does not support: exit code 1, with the reason.


def test_a_decoder_alone_has_nothing_to_prune(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(num_hidden_layers=1)
    code, out, _ = run("--model", saved(tmp_path, config, "LlamaForCausalLM"))
    assert code == 1
    assert (
        "FAIL none: no adapter supports LlamaForCausalLM to do: nothing, if it attends to no encoder" in out
    )
    assert "inspection finds no cross-attention with a cache in this LlamaForCausalLM" in out


def test_a_family_without_an_adapter_is_told_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.FSMTConfig(encoder_layers=1, decoder_layers=2)
    code, out, _ = run("--model", saved(tmp_path, config, "FSMTForConditionalGeneration"))
    assert code == 1
    assert "no adapter supports FSMTForConditionalGeneration; the nearest names are " in out
    assert "to do: write an adapter of its own (docs/adapters.md)" in out
    assert out.count("(Attention): its forward takes no cache") == 1  # not once for each layer
    monkeypatch.setenv("KVPRUNE_PLUGINS", "builtin")  # policies, no adapters
    code, out, _ = run("--model", saved(tmp_path, bart().config, "BartForConditionalGeneration"))
    assert code == 1
    assert "inspection finds 3 cross-attention modules, so four lines may do: docs/adapters.md" in out


def test_a_model_that_does_not_look_as_its_adapter_expects_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvprune.adapters.families.texts import BartAdapter

    monkeypatch.setattr(BartAdapter, "query", "asks")
    code, out, _ = run("--model", saved(tmp_path, bart().config, "BartForConditionalGeneration"))
    assert code == 1
    assert (
        "FAIL BART: BartAdapter of plugin builtin-adapters (kvprune): BART attends to encoder states at"
        in out
    )
    assert "BartAttention has no layer 'asks' to project with" in out


# Folders that are none: exit code 2, in one line.


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        (None, "holds no config.json, but model.safetensors"),
        ("{", "config.json cannot be read as JSON: JSONDecodeError: "),
        ("[1]", "config.json holds [1], expected a JSON object"),
        ("{}", "has the model_type None, expected the name of a family of transformers"),
        ('{"model_type": 3}', "has the model_type 3"),
        ('{"model_type": "bart"}', "has the architectures None, expected the name of the model's class"),
        ('{"model_type": "bart", "architectures": []}', "has the architectures []"),
        ('{"model_type": "bart", "architectures": "B"}', "has the architectures 'B'"),
        ('{"model_type": "barf", "architectures": ["B"]}', "knows no model_type 'barf'."),
        (
            '{"model_type": "barf", "architectures": ["B"], "auto_map": {"AutoModel": "evil.Evil"}}',
            "comes with code of its own, which is never run here",
        ),
        ('{"model_type": "bart", "architectures": ["BartFor"]}', "has no model class 'BartFor'."),
        ('{"model_type": "bart", "architectures": ["BartConfig"]}', "has no model class 'BartConfig'."),
        (
            '{"model_type": "bart", "architectures": ["BartModel"], "d_model": 7}',
            "BartModel cannot be built from ",
        ),
        (
            '{"model_type": "bart", "architectures": ["WhisperModel"]}',
            "WhisperModel cannot be built from ",
        ),
    ],
)
def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path, contents: str | None, told: str) -> None:
    (tmp_path / "model.safetensors").write_text("")
    (tmp_path / "evil.py").write_text("raise SystemExit('run')")
    if contents is None:
        (tmp_path / "evil.py").unlink()
    else:
        (tmp_path / "config.json").write_text(contents)
    code, out, err = run("--model", str(tmp_path))
    assert (code, out) == (2, "")
    assert err.startswith("kvprune: error: ")
    assert told in err


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    for name in (str(tmp_path / "none"), "a/b/c", "", "."):
        with pytest.raises(UnsupportedModelError, match=r"there is no folder|holds no config\.json"):
            examine_model(name)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedModelError, match="adapter of peft, so name the folder of its base model"):
        examine_model(str(tmp_path))


def test_the_installation_is_not_examined(tmp_path: Path) -> None:
    _, out, _ = run("--model", saved(tmp_path, bart().config, "BartModel"))
    assert "BartModel: model_type bart" in out
    assert "versions" not in out
    assert "All is well" not in out
