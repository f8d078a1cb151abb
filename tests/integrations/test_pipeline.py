"""The pipeline: a video of blocks equals the loop by hand, is streamed, changes prompts, goes on from a clip."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import av
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

import tiny_chat
from kvtiers import GeometryError, PolicyError, UnsupportedModelError
from kvtiers_diffusers import CausalWanPipeline, StreamingDecoder, load_causal_checkpoint, tiered, write_video
from kvtiers_diffusers.schedule import clean, noised, warped
from kvtiers_packforcing.network import HighResolution
from strategies import unchecked
from tiny_pipeline import SMALL, pipeline, seeded
from tiny_wan import GOLDENS, build, golden, prompt


def test_the_schedule_is_the_published_one() -> None:
    assert warped([1000, 750, 500, 250], 5.0) == pytest.approx([1000, 937.5, 833.3333, 625])
    block, noise = torch.randn(2, 1, 3, 1, 4, 4, generator=seeded()).unbind(0)
    assert torch.allclose(clean(noised(block, noise, 625.0), noise - block, 625.0), block, atol=1e-5)
    for wrong in ([], [500, 750], [1001], [500, 0], [500, 500]):
        with pytest.raises(PolicyError, match="timesteps fall from at most 1000 to more than 0"):
            warped(wrong, 5.0)


@torch.no_grad()
def test_a_video_is_the_loop_of_blocks_and_is_streamed_as_it_is_decoded() -> None:
    made, text, random = pipeline(), prompt(), seeded()
    streamed = list(made.stream(prompt_embeds=text, num_frames=21, generator=seeded(), output_type="pt", **SMALL))
    decoder, flows = StreamingDecoder(made.vae), []
    with tiered(made.transformer, "sink-rolling-window", sink=2, recent=2) as wan:
        for _ in range(3):
            noises = [torch.randn(1, 16, 2, 8, 8, generator=random) for _ in range(2)]
            block = clean(noises[0], wan.denoise(noises[0], 1000.0, text), 1000.0)
            timestep = warped([500], 5.0)[0]
            noisy = noised(block, noises[1], timestep)
            block = clean(noisy, wan.denoise(noisy, timestep, text), timestep)
            wan.commit(block, text)
            flows.append(decoder.decode(block))
    assert [clip.shape[1] for clip in streamed] == [5, 8, 8]
    for mine, theirs in zip(streamed, flows, strict=True):
        assert torch.allclose(mine, (theirs.transpose(1, 2) / 2 + 0.5), atol=1e-5)
    whole = made(prompt_embeds=text, num_frames=21, generator=seeded(), output_type="np", **SMALL).frames
    assert np.allclose(whole, torch.cat(streamed, 1).permute(0, 1, 3, 4, 2).numpy(), atol=1e-5)
    assert not any(type(p).__module__.startswith("kvtiers") for p in made.transformer.attn_processors.values())


@pytest.mark.parametrize(("length", "frames"), [({"num_frames": 1}, 1), ({"num_frames": 10}, 10), ({"seconds": 1}, 16)])
def test_a_video_is_as_long_as_was_asked(length: dict[str, Any], frames: int) -> None:
    made = pipeline()
    for kind, axis in (("np", 1), ("pt", 1)):
        found = made(prompt_embeds=prompt(), generator=seeded(), output_type=kind, **length, **SMALL).frames
        assert found.shape[axis] == frames
    pictures = made(prompt_embeds=prompt(), generator=seeded(), output_type="pil", **length, **SMALL).frames
    assert [len(row) for row in pictures] == [frames]
    latents = made(
        prompt_embeds=prompt(), generator=seeded(), output_type="latent", return_dict=False, **length, **SMALL
    )
    assert latents[0].shape == (1, 16, 1 + -(-(frames - 1) // 4), 8, 8)


def test_a_stopped_stream_gives_the_model_back() -> None:
    made = pipeline()
    own = dict(made.transformer.attn_processors)
    clips = made.stream(prompt_embeds=prompt(), seconds=600, generator=seeded(), **SMALL)
    next(clips)
    assert made.transformer.attn_processors != own
    clips.close()
    assert made.transformer.attn_processors == own


def test_a_prompt_may_change_and_the_blocks_before_stay() -> None:
    made, first, second = pipeline(), prompt(seed=1), prompt(seed=2)
    options = {"num_frames": 29, "output_type": "latent", **SMALL}
    one = made(prompt_embeds=first, generator=seeded(), **options).frames
    changed = made(prompt_embeds={0: first, 1.0: second}, generator=seeded(), **options).frames
    assert torch.equal(changed[:, :, :4], one[:, :, :4])
    assert not torch.equal(changed[:, :, 4:6], one[:, :, 4:6])


def test_words_go_through_the_text_encoder_once_a_prompt() -> None:
    torch.manual_seed(0)
    words = tiny_chat.tokenizer()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 4}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(words), **sizes)).eval()
    made = pipeline(tokenizer=words, text_encoder=encoder)
    graphs: list[bool] = []
    encoder.register_forward_hook(lambda *called: graphs.append(called[2].last_hidden_state.requires_grad))
    options = {"num_frames": 13, "output_type": "latent", **SMALL}
    found = made(["a ship", "a lighthouse"], generator=[seeded(1), seeded(2)], **options).frames
    assert len(graphs) == 1
    again = torch.cat(list(made.stream({0: "a ship", 0.3: "a lighthouse"}, generator=seeded(1), **options)), 2)
    assert graphs == [False] * 3
    assert torch.allclose(again[0, :, :2], found[0, :, :2], atol=1e-5)
    assert not torch.allclose(again[0, :, 2:], found[0, :, 2:], atol=1e-3)


def test_a_video_goes_on_from_a_clip() -> None:
    """With its own first blocks as the clip and the same noise, it is the video it was."""
    made, random = pipeline(), seeded()
    options = {"output_type": "latent", "prompt_embeds": prompt(), **SMALL}
    whole = made(num_frames=29, generator=random, **options).frames
    random = seeded()
    for _ in range(2 * 2):
        torch.randn(1, 16, 2, 8, 8, generator=random)
    rest = made(num_frames=16, generator=random, clip=whole[:, :, :4], **options).frames
    assert torch.allclose(rest, whole[:, :, 4:], atol=1e-5)
    options["output_type"] = "pt"
    clips = list(made.stream(num_frames=16, generator=seeded(), clip=whole[:, :, :4], **options))
    assert [clip.shape[1] for clip in clips] == [8, 8]


@pytest.mark.parametrize("second", [0.5, 1.5])
def test_prompts_change_at_their_second_whether_blocks_are_made_or_given_as_a_clip(second: float) -> None:
    """Blocks begin every half second, and two of them are the clip."""
    made, texts = pipeline(), {0: prompt(seed=1), second: prompt(seed=2)}
    options = {"output_type": "latent", "prompt_embeds": texts, **SMALL}
    whole = made(num_frames=29, generator=seeded(), **options).frames
    random = seeded()
    for _ in range(2 * 2):
        torch.randn(1, 16, 2, 8, 8, generator=random)
    rest = made(num_frames=16, generator=random, clip=whole[:, :, :4], **options).frames
    assert torch.allclose(rest, whole[:, :, 4:], atol=1e-5)


def test_a_callback_sees_every_step_and_may_change_the_block() -> None:
    made, seen = pipeline(), []

    def callback(_: Any, step: int, timestep: float, held: dict[str, Any]) -> dict[str, Any]:
        seen.append((held["block"], step, round(timestep)))
        return {"latents": torch.zeros_like(held["latents"])}

    found = made(
        prompt_embeds=prompt(), num_frames=13, callback_on_step_end=callback, output_type="latent", **SMALL
    ).frames
    assert seen == [(0, 0, 1000), (0, 1, 833), (1, 0, 1000), (1, 1, 833)]
    assert not found.any()


def test_packforcing_is_the_default_and_rows_have_prompts_of_their_own() -> None:
    made = pipeline()
    options = {**SMALL, "policy": "packforcing", "compressor": ("dual-branch", {"branches": "lr"}), "top_k": 2}
    texts = torch.cat([prompt(seed=1), prompt(seed=2)])
    both = made(prompt_embeds=texts, num_frames=45, generator=[seeded(1), seeded(2)], output_type="latent", **options)
    for row in (0, 1):
        alone = made(
            prompt_embeds=texts[row : row + 1],
            num_frames=45,
            generator=seeded(row + 1),
            output_type="latent",
            **options,
        )
        assert torch.allclose(both.frames[row], alone.frames[0], atol=1e-4)


def test_a_video_file_has_the_frames_that_were_written(tmp_path: Path) -> None:
    made = pipeline()
    clips = made.stream(prompt_embeds=prompt(), num_frames=13, generator=seeded(), fps=8, **SMALL)
    assert write_video(tmp_path / "video.mp4", clips) == 13
    with av.open(str(tmp_path / "video.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert file.streams.video[0].average_rate == 8
    assert [frame.shape for frame in frames] == [(64, 64, 3)] * 13
    flat = torch.full((1, 4, 3, 16, 16), 0.25)
    assert write_video(tmp_path / "flat.mp4", [flat]) == 4
    with av.open(str(tmp_path / "flat.mp4")) as file:
        found = next(file.decode(video=0)).to_ndarray(format="rgb24")
    assert abs(found.astype(float).mean() - 64) < 4


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        pytest.param([], "at least one frame, got no clips", id="no clips"),
        pytest.param([torch.zeros(1, 0, 3, 16, 16)], "at least one frame", id="no frames"),
        pytest.param([torch.zeros(1, 16, 2, 8, 8)], "3 channels, .* got .1, 16, 2, 8, 8.; stream them", id="latents"),
        pytest.param([torch.zeros(4, 3, 16, 16)], r"got \(4, 3, 16, 16\)", id="one row"),
        pytest.param([np.zeros((1, 2, 16, 16, 4))], r"got \(1, 2, 16, 16, 4\)", id="arrays"),
        pytest.param([[["a picture"]]], "got a list; stream them as 'np' or 'pt'", id="pictures"),
        pytest.param([torch.zeros(1, 1, 3, 15, 16)], "even height and width, got 15 x 16", id="odd"),
    ],
)
def test_what_is_no_video_is_refused_and_no_file_is_made(clips: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(GeometryError, match=message):
        write_video(tmp_path / "video.mp4", clips)
    assert not (tmp_path / "video.mp4").exists()


def test_it_is_saved_and_loaded_as_any_pipeline(tmp_path: Path) -> None:
    made = pipeline()
    made.save_pretrained(tmp_path)
    loaded = CausalWanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    options = {"prompt_embeds": prompt(), "num_frames": 5, "output_type": "latent", **SMALL}
    assert torch.equal(loaded(generator=seeded(), **options).frames, made(generator=seeded(), **options).frames)


def test_a_compressor_is_part_of_the_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = HighResolution(channels=16, width=48, widths=(8, 8, 8, 8))
    torch.nn.init.normal_(network.layers[-1].weight)
    made = pipeline(compressor=network)
    made.save_pretrained(tmp_path)
    loaded = CausalWanPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.compressor, HighResolution)
    options = {
        **SMALL,
        "policy": "packforcing",
        "branches": "hr",
        "top_k": 2,
        "num_frames": 37,
        "output_type": "latent",
    }
    flows = [part(prompt_embeds=prompt(), generator=seeded(), **options).frames for part in (made, loaded)]
    assert torch.equal(*flows)
    with torch.no_grad():
        network.layers[-1].weight.mul_(2)
    assert not torch.equal(made(prompt_embeds=prompt(), generator=seeded(), **options).frames, flows[0])
    assert loaded.to(torch.float64).compressor.dtype == torch.float64


# ---------------------------------------------------------------- checkpoints


def original(rename: str) -> dict[str, Tensor]:
    """The published code's weights, with a prefix in front of every name."""
    from safetensors.torch import load_file

    found = load_file(GOLDENS / "causal_wan_full.safetensors")
    weights = {k.removeprefix("weights.model."): part for k, part in found.items() if k.startswith("weights.")}
    return {rename + key: part for key, part in weights.items()}


