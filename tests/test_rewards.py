"""Rewards against the numbers of the reference implementations (tests/golden) and on tiny models of each format."""

from __future__ import annotations

import json
import math
import shutil
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from psd.errors import RequestError
from psd.models.hub import Source
from psd.models.parts import InParts
from psd.models.rewards import aesthetic, clip_scores, image_reward, load_reward, mps, table
from psd.models.rewards.preprocess import CLIP_MEAN, CLIP_STD, bicubic, longest_side, normalise, shorter_side
from psd.models.rewards.table import CLIP_H, REWARDS, RewardInfo
from psd.models.weights import use_tf32
from psd.toybox.classifier import load_attributes

GOLDEN = Path(__file__).parent / "golden"
GREY_LEVEL = 1 / 255 / min(CLIP_STD)  # of a normalised image

clip_mean = torch.tensor(CLIP_MEAN).view(3, 1, 1)
clip_std = torch.tensor(CLIP_STD).view(3, 1, 1)


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    return load_file(GOLDEN / f"{name}.safetensors"), json.loads((GOLDEN / f"{name}.json").read_text())


def golden_image(name: str) -> torch.Tensor:
    """[1 3 H W] in [0, 1]."""
    return golden("preprocess/images")[0][f"{name}.uint8_hwc"].permute(2, 0, 1)[None] / 255


def golden_pixels(image: str, fixture: str) -> torch.Tensor:
    """[3 224 224], normalised; some are stored before that, as bytes."""
    tensors, _ = golden(f"preprocess/{fixture}")
    return tensors[image] if image in tensors else (tensors[f"{image}.uint8"] / 255 - clip_mean) / clip_std


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def clip_tokenizer(size: int, max_length: int):
    """Letters and fillers, `size` tokens in all, the end token last as in CLIP's own vocabulary."""
    from transformers import CLIPTokenizer

    tokens = [*"abcdefghijklmnopqrstuvwxyz", *(letter + "</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokens += [f"filler{i}" for i in range(size - len(tokens) - 2)] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=max_length)


def bert_tokenizer(size: int):
    from transformers import BertTokenizer

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "mushroom", "lamp"]
    tokens += [f"filler{i}" for i in range(size - len(tokens))]
    return BertTokenizer(vocab={token: i for i, token in enumerate(tokens)})


HPS = "psd.models.rewards.clip_scores:HPSv2Reward"


AESTHETIC, MPS = "psd.models.rewards.aesthetic:AestheticReward", "psd.models.rewards.mps:MPSReward"


def register(monkeypatch, name: str, model: str, source: Path, **more) -> None:
    monkeypatch.setitem(REWARDS, name, RewardInfo(Source(str(source)), "Apache-2.0", 0, model, "test", **more))


# Preprocessing


@pytest.mark.parametrize(
    ("image", "fixture", "offset"),
    [("wide", "clip_hf", math.floor), ("wide", "imagereward", round), ("square", "imagereward", round)],
)
def test_shorter_side_is_the_published_pil_preprocessing_to_a_grey_level(image, fixture, offset):
    want = golden_pixels(image, fixture)
    got = normalise(shorter_side(golden_image(image), 224, offset), clip_mean, clip_std)[0]
    assert (got - want).abs().max() < 1.5 * GREY_LEVEL
    assert (got - want).abs().mean() < 0.3 * GREY_LEVEL


def test_longest_side_is_hpsv2s_official_preprocessing():
    want = golden("preprocess/hpsv2_official")[0]["wide.antialias_on"]
    got = normalise(longest_side(golden_image("wide"), 224), clip_mean, clip_std)[0]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_an_image_of_the_models_size_is_not_resampled():
    images = torch.rand(2, 3, 32, 32)
    assert bicubic(images, 32, 32) is images
    assert torch.equal(shorter_side(images, 32), images)
    assert torch.equal(longest_side(images, 32), images)


# HPSv2


def test_open_clip_names_and_shapes_cover_the_full_size_model():
    from transformers import CLIPConfig, CLIPModel

    published = json.loads((GOLDEN / "rewards/full_keys_open_clip_vit_h_14.json").read_text())["keys"]
    weights = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    got = {name: list(weight.shape) for name, weight in clip_scores.open_clip_to_transformers(weights).items()}
    assert got == json.loads((GOLDEN / "rewards/full_keys_clip_h_hf_transformers_5.23.0.json").read_text())["keys"]
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**clip_scores.VIT_H_14))
    assert got == {name: list(weight.shape) for name, weight in model.state_dict().items()}


