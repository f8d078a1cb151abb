"""Videos of the tiny world, made of prompts: no memory and no row depends on those that are made beside it."""

from itertools import combinations

import attrs
import pytest

pytest.importorskip("diffusers", reason="needs the extra 'diffusers'")

import torch
from click.testing import CliRunner

from kvtiers import GeometryError, PolicyError, UnknownPolicyError, bytes_in
from kvtiers_packforcing.tiny_world import LinearCodec, Walks, embed_walks, psnr
from kvtiers_packforcing.tiny_world.gather import main as gather_command
from kvtiers_packforcing.tiny_world.making import CodecDecoder, make_videos
from kvtiers_packforcing.tiny_world.sampling import Sampler
from kvtiers_packforcing.tiny_world.variants import choose_variants, published, variants
from kvtiers_packforcing.tiny_world.weights import WeightsError, load_models, read_sampler, write_sampler, write_sums
from kvtiers_packforcing.training import config_of
from kvtiers_packforcing.training.student import StudentStage
from tiny_videos import save_models, tiny_models

WALK = Walks.written(("hall", 2), ("attic", 1), ("hall", 1, "closed"), ("hall", 1))
OTHER = Walks.written(("cellar", 1), ("porch", 3), ("cellar", 1))
BOTH = Walks(rooms=torch.cat((WALK.rooms, OTHER.rooms)), curtains=torch.cat((WALK.curtains, OTHER.curtains)))
MODELS = tiny_models()
ALL = list(variants(top_k=1, window_blocks=4).values())
ONE_STEP = Sampler(steps=1)


def video(made, name):
    """Latents and pixels of the whole video, and the last block's figures."""
    blocks = [block[name] for block in made]
    return torch.cat([b.latents for b in blocks], 2), torch.cat([b.pixels for b in blocks], 2), blocks[-1]


@pytest.mark.parametrize(
    ("names", "decoder"),
    [
        ("packforcing,rolling-window", "autoencoder"),
        ("no-sink,recency,mean-pool", "codec"),
    ],
    ids=["autoencoder", "codec"],
)
def test_every_memory_makes_beside_others_what_it_makes_alone(names, decoder):
    chosen = choose_variants(names, top_k=1)
    blocks = list(make_videos(MODELS, chosen, WALK, sampler=ONE_STEP, decoder=decoder))
    assert len(blocks) == 5
    for variant in chosen:
        latents, pixels, last = video(blocks, variant.name)
        alone = video(make_videos(MODELS, [variant], WALK, sampler=ONE_STEP, decoder=decoder), variant.name)
        assert pixels.shape == (1, 3, 77, 64, 128)
        assert torch.allclose(latents, alone[0], atol=1e-5)
        assert torch.allclose(pixels, alone[1], atol=1e-4)  # random convolutions make more of a difference
        assert (last.attended, last.device_bytes, last.host_bytes) == attrs.astuple(alone[2])[2:5]


def test_every_row_is_made_as_if_it_were_alone():
    chosen = choose_variants("packforcing", top_k=1)
    both = video(make_videos(MODELS, chosen, BOTH, seeds=[4, 9], sampler=ONE_STEP), "packforcing")
    for row, (walk, seed) in enumerate(((WALK, 4), (OTHER, 9))):
        alone = video(make_videos(MODELS, chosen, walk, seeds=[seed], sampler=ONE_STEP), "packforcing")
        for part, off in ((0, 1e-5), (1, 1e-4)):
            assert torch.allclose(both[part][row : row + 1], alone[part], atol=off)


def test_memories_begin_alike_and_part_when_what_they_remember_differs():
    chosen = choose_variants("packforcing,rolling-window,sink-rolling-window,full", window_blocks=3)
    first, *_, last = make_videos(MODELS, chosen, WALK, decoder="codec", sampler=ONE_STEP)
    for name in ("rolling-window", "sink-rolling-window", "full"):
        assert torch.allclose(first[name].latents, first["packforcing"].latents, atol=1e-6)
        assert (last[name].latents - last["packforcing"].latents).abs().max() > 1e-4