@pytest.mark.parametrize("prefix", ["", "model.", "model._fsdp_wrapped_module."])
@pytest.mark.parametrize("inside", ["generator_ema", "generator", None])
def test_published_checkpoints_load_into_an_unmodified_model(prefix: str, inside: str | None, tmp_path: Path) -> None:
    wanted = golden("full").model
    model = build(heads=2, head_dim=48, text_dim=32, freq_dim=64, ffn_dim=192, seed=1)
    weights = original(prefix)
    path = tmp_path / "model.pt"
    other = {key: torch.zeros_like(part) for key, part in weights.items()}
    torch.save({inside: weights, "critic": other} if inside else weights, path)
    load_causal_checkpoint(model, path)
    for name, part in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], part)
    save_file({k: part.contiguous() for k, part in wanted.state_dict().items()}, tmp_path / "own.safetensors")
    load_causal_checkpoint(model, tmp_path / "own.safetensors")


def test_names_that_wrappers_added_anywhere_are_understood(tmp_path: Path) -> None:
    wanted = golden("full").model.state_dict()
    model = build(heads=2, head_dim=48, text_dim=32, freq_dim=64, ffn_dim=192, seed=1)
    wrapped = {
        key.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.").replace(
            "blocks.1.", "blocks.1._orig_mod."
        ): part
        for key, part in original("_orig_mod.model._fsdp_wrapped_module.").items()
    }
    torch.save({"generator": wrapped}, tmp_path / "model.pt")
    load_causal_checkpoint(model, tmp_path / "model.pt")
    assert all(torch.equal(part, wanted[name]) for name, part in model.state_dict().items())