def tiny_vit_h_14() -> dict:
    """What stands in for clip_scores.VIT_H_14, of the golden checkpoint."""
    _, about = golden("rewards/hpsv2_tiny_weights")
    vision, text = about["open_clip_cfg"]["vision_cfg"], about["open_clip_cfg"]["text_cfg"]
    size = about["open_clip_cfg"]["embed_dim"]
    return {
        "projection_dim": size,
        "text_config": dict(
            hidden_size=text["width"], intermediate_size=4 * text["width"], num_hidden_layers=text["layers"],
            num_attention_heads=text["heads"], hidden_act="gelu", vocab_size=text["vocab_size"],
            max_position_embeddings=text["context_length"], projection_dim=size,
            bos_token_id=97, eos_token_id=98, pad_token_id=98,
        ),
        "vision_config": dict(
            hidden_size=vision["width"], intermediate_size=4 * vision["width"], num_hidden_layers=vision["layers"],
            num_attention_heads=vision["width"] // vision["head_width"], hidden_act="gelu",
            image_size=vision["image_size"], patch_size=vision["patch_size"], projection_dim=size,
        ),
    }  # fmt: skip


@pytest.fixture
def hpsv2(tmp_path, monkeypatch):
    """The golden tiny checkpoint in the published file's format, through the published model's loader."""
    weights, _ = golden("rewards/hpsv2_tiny_weights")
    monkeypatch.setattr(clip_scores, "VIT_H_14", tiny_vit_h_14())
    torch.save({"state_dict": weights}, tmp_path / clip_scores.HPSV2_FILE)
    clip_tokenizer(99, 77).save_pretrained(tmp_path)
    register(monkeypatch, "tiny-hps", HPS, tmp_path, tokenizer=Source(str(tmp_path)))
    return load_reward("tiny-hps")