def test_no_two_memories_make_the_same_video():
    longer = Walks.written(("hall", 3), ("attic", 2), ("hall", 2))
    last = list(make_videos(MODELS, ALL, longer, sampler=ONE_STEP, decoder="codec"))[-1]
    for one, other in combinations(last, 2):
        assert (last[one].latents - last[other].latents).abs().max() > 1e-5, (one, other)
    attended = {name: made.attended for name, made in last.items()}
    assert attended["rolling-window"] == attended["sink-rolling-window"] == 4 * 128
    assert attended["full"] == 7 * 128
    assert attended["packforcing"] == 3 * 128 + 4
    assert {attended[name] for name in ("recency", "original-positions", "mean-pool", "hr-only", "lr-only")} == {388}


@pytest.mark.parametrize("kind", ["multistep", "renoise"])
def test_a_rollout_of_the_student_is_the_video_that_is_made(tmp_path, kind):
    MODELS.autoencoder.save_pretrained(tmp_path)
    table = {
        "run": {"stage": "student", "folder": "nowhere"},
        "model": {"width": 32, "layers": 1, "heads": 2, "ffn_width": 32, "autoencoder": str(tmp_path)},
        "phases": [{"steps": 1, "peak_rate": 1e-3, "clips": 1}],
    }
    stage = StudentStage(config_of(table, StudentStage.model_config, StudentStage.phase_config))
    for last in (stage.transformer.proj_out, stage.compressor.layers[-1]):
        torch.nn.init.normal_(last.weight, std=0.1)  # both begin at zero, which lets nothing through
    models = attrs.evolve(MODELS, transformer=stage.transformer, compressor=stage.compressor)
    sampler = Sampler(steps=3, kind=kind)
    rolled = stage.rollout(torch.zeros(1, 16, 0, 8, 16), embed_walks(WALK), sampler=sampler, seed=7)
    made = make_videos(models, choose_variants("packforcing"), WALK, seeds=[7], sampler=sampler)
    assert torch.allclose(video(made, "packforcing")[0], rolled, atol=1e-5)


def test_the_bytes_and_tokens_that_are_told_are_those_of_the_cache():
    (variant,) = choose_variants("packforcing", top_k=1)
    *_, last = make_videos(MODELS, [variant], WALK, sampler=ONE_STEP)
    made = last["packforcing"]
    with variant.remember(MODELS) as wan:
        for nth, words in enumerate(embed_walks(WALK).unbind(1)):
            wan.denoise(torch.ones(1, 16, 4, 8, 16), 900, words)
            wan.commit(torch.full((1, 16, 4, 8, 16), float(nth)), words)
        held = wan.memory_usage()
        assert (made.device_bytes, made.host_bytes) == (bytes_in(held, "device"), bytes_in(held, "host"))
        assert made.attended == 3 * 128 + 4


def test_the_transformer_is_given_back_when_a_video_ends_or_is_left():
    own = dict(MODELS.transformer.attn_processors)
    made = make_videos(MODELS, ALL[:4], WALK)
    next(made)
    assert MODELS.transformer.attn_processors != own
    assert torch.is_grad_enabled()
    made.close()
    assert MODELS.transformer.attn_processors == own


class Straight:
    """A model whose flow leads from the noise it was first given to `target`, at every level."""

    def __init__(self, target):
        self.target, self.told = target, []

    def denoise(self, block, timestep, text):
        self.told.append(timestep)
        return (block - self.target) / (timestep / 1000)


@pytest.mark.parametrize("kind", ["euler", "multistep", "renoise"])
def test_every_kind_of_sampling_reaches_where_the_flow_leads(kind):
    sampler, target = Sampler(steps=4, kind=kind), torch.randn(1, 16, 4, 8, 16)
    model = Straight(target)
    noises = [torch.randn(target.shape) for _ in range(sampler.noises)]
    assert torch.allclose(sampler.denoise(model, noises, torch.zeros(1, 3, 64)), target, atol=1e-5)
    assert model.told == pytest.approx([1000, 937.5, 833.333, 625], abs=1e-3)
    assert sampler.noises == {"euler": 1, "multistep": 1, "renoise": 4}[kind]