def test_an_average_that_training_had_not_begun_is_passed_over(tmp_path: Path) -> None:
    wanted = golden("full").model.state_dict()
    model = build(heads=2, head_dim=48, text_dim=32, freq_dim=64, ffn_dim=192, seed=1)
    torch.save({"generator_ema": {}, "generator": original("model.")}, tmp_path / "model.pt")
    load_causal_checkpoint(model, tmp_path / "model.pt")
    assert all(torch.equal(part, wanted[name]) for name, part in model.state_dict().items())


def test_a_checkpoint_that_does_not_fit_is_refused_by_its_keys_and_changes_nothing(tmp_path: Path) -> None:
    model = build(heads=2, head_dim=48, text_dim=32, freq_dim=64, ffn_dim=192, seed=1)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    weights = original("model.")
    weights.pop("model.blocks.0.self_attn.q.weight")
    weights["model.blocks.0.strange"] = torch.zeros(1)
    weights["model.blocks.1.self_attn.k.bias"] = torch.zeros(3)
    torch.save({"generator": weights}, tmp_path / "model.pt")
    with pytest.raises(UnsupportedModelError) as caught:
        load_causal_checkpoint(model, tmp_path / "model.pt")
    message = str(caught.value)
    assert "1 missing: blocks.0.attn1.to_q.weight" in message
    assert "1 unexpected: blocks.0.strange" in message
    assert "1 of another shape: blocks.1.attn1.to_k.bias (3,) for (96,)" in message
    assert all(torch.equal(model.state_dict()[name], part) for name, part in before.items())
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(UnsupportedModelError, match="cannot be read as a checkpoint"):
        load_causal_checkpoint(model, tmp_path / "text.pt")
    torch.save({"generator": {"step": 3}}, tmp_path / "number.pt")
    with pytest.raises(UnsupportedModelError, match="holds no weights under any of generator_ema, generator"):
        load_causal_checkpoint(model, tmp_path / "number.pt")


