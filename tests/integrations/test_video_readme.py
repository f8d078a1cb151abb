"""What integrations/README.md tells a user of video to run does run, with a tiny model in place of the real one."""

import re
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import av
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from transformers import UMT5Config, UMT5EncoderModel

import tiny_chat
from kvtiers_diffusers import CausalWanPipeline
from test_readme import README as FIRST
from test_readme import marked
from tiny_wan import blocks, build, prompt

README = FIRST.parent / "integrations" / "README.md"


def vae() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def test_the_loop_over_blocks_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = build()
    own = dict(model.attn_processors)
    clips = blocks(3, frames=4, high=8, wide=8)
    given = {
        "transformer": model,
        "vae": vae(),
        "noise": clips,
        "sigmas": [1.0, 0.6, 0.0],
        "text": prompt(),
    }
    exec(compile(marked(README.read_text(encoding="utf-8"))["video"], str(README), "exec"), given)
    assert (tmp_path / "video.safetensors").is_file()
    assert given["flow"].shape == clips[0].shape  # type: ignore[attr-defined]
    assert model.attn_processors == own


def test_the_pipeline_makes_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = tiny_chat.tokenizer()
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(words), **sizes)).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    made = CausalWanPipeline(vae(), build(), scheduler, tokenizer=words, text_encoder=encoder)
    made.set_progress_bar_config(disable=True)
    torch.save({"generator_ema": build(seed=1).state_dict()}, tmp_path / "self_forcing_dmd.pt")
    monkeypatch.setattr(CausalWanPipeline, "from_pretrained", lambda _: made)
    code = marked(README.read_text(encoding="utf-8"))["pipeline"]
    small = re.sub(r"seconds=\d+", "num_frames=9, height=32, width=32", code)
    assert small != code
    exec(compile(small, str(README), "exec"), {"__name__": "__main__"})
    with av.open(str(tmp_path / "lighthouse.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 9
    assert torch.equal(made.transformer.proj_out.weight, build(seed=1).proj_out.weight)