class Bent:
    """A model whose flow is the noise level, so that noise x leads to x - 1/2."""

    def denoise(self, block, timestep, text):
        return torch.full_like(block, timestep / 1000)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_with_two_flows_only_the_first_step_errs_where_the_flow_changes_evenly(shift):
    sampler = Sampler(steps=4, shift=shift, kind="multistep")
    begin = torch.randn(1, 16, 4, 8, 16, dtype=torch.float64)
    made = sampler.denoise(Bent(), [begin], torch.zeros(1, 3, 64))
    first = (1 - sampler.sigmas()[1]) ** 2 / 2  # what a step along one flow goes too far
    assert torch.allclose(made, begin - 0.5 - first, atol=1e-6)
    euler = attrs.evolve(sampler, kind="euler").denoise(Bent(), [begin], torch.zeros(1, 3, 64))
    assert float((euler - begin + 0.5).abs().max()) > 0.05


class Promised(Straight):
    """A model whose flow leads to as many times `target` as its prompt says."""

    def denoise(self, block, timestep, text):
        return (block - text.mean() * self.target) / (timestep / 1000)


@pytest.mark.parametrize("kind", ["euler", "multistep", "renoise"])
@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.0])
def test_guidance_goes_on_from_no_prompt_beyond_the_prompt(kind, guidance):
    sampler, target = Sampler(steps=3, kind=kind, guidance=guidance), torch.randn(1, 16, 4, 8, 16)
    noises = [torch.randn(target.shape) for _ in range(sampler.noises)]
    made = sampler.denoise(Promised(target), noises, torch.full((1, 3, 64), 2.0))
    assert torch.allclose(made, (2 + guidance * 2) * target, atol=1e-4)


def test_the_codec_decodes_block_by_block_what_it_decodes_at_once():
    codec, latents = LinearCodec.load(), torch.randn(2, 16, 12, 8, 16) / 3
    decoder = CodecDecoder(codec)
    streamed = torch.cat([decoder.decode(part) for part in latents.split(4, 2)], 2)
    assert psnr(streamed, codec.decode(latents).clamp(-1, 1)) > 100


@pytest.mark.parametrize("name", published())
def test_published_methods_attend_no_more_than_five_blocks(name):
    longer = Walks.written(("hall", 3), ("attic", 2), ("hall", 4))
    *_, before, last = make_videos(MODELS, choose_variants(name), longer, sampler=ONE_STEP, decoder="codec")
    if name == "quant-videogen":
        assert last[name].attended == 9 * 128
    else:
        assert 256 < before[name].attended == last[name].attended <= 640
    assert last[name].latents.isfinite().all()


def test_variants_and_presets_can_be_changed_where_they_are_named():
    names = "packforcing:top_k=3,retriever=recency,full,rolling-forcing:sink=4,recent=12"
    one, two, three = choose_variants(names, window_blocks=3)
    assert (one.name, one.policy) == ("packforcing:top_k=3,retriever=recency", "packforcing")
    assert one.options == {"sink": 4, "recent": 4, "top_k": 3, "retriever": "recency"}
    assert two == variants()["full"]
    assert (three.policy, three.options) == ("rolling-forcing", {"sink": 4, "recent": 12})
    (last,) = list(make_videos(MODELS, [one], WALK, sampler=ONE_STEP, decoder="codec"))[-1].values()
    assert last.attended == 3 * 128 + 2 * 4


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda: choose_variants("packforcing,roling-window"), UnknownPolicyError, "Did you mean 'rolling-window'"),
        (lambda: choose_variants("my-preset:top_k=3"), UnknownPolicyError, "and presets of other plugins"),
        (lambda: choose_variants("full:top_k"), PolicyError, "settings are written key=value, got 'top_k'"),
        (lambda: choose_variants(" , "), UnknownPolicyError, "no policies are named; choose from full, "),
        (lambda: make_videos(MODELS, [], WALK), PolicyError, "at least one memory"),
        (lambda: make_videos(MODELS, ALL[:1] * 2, WALK), PolicyError, "each name once"),
        (lambda: make_videos(MODELS, ALL, BOTH, seeds=[1]), GeometryError, "one seed for each of the 2 walks, got 1"),
        (lambda: Sampler(steps=0), ValueError, "'steps' must be >= 1"),
        (lambda: Sampler(shift=float("inf")), ValueError, "'shift' must be < inf"),
        (lambda: Sampler(kind="heun"), ValueError, "'kind' must be in"),
        (lambda: Sampler(guidance=-1.0), ValueError, "'guidance' must be >= 0"),
    ],
    ids=["near", "foreign", "unread", "none", "empty", "twice", "seeds", "steps", "shift", "kind", "guidance"],
)
def test_what_cannot_be_made_is_refused_at_once(ask, error, message):
    with pytest.raises(error, match=message):
        ask()