def test_hpsv2_features_and_score_are_the_reference_ones(hpsv2):
    io, _ = golden("rewards/hpsv2_tiny_io")
    image, text = hpsv2.image_features(io["pixel_values"]), hpsv2.encode_tokens(io["input_ids"])
    torch.testing.assert_close(image, io["image_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(text, io["text_features"], atol=1e-5, rtol=0)
    assert relative(hpsv2.scale * (image * text).sum(-1), io["hps_score"]) < 1e-4


def test_hpsv2_scores_whole_images_as_its_official_score_function(hpsv2):
    io, _ = golden("rewards/hpsv2_tiny_io")
    hpsv2.text_features = lambda prompt: hpsv2.encode_tokens(io["input_ids"][:1])[0]
    for i in range(2):  # a square and a wide image
        image = io[f"pil{i}_uint8_hwc"].permute(2, 0, 1)[None] / 255
        torch.testing.assert_close(hpsv2.pixels(image)[0], io[f"pil{i}_preprocessed"], atol=1e-4, rtol=0)
        assert relative(hpsv2(image, ["prompt 0"]), io["pil_scores_prompt0"][i]) < 1e-4


def test_hpsv2_tokens_are_open_clips(hpsv2):
    """Padding differs (open_clip: 0, here: the end token) and must not matter."""
    ids = torch.tensor([[97, 3, 4, 98, 0, 0, 0, 0, 0, 0, 0, 0], [97, 3, 4, 98, 98, 98, 98, 98, 98, 98, 98, 98]])
    torch.testing.assert_close(*hpsv2.encode_tokens(ids))


def test_a_checkpoint_with_other_parameters_is_refused(hpsv2, tmp_path, monkeypatch):
    folder = tmp_path / "other"
    folder.mkdir()
    weights, _ = golden("rewards/hpsv2_tiny_weights")
    clip_tokenizer(99, 77).save_pretrained(folder)
    for name, change in (("ln_final.bias", None), ("visual.extra", torch.zeros(1))):
        changed = dict(weights)
        if change is None:
            del changed[name]
        else:
            changed[name] = change
        torch.save({"state_dict": changed}, folder / clip_scores.HPSV2_FILE)
        register(
            monkeypatch,
            "other-hps",
            "psd.models.rewards.clip_scores:HPSv2Reward",
            folder,
            tokenizer=Source(str(folder)),
        )
        with pytest.raises(RequestError, match="'other-hps' are incomplete or damaged"):
            load_reward("other-hps")


# PickScore and toybox/preference


@pytest.fixture
def pickscore(tmp_path, monkeypatch):
    """The fixture's weights as a transformers folder of its time (position_ids in the file)."""
    weights, about = golden("rewards/pickscore_tiny_weights")
    folder = tmp_path / "pickscore"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", **about["hf_config"]}))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    clip_tokenizer(99, 16).save_pretrained(folder)
    register(monkeypatch, "tiny-pick", table.CLIP, folder)
    return load_reward("tiny-pick")


def test_pickscore_is_exp_logit_scale_times_cosine(pickscore):
    io, about = golden("rewards/pickscore_tiny_io")
    assert pickscore.scale.item() == pytest.approx(math.exp(about["logit_scale"]), rel=1e-6)
    text = pickscore.encode_tokens(io["input_ids"])
    image = pickscore.image_features(io["pixel_values"])
    assert relative(pickscore.scale * text @ image.T, io["scores"]) < 1e-4


def test_clip_reward_pairs_image_i_with_prompt_i_and_is_differentiable(pickscore):
    images = torch.rand(3, 3, 40, 56, requires_grad=True)
    prompts = ["red lamp", "blue", "red lamp"]
    scores = pickscore(images, prompts)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    for i, prompt in enumerate(prompts):
        torch.testing.assert_close(scores[i], pickscore(images[i : i + 1], [prompt])[0])
    scores.sum().backward()
    assert images.grad.isfinite().all() and (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert not any(parameter.requires_grad for parameter in pickscore.model.parameters())
    with pytest.raises(ValueError, match="3 images but 1 prompts"):
        pickscore(images, prompts[:1])


def test_gradient_of_the_score_is_its_finite_difference(pickscore):
    torch.manual_seed(0)
    pickscore.model.double()
    try:
        features = pickscore.text_features("red lamp").double()

        def score(images):
            pixels = (shorter_side(images, 32) - clip_mean) / clip_std
            return pickscore.image_features(pixels) @ features

        image = (0.3 + 0.4 * torch.rand(1, 3, 32, 32, dtype=torch.float64)).requires_grad_()
        (gradient,) = torch.autograd.grad(score(image).sum(), image)
        direction = torch.randn_like(image)
        with torch.no_grad():
            difference = (score(image + 1e-5 * direction) - score(image - 1e-5 * direction)) / 2e-5
        assert (gradient * direction).sum().item() == pytest.approx(difference.item(), rel=1e-4)
    finally:
        pickscore.model.float()


def test_a_prompts_text_is_encoded_once_and_serves_autograd_after_inference_mode(pickscore, monkeypatch):
    encoded, encode = [], pickscore.encode_tokens
    monkeypatch.setattr(pickscore, "encode_tokens", lambda ids: encoded.append(len(ids)) or encode(ids))
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    with torch.inference_mode():
        pickscore(images.detach(), ["first asked here"] * 2)
    pickscore(images, ["first asked here"] * 2).sum().backward()
    assert encoded == [1] and images.grad.abs().sum() > 0
    for i in range(clip_scores.TEXT_CACHE + 10):
        pickscore.text_features("".join(chr(ord("a") + int(digit)) for digit in str(i)))
    assert pickscore.text_features.cache_info().currsize == clip_scores.TEXT_CACHE


def test_a_folders_own_mean_and_std_are_used(pickscore, tmp_path, monkeypatch):
    folder = shutil.copytree(tmp_path / "pickscore", tmp_path / "half")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    register(monkeypatch, "half", table.CLIP, folder)
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(load_reward("half").pixels(images), (images - 0.5) / 0.25)
    torch.testing.assert_close(pickscore.pixels(images), (images - clip_mean) / clip_std)


# ImageReward and toybox/judge


def test_image_reward_names_and_shapes_cover_the_full_size_model():
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    published = json.loads((GOLDEN / "rewards/full_keys_imagereward.json").read_text())["keys"]
    weights = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    parts = image_reward.image_reward_to_transformers(weights)
    with torch.device("meta"):
        vision = BlipVisionModel(BlipVisionConfig(**image_reward.VIT_L_16))
        text = BlipTextModel(BlipTextConfig(**image_reward.BERT_BASE), add_pooling_layer=False)
    for part, model in (("vision", vision), ("text", text)):
        got = {name: weight.shape for name, weight in parts[part].items()}
        assert got == {name: weight.shape for name, weight in model.state_dict().items()}
    used = 3 * len(published) - 3 * sum(map(len, parts.values()))
    assert used == 3 * 5  # vision_proj, text_proj (weight and bias each) and position_ids are left out
    head = image_reward.linear_head({name: torch.zeros(weight.shape) for name, weight in parts["head"].items()})
    assert [layer.out_features for layer in head] == [1024, 128, 64, 16, 1]


def tiny_blip() -> tuple[dict, dict]:
    """What stands in for image_reward.VIT_L_16 and BERT_BASE, of the golden checkpoint."""
    _, about = golden("rewards/imagereward_tiny_weights")
    vit, bert = about["vit"], about["med_config"]
    vision = dict(
        hidden_size=vit["embed_dim"], intermediate_size=4 * vit["embed_dim"], num_hidden_layers=vit["depth"],
        num_attention_heads=vit["num_heads"], image_size=vit["img_size"], patch_size=vit["patch_size"],
    )  # fmt: skip
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    text = {name: bert[name] for name in (*sizes, "max_position_embeddings")}
    text["encoder_hidden_size"] = vit["embed_dim"]
    return image_reward.VIT_L_16 | vision, image_reward.BERT_BASE | text


@pytest.fixture
def tiny_image_reward(tmp_path, monkeypatch):
    """The golden tiny checkpoint in the published file's format, through the published model's loader."""
    weights, _ = golden("rewards/imagereward_tiny_weights")
    vision, text = tiny_blip()
    monkeypatch.setattr(image_reward, "VIT_L_16", vision)
    monkeypatch.setattr(image_reward, "BERT_BASE", text)
    torch.save(weights, tmp_path / image_reward.IMAGE_REWARD_FILE)
    bert_tokenizer(128).save_pretrained(tmp_path / "bert")  # [DEC] and [ENC] make 130
    source = Source(str(tmp_path / "bert"))
    register(monkeypatch, "tiny-ir", "psd.models.rewards.image_reward:PublishedImageReward", tmp_path, tokenizer=source)
    return load_reward("tiny-ir")


def test_image_reward_scores_and_gradients_are_the_reference_ones(tiny_image_reward):
    io, _ = golden("rewards/imagereward_tiny_io")
    pixels = io["pixel_values"].requires_grad_()
    score = tiny_image_reward.score(pixels, io["input_ids"], io["attention_mask"])
    assert relative(score, io["score"][:, 0]) < 1e-4
    assert relative(score, io["score_if_padding_not_masked"][:, 0]) > 1e-3
    score.sum().backward()
    assert relative(pixels.grad, io["dscoresum_dpixels"]) < 1e-3
    torch.testing.assert_close(
        tiny_image_reward.vision(pixels).last_hidden_state, io["image_embeds"], atol=1e-4, rtol=1e-4
    )


def test_image_reward_reads_prompts_as_bert_does(tiny_image_reward):
    assert tiny_image_reward.max_tokens == 35
    ids = tiny_image_reward.tokenizer("a red mushroom").input_ids
    assert ids == [2, 5, 6, 8, 3]  # starts with [CLS], not with BLIP's [ENC]
    images, prompts = torch.rand(2, 3, 50, 70), ["a red mushroom", "blue lamp " * 40]
    scores = tiny_image_reward(images, prompts)
    for i in range(2):
        torch.testing.assert_close(scores[i], tiny_image_reward(images[i : i + 1], prompts[i : i + 1])[0])


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory) -> Path:
    """The format of toybox/judge."""
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rewards") / "judge"
    size = dict(num_hidden_layers=1, num_attention_heads=2)
    vision = BlipVisionConfig(
        hidden_size=16, intermediate_size=32, image_size=32, patch_size=8, initializer_range=0.1, **size
    )
    tokens = dict(vocab_size=40, bos_token_id=2, sep_token_id=3, eos_token_id=3, pad_token_id=0)
    text = BlipTextConfig(
        hidden_size=24, intermediate_size=32, max_position_embeddings=12, encoder_hidden_size=16, is_decoder=True,
        initializer_range=0.2, **tokens, **size,
    )  # fmt: skip
    BlipVisionModel(vision).save_pretrained(folder / "vision")
    BlipTextModel(text, add_pooling_layer=False).save_pretrained(folder / "text")
    bert_tokenizer(40).save_pretrained(folder / "tokenizer")
    head = torch.nn.Sequential(torch.nn.Linear(24, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1))
    save_file(head.state_dict(), folder / "head.safetensors")
    (folder / "reward_config.json").write_text(json.dumps({"mean": 0.25, "std": 2.0, "max_length": 10}))
    return folder


def test_a_judge_folder_loads_and_scores(judge_folder, monkeypatch):
    register(monkeypatch, "judge", table.BLIP, judge_folder)
    judge = load_reward("judge")
    assert load_reward("judge") is judge
    images = torch.rand(2, 3, 32, 32, requires_grad=True)
    red, blue = judge(images, ["a red lamp"] * 2), judge(images, ["blue mushroom"] * 2)
    assert red.shape == (2,) and (red - blue).abs().min() > 1e-4  # reads the prompt
    assert (red[0] - red[1]).abs() > 1e-5  # and looks at the image
    red.sum().backward()
    assert images.grad.abs().sum() > 0

    weights = load_file(judge_folder / "head.safetensors")
    tokens = judge.tokenizer(["a red lamp"] * 2, padding="max_length", max_length=10, return_tensors="pt")
    pixels = (images - clip_mean) / clip_std
    with torch.no_grad():
        embeds = judge.vision(pixels).last_hidden_state
        first = judge.text(**tokens, encoder_hidden_states=embeds).last_hidden_state[:, 0]
        raw = (first @ weights["0.weight"].T + weights["0.bias"]) @ weights["2.weight"].T + weights["2.bias"]
    torch.testing.assert_close(red, (raw[:, 0] - 0.25) / 2.0)


@pytest.mark.parametrize(
    "file",
    [
        "head.safetensors",
        "reward_config.json",
        "text/model.safetensors",
        "vision/config.json",
        "tokenizer/tokenizer.json",
    ],
)
def test_a_missing_or_damaged_judge_file_is_one_sentence_without_paths(file, judge_folder, tmp_path, monkeypatch):
    for damage in (Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-20])):
        folder = shutil.copytree(judge_folder, tmp_path / damage.__name__)
        damage(folder / file)
        register(monkeypatch, "broken-judge", table.BLIP, folder)
        with pytest.raises(RequestError) as refusal:
            load_reward("broken-judge")
        sentence = str(refusal.value)
        assert "'broken-judge'" in sentence and str(tmp_path) not in sentence and "\n" not in sentence