def test_a_small_checkpoint_that_unpacks_to_a_large_one_is_refused_unread(tmp_path: Path) -> None:
    model = build(heads=2, head_dim=48, text_dim=32, freq_dim=64, ffn_dim=192, seed=1)
    torch.save({key: torch.zeros_like(part) for key, part in original("model.").items()}, tmp_path / "whole.pt")
    with zipfile.ZipFile(tmp_path / "whole.pt") as whole, zipfile.ZipFile(tmp_path / "small.pt", "w") as small:
        for entry in whole.namelist():
            small.writestr(entry, whole.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    load_causal_checkpoint(model, tmp_path / "whole.pt")
    before = {name: part.clone() for name, part in golden("full").model.state_dict().items()}
    model.load_state_dict(before)
    with pytest.raises(UnsupportedModelError, match=r"small.pt has [\d,]+ bytes and would unpack to [\d,]+; weights"):
        load_causal_checkpoint(model, tmp_path / "small.pt")
    assert all(torch.equal(model.state_dict()[name], part) for name, part in before.items())


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["pt", "safetensors"])
def test_a_checkpoint_whose_weights_are_not_finite_is_refused_by_their_names(
    wrong: float, kind: str, tmp_path: Path
) -> None:
    model = build(heads=2, head_dim=48, text_dim=32, freq_dim=64, ffn_dim=192, seed=1)
    before = {name: part.clone() for name, part in model.state_dict().items()}
    weights = {key: part.clone() for key, part in original("").items()}
    weights["blocks.0.self_attn.q.weight"][3, 5] = wrong
    path = tmp_path / f"model.{kind}"
    save_file(weights, path) if kind == "safetensors" else torch.save(weights, path)
    with pytest.raises(UnsupportedModelError, match=r"NaN or infinity in 1 weights: blocks.0.attn1.to_q.weight; get"):
        load_causal_checkpoint(model, path)
    assert all(torch.equal(model.state_dict()[name], part) for name, part in before.items())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param({}, PolicyError, "give seconds or num_frames", id="no length"),
        pytest.param({"seconds": 1, "num_frames": 5}, PolicyError, "give seconds or num_frames", id="two lengths"),
        pytest.param({"num_frames": 0}, PolicyError, "num_frames must be a whole .* 1, got 0", id="nothing"),
        pytest.param({"num_frames": 5.5}, PolicyError, "num_frames must be a whole .* got 5.5", id="part of a frame"),
        pytest.param({"seconds": 0.01}, PolicyError, "at least one frame at 16 a second, got 0.01", id="an instant"),
        pytest.param({"seconds": float("nan")}, PolicyError, "finite number, .* got nan", id="seconds nan"),
        pytest.param({"seconds": float("inf")}, PolicyError, "finite number, .* got inf", id="endless"),
        pytest.param({"num_frames": 5, "fps": 0}, PolicyError, "fps must be 0.001 to 1000 .*, got 0", id="fps"),
        pytest.param({"num_frames": 5, "block_frames": 0}, PolicyError, "block_frames must be", id="empty blocks"),
        pytest.param({"num_frames": 5, "block_frames": 2.0}, PolicyError, "block_frames must be", id="uneven blocks"),
        pytest.param({"num_frames": 5, "height": 60}, GeometryError, "of 16 and 16 pixels, got 60", id="height"),
        pytest.param({"num_frames": 5, "width": 0}, PolicyError, "width must be a whole .* got 0", id="no width"),
        pytest.param({"num_frames": 5, "height": -16}, PolicyError, "height must be a whole .* got -16", id="below"),
        pytest.param({"num_frames": 5, "output_type": "gif"}, PolicyError, "np, pt, pil, latent, got 'gif'", id="kind"),
        pytest.param({"num_frames": 5, "timesteps": (500, 600)}, PolicyError, "timesteps fall", id="schedule"),
        pytest.param({"num_frames": 5, "timesteps": (float("nan"),)}, PolicyError, "timesteps fall", id="time nan"),
        pytest.param({"num_frames": 5, "shift": 0.0}, PolicyError, "shift must be a finite .* got 0.0", id="shift 0"),
        pytest.param({"num_frames": 5, "shift": float("inf")}, PolicyError, "shift must be a finite", id="shift inf"),
        pytest.param({"num_frames": 5, "prompt": "a"}, PolicyError, "one of them", id="two prompts"),
        pytest.param(
            {"num_frames": 5, "prompt_embeds": None, "prompt": "a"}, PolicyError, "no text encoder", id="text"
        ),
        pytest.param(
            {"num_frames": 5, "prompt_embeds": None, "prompt": []}, PolicyError, "a prompt is a string", id="no prompt"
        ),
        pytest.param(
            {"num_frames": 5, "prompt_embeds": {3: prompt()}}, PolicyError, "from second 0, got .3", id="late"
        ),
        pytest.param(
            {"num_frames": 5, "prompt_embeds": {0: prompt(), "1": prompt()}},
            PolicyError,
            "got '1'",
            id="second as text",
        ),
        pytest.param(
            {"num_frames": 5, "prompt_embeds": {0: prompt(), 1: prompt(rows=2)}}, GeometryError, "one batch", id="rows"
        ),
        pytest.param(
            {"num_frames": 5, "prompt_embeds": prompt()[0]}, GeometryError, r"words, 32\], got \(6, 32\)", id="one row"
        ),
        pytest.param(
            {"num_frames": 5, "generator": [seeded(), seeded()]},
            GeometryError,
            "each of 1 rows, got 2",
            id="generators",
        ),
        pytest.param(
            {"num_frames": 5, "clip": torch.zeros(1, 16, 0, 8, 8)}, GeometryError, "one or more frames", id="empty clip"
        ),
        pytest.param({"num_frames": 5, "policy": "packforcng"}, PolicyError, "Did you mean", id="policy"),
        pytest.param({"num_frames": 5, "negative_prompt": "blur"}, PolicyError, "only with a guidance", id="negative"),
        pytest.param({"num_frames": 5, "num_inference_steps": 4}, PolicyError, "steps of timesteps", id="steps"),
        pytest.param({"num_frames": 5, "outputtype": "np"}, PolicyError, "itself takes .* output_type", id="option"),
        pytest.param({"num_frames": 5, "rescent": 2}, PolicyError, "no setting 'rescent'; .* 'recent'", id="setting"),
    ],
)
def test_what_cannot_be_made_is_refused_before_anything_runs(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    made = pipeline()
    with unchecked(), pytest.raises(error, match=message):
        made.stream(**{"prompt_embeds": prompt(), **SMALL, **options})


def test_a_video_that_fails_midway_leaves_the_model_whole() -> None:
    made = pipeline()
    own = dict(made.transformer.attn_processors)

    def callback(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made(prompt_embeds=prompt(), num_frames=5, callback_on_step_end=callback, **SMALL)
    assert made.transformer.attn_processors == own