def test_weights_that_runs_wrote_are_gathered_in_half_the_bytes(tmp_path):
    models, runs = tiny_models(), tmp_path / "runs"
    for part in ("transformer", "compressor", "autoencoder"):
        getattr(models, part).save_pretrained(runs / part)
    given = ["--autoencoder", str(runs / "autoencoder"), "--student", str(runs), str(tmp_path / "weights")]
    write_sampler(runs, Sampler(steps=2))
    done = CliRunner().invoke(gather_command, given)
    assert done.exit_code == 0, done.output
    found = load_models(tmp_path / "weights")
    assert found.sampler == Sampler(steps=2)
    for part in ("transformer", "compressor", "autoencoder"):
        for mine, theirs in zip(getattr(found, part).parameters(), getattr(models, part).parameters(), strict=True):
            assert torch.equal(mine, theirs.half().float())
        config = (tmp_path / "weights" / part / "config.json").read_text()
        assert str(tmp_path) not in config, "a private folder is told"
    weight = next(models.compressor.parameters())
    before, other = weight.clone(), tmp_path / "other"
    weight.mul_(3)
    for part in ("transformer", "compressor"):
        getattr(models, part).save_pretrained(other / part)
    done = CliRunner().invoke(gather_command, [*given, "--student", str(other)])
    assert done.exit_code == 0, done.output
    mean = next(load_models(tmp_path / "weights").compressor.parameters())
    assert torch.equal(mean, (2 * before).half().float()), "of several students the mean is taken"
    weight.fill_(1e6)
    models.compressor.save_pretrained(runs / "compressor")
    done = CliRunner().invoke(gather_command, given)
    assert "float16 cannot hold" in done.output
    assert done.exit_code == 1
    (runs / "transformer" / "config.json").unlink()
    assert "transformer lacks config.json; give the export folders" in CliRunner().invoke(gather_command, given).output


def test_weights_say_how_their_blocks_are_denoised(tmp_path):
    folder = save_models(tiny_models(), tmp_path / "weights")
    assert read_sampler(folder) == Sampler()
    write_sampler(folder, Sampler(steps=2, shift=3.0, kind="renoise"))
    with pytest.raises(WeightsError, match=r"does not list sampler.json"):
        load_models(folder)
    write_sums(folder)
    models = load_models(folder)
    assert models.sampler == Sampler(steps=2, shift=3.0, kind="renoise")
    assert models.sampler.sigmas() == pytest.approx([1, 0.75, 0])
    for text, says in (
        ('{"steps": 0}', "'steps' must be >= 1: 0"),
        ('{"kind": "heun"}', r"'kind' must be in \(.*\) \(got 'heun'\)"),
        ('{"step": 1}', ".*unexpected keyword argument 'step'"),
        ('{"steps": ', "Expecting value: .*"),
        ("[]", ".*must be a mapping.*"),
    ):
        (folder / "sampler.json").write_text(text)
        with pytest.raises(WeightsError, match=f"says no sampler: {says}; copy the file"):
            read_sampler(folder)