# Aesthetic predictor


def make_clip_l(folder: Path) -> None:
    """A tiny CLIP that embeds in 768 numbers, as the published head wants it."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, projection_dim=768)
    config = dict(vision_config=dict(image_size=224, patch_size=56, **size), text_config=dict(vocab_size=99, **size))
    CLIPModel(CLIPConfig(projection_dim=768, **config)).save_pretrained(folder)


def make_aesthetic_head(folder: Path) -> None:
    """The golden head under the published file's name."""
    weights, _ = golden("rewards/aesthetic_weights_fp16")
    torch.save({name: weight.float() for name, weight in weights.items()}, folder / aesthetic.AESTHETIC_FILE)


@pytest.fixture(scope="module")
def aesthetic_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewards") / "aesthetic"
    make_clip_l(folder)
    make_aesthetic_head(folder)
    return folder


@pytest.fixture
def tiny_aesthetic(aesthetic_folder, monkeypatch):
    register(monkeypatch, "tiny", AESTHETIC, aesthetic_folder, encoder=Source(str(aesthetic_folder)))
    return load_reward("tiny")


def test_the_aesthetic_score_is_the_reference_one(tiny_aesthetic):
    io, about = golden("rewards/aesthetic_io")
    score = tiny_aesthetic.score(io["embeddings"])
    assert relative(score, io["score"][:, 0]) < 1e-4
    assert relative(score, io["score_if_not_normalised"][:, 0]) > 1e-2
    layers = [list(layer.weight.shape) for layer in tiny_aesthetic.head]
    assert layers == [about["released_weights"]["keys"][f"layers.{i}.weight"] for i in (0, 2, 4, 6, 7)]


def test_the_aesthetic_encoder_sees_openais_preprocessing(tiny_aesthetic):
    seen = []
    handle = tiny_aesthetic.vision.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tiny_aesthetic(golden_image("wide"), ["unread"])
    handle.remove()
    assert (seen[0][0] - golden_pixels("wide", "imagereward")).abs().max() < 1.5 * GREY_LEVEL


def test_the_aesthetic_score_reads_the_image_alone_and_is_differentiable(tiny_aesthetic):
    images = torch.rand(3, 3, 250, 300, requires_grad=True)
    scores = tiny_aesthetic(images, ["a", "b", "c"])
    assert scores.shape == (3,) and scores.dtype == torch.float32 and scores.std() > 0
    for i in range(3):
        torch.testing.assert_close(scores[i], tiny_aesthetic(images[i : i + 1], ["other"])[0])
    scores.sum().backward()
    assert images.grad.isfinite().all() and (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert not any(parameter.requires_grad for parameter in tiny_aesthetic.vision.parameters())


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("exploded"),)


def test_a_checkpoint_with_code_in_it_is_refused_unread(aesthetic_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"layers.0.weight": Bomb()}, tmp_path / aesthetic.AESTHETIC_FILE)
    register(monkeypatch, "bomb", AESTHETIC, tmp_path, encoder=Source(str(aesthetic_folder)))
    with pytest.raises(RequestError, match="A file of 'bomb' is damaged"):
        load_reward("bomb")
    assert not (tmp_path / "exploded").exists()


def test_a_head_for_another_encoder_is_refused(aesthetic_folder, tmp_path, monkeypatch):
    torch.save(
        {"layers.0.weight": torch.zeros(1, 512), "layers.0.bias": torch.zeros(1)}, tmp_path / "aesthetic-model.pth"
    )
    register(monkeypatch, "other-head", AESTHETIC, tmp_path, encoder=Source(str(aesthetic_folder)))
    with pytest.raises(RequestError, match="'other-head' are incomplete or damaged"):
        load_reward("other-head")


# MPS


def test_mps_names_and_shapes_cover_the_full_size_model():
    """The rehosted module holds the published one as `mps`: its 4.42 GB are these tensors in float32."""
    from transformers import CLIPConfig, CLIPModel

    published = json.loads((GOLDEN / "rewards/full_keys_mps.json").read_text())["keys"]
    weights = {f"mps.{name}": torch.empty(shape, device="meta") for name, shape in published.items()}
    assert sum(4 * weight.numel() for weight in weights.values()) == pytest.approx(4.42e9, rel=1e-3)
    with torch.device("meta"):
        models = CLIPModel(CLIPConfig(**clip_scores.VIT_H_14)), mps.CrossModel(**mps.CROSS)
    for part, model in zip(mps.split_weights(weights), models, strict=True):
        assert {name: weight.shape for name, weight in part.items()} == {
            name: weight.shape for name, weight in model.state_dict().items()
        }
    with pytest.raises(ValueError, match="parameter of another model"):
        mps.split_weights({"model.logit_scale": torch.zeros(())})


def tiny_mps_sizes() -> tuple[dict, dict]:
    """What stands in for mps.VIT_H_14 and CROSS, of the golden checkpoint."""
    _, about = golden("rewards/mps_tiny_weights")
    sizes = about["cross_model"]
    cross = dict(dim=sizes["dim"], layers=sizes["layer_num"], heads=sizes["heads"], dim_head=sizes["dim_head"])
    return {k: v for k, v in about["hf_config"].items() if k != "logit_scale_init_value"}, cross


def make_mps(folder: Path) -> None:
    """The golden tiny checkpoint in the rehost's format."""
    weights, _ = golden("rewards/mps_tiny_weights")
    save_file({f"mps.{name}": weight for name, weight in weights.items()}, folder / mps.MPS_FILE)


@pytest.fixture
def tiny_mps(tmp_path, monkeypatch):
    """The golden tiny checkpoint through the published model's loader."""
    clip, cross = tiny_mps_sizes()
    monkeypatch.setattr(mps, "VIT_H_14", clip)
    monkeypatch.setattr(mps, "CROSS", cross)
    make_mps(tmp_path)
    clip_tokenizer(99, 16).save_pretrained(tmp_path)
    register(monkeypatch, "tiny-mps", MPS, tmp_path, tokenizer=Source(str(tmp_path)))
    return load_reward("tiny-mps")


def test_mps_scores_are_the_published_evaluations(tiny_mps):
    io, about = golden("rewards/mps_tiny_io")
    text, tokens, relevant = tiny_mps.encode_ids(io["prompt_ids"], io["condition_ids"])
    torch.testing.assert_close(tokens, io["text_tokens"], atol=1e-5, rtol=1e-4)
    assert relevant.tolist() == (io["relevance"][:, 0] > about["thresholds"]["eval_script"]).tolist()
    assert relevant.sum() == about["n_tokens_kept_eval"]
    batch = [part.expand(3, *part.shape[1:]) for part in (text, tokens, relevant)]
    assert relative(tiny_mps.score(io["pixel_values"], *batch), io["scores"][:, 0]) < 1e-4


def test_mps_pairs_image_i_with_prompt_i_and_is_differentiable(tiny_mps):
    images = torch.rand(2, 3, 40, 56, requires_grad=True)
    prompts = ["red lamp", "blue"]
    scores = tiny_mps(images, prompts)
    assert scores.shape == (2,) and scores.dtype == torch.float32
    for i in range(2):
        torch.testing.assert_close(scores[i], tiny_mps(images[i : i + 1], prompts[i : i + 1])[0])
    scores.sum().backward()
    assert images.grad.isfinite().all() and (images.grad.flatten(1).norm(dim=1) > 0).all()
    assert not any(parameter.requires_grad for parameter in tiny_mps.cross.parameters())


# The attribute classifier


def test_attribute_classifier_gives_log_probabilities_per_group(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    groups = [["kind", ["cube", "mushroom", "lamp"]], ["colour", ["red", "blue"]]]  # not in alphabetical order
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5, groups=groups
    )
    model = ResNetForImageClassification(config).eval()
    model.save_pretrained(tmp_path / "attributes")
    classifier = load_attributes(source=Source(str(tmp_path / "attributes")))
    assert list(classifier.groups.items()) == [("kind", ("cube", "mushroom", "lamp")), ("colour", ("red", "blue"))]
    images = torch.rand(2, 3, 128, 128)
    got = classifier(images)
    with torch.no_grad():
        logits = model((images - clip_mean) / clip_std).logits
    torch.testing.assert_close(got["kind"], logits[:, :3].log_softmax(-1))
    torch.testing.assert_close(got["colour"], logits[:, 3:].log_softmax(-1))
    assert classifier(torch.rand(1, 3, 200, 160))["kind"].shape == (1, 3)

    for i, misfit in enumerate((groups[:1], dict(groups))):
        config.groups = misfit
        ResNetForImageClassification(config).save_pretrained(tmp_path / f"misfit-{i}")
        with pytest.raises(RequestError, match="incomplete or damaged"):
            load_attributes(source=Source(str(tmp_path / f"misfit-{i}")))


# The table


@pytest.mark.parametrize(
    ("fixture", "tower"),
    [
        ("pickscore", "model.vision_model"), ("tiny_mps", "model.vision_model"), ("tiny_image_reward", "vision"),
        ("tiny_aesthetic", "vision"),
    ],
)  # fmt: skip
def test_images_beyond_memory_go_in_parts_and_score_the_same(fixture: str, tower: str, request, monkeypatch):
    reward = request.getfixturevalue(fixture)
    monkeypatch.setattr(reward, "in_parts", InParts())
    images, prompts, seen = torch.rand(5, 3, 40, 56), ["red lamp", "blue", "red", "lamp", "blue lamp"], []

    def small_memory(module: torch.nn.Module, inputs: tuple, named: dict) -> None:
        seen.append(len((*inputs, *named.values())[0]))
        if seen[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    with torch.no_grad():
        whole = reward(images, prompts)
        handle = attrgetter(tower)(reward).register_forward_pre_hook(small_memory, with_kwargs=True)
        try:
            for tries in ([5, 2, 2, 1], [2, 2, 1]):  # the limit is remembered
                seen.clear()
                torch.testing.assert_close(reward(images, prompts), whole, atol=1e-5, rtol=1e-5)
                assert seen == tries
        finally:
            handle.remove()
    assert whole.std() > 0


def test_unknown_and_missing_rewards_are_refused(monkeypatch):
    with pytest.raises(RequestError, match=r"reward 'clipscore' is not known; did you mean pickscore\? Known: toybox"):
        load_reward("clipscore")
    register(monkeypatch, "gone", table.CLIP, Path("toybox/no-such-folder"))
    with pytest.raises(RequestError, match="folder of 'gone' is missing"):
        load_reward("gone")


def test_published_rewards_are_pinned_to_a_commit():
    for info in REWARDS.values():
        unknown = ("RE-N-Y/mpsv1", "yejunliang23/Reward3D")  # whose commits are not known here
        pinned = len(info.source.revision) == 40 or info.source.name in unknown
        assert info.source.is_folder or (pinned and info.download_mb > 0)
        for part in (info.tokenizer, info.encoder):
            assert part is None or part.is_folder or len(part.revision) == 40
    assert REWARDS["hpsv2.1"].tokenizer == CLIP_H and REWARDS["toybox/judge"].held_out


def test_only_a_gpu_multiplies_in_tf32():
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    try:
        matmul.allow_tf32 = False
        use_tf32("cpu")
        assert not matmul.allow_tf32
        use_tf32("cuda:0")
        assert matmul.allow_tf32
        assert torch.backends.mkldnn.matmul.fp32_precision != "tf32"  # a CPU's
    finally:
        matmul.allow_tf32 = before
