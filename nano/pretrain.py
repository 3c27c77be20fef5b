"""From nothing to what the paper takes for granted: an autoencoder, a generator and a teacher.

    python nano/pretrain.py                    # all four stages; over four hours on two cores
    python nano/pretrain.py teacher --teacher_steps 500

Each stage is a function; each writes its state every two minutes to --work and goes on from there
when it is started again; finished weights go to --out as ordinary folders: generator/ (unet vae
scheduler empty_prompt) in diffusers' layout, like Stable Diffusion, and teacher/ in transformers'
layout.
Not needed to understand the paper.
"""
import argparse
import json
import math
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import FrameSet, HelpFormatter, UserError  # noqa: E402
from evaluate import score  # noqa: E402
from losses import add_noise, gradient_matching, mae, velocity  # noqa: E402
from model import SD_SCHEDULE, FiffDepth, Teacher, load_vae, read_json  # noqa: E402
from train import Muon, cut_log, latent_space, read_flags, save_sheet  # noqa: E402

CHANNELS = 32  # of the latent space
WITH_DEPTH = ("clean/train", "wild/labelled")  # what the autoencoder learns from
PICTURES = ("clean/train", "wild/train")  # and the generator, without the depth
# What suits so small a generator; train.py reads it beside the weights, flags of its own win.
RECIPE = {"steps": 8000, "batch": 64, "micro": 16, "optimizer": "muon", "lr": 4e-3, "lr_end": 0.02,
          "filter_noise": 0.5, "lambda_low": 1.0, "cache": "runs/cache", "save_every": 100,
          "val_every": 500}


# ---------------------------------------------------------- data in memory, one loop for all stages


def load_frames(folder, depth, count, shrink=lambda rgb, disparity: (rgb, disparity)):
    """A small-world folder -> rgb uint8 [N, 3, H, W], and normalised disparity float16
    [N, 1, H, W] or None. Each frame goes through `shrink` first: float rgb [3, H, W] and disparity
    [1, H, W] or None, both in [-1, 1]."""
    frames = FrameSet("nano" if depth else "photos", folder)
    indices = range(min(count, len(frames)))

    def compact(i):
        sample = frames.named(frames.sample, i, False)
        rgb, disparity = shrink(sample.rgb, sample.depth[:1] if depth else None)
        return ((rgb + 1) * 127.5).round().to(torch.uint8), disparity.half() if depth else None

    with ThreadPoolExecutor() as pool:
        samples = list(tqdm(pool.map(compact, indices), total=len(indices),
                            desc=f"reading {folder.parent.name}/{folder.name}"))
    return (torch.stack([s[0] for s in samples]),
            torch.stack([s[1] for s in samples]) if depth else None)


def training_pictures(a, count):
    """The first `count` pictures of clean/train and of wild/train, uint8 [N, 3, H, W]."""
    # clean as a set with depth: among mere pictures its depth maps would count as some
    return torch.cat([load_frames(a.data / folder, folder in WITH_DEPTH, count)[0]
                      for folder in PICTURES])


def used(a, folder, count):
    """How many frames of a set are used, and the bytes of their pictures: tells worlds apart."""
    files = sorted((a.data / folder).glob("rgb_*.png"))[:count]
    return [len(files), sum(file.stat().st_size for file in files)]


def to_float(rgb):
    """uint8 -> [-1, 1]"""
    return rgb.float() / 127.5 - 1


def fit(stage, net, loss_of, a, data, muon=False, early=None):
    """Trains net on the terms of loss_of(generator, batch) with AdamW or Muon, a short warm-up and
    a cosine to zero; resumable -> minutes. With more steps than a finished run had, it goes on, on
    the rest of a longer cosine.

    data   tells apart what it is trained on: a state made from other data must not go on
    early  a step whose weights are kept beside the state, as {stage}_early.pt
    """
    steps, batch, lr = (getattr(a, f"{stage}_{flag}") for flag in ("steps", "batch", "lr"))
    state_file, log = a.work / f"{stage}.pt", a.work / f"{stage}.jsonl"
    a.work.mkdir(parents=True, exist_ok=True)
    of = json.dumps([batch, lr, data] + ["muon"] * muon)
    optimizer = (Muon(net.parameters(), lr=lr, weight_decay=0.01) if muon else
                 torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01))
    first, spent = restore(state_file, of, net, optimizer)
    if first > steps:
        raise UserError(f"{state_file} is at step {first}, past --{stage}_steps {steps}; "
                        "remove it to start this stage again")
    cut_log(log, first)

    def save(step):
        state = {"of": of, "step": step, "minutes": spent + (time.time() - began) / 60,
                 "net": net.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, f"{state_file}.tmp")
        os.replace(f"{state_file}.tmp", state_file)
        return state["minutes"]

    began = saved = time.time()
    recent = []
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=stage)
    for step in bar:
        warm = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        # every draw depends on the step alone
        generator = torch.Generator().manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            terms = loss_of(generator, batch)
        net.zero_grad()
        loss = sum(terms.values())
        if not torch.isfinite(loss):
            raise UserError(f"{stage}: the loss is {loss.item()} at step {step + 1}; lower "
                            f"--{stage}_lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if step + 1 == early:
            torch.save(net.state_dict(), a.work / f"{stage}_early.pt")
        recent.append({k: float(v.detach()) for k, v in terms.items()})
        if step % 50 == 49 or step == steps - 1:
            mean = {k: round(float(np.mean([r[k] for r in recent])), 5) for k in recent[0]}
            line = {"step": step + 1, "minutes": round(spent + (time.time() - began) / 60, 2),
                    **mean}
            with open(log, "a") as f:
                f.write(json.dumps(line) + "\n")
            bar.set_postfix(mean)
            recent = []
        if time.time() - saved > 120:
            save(step + 1)
            saved = time.time()
    return save(steps)


def restore(state_file, of, net, optimizer):
    """Loads net and optimizer from where a stage was left -> step and minutes so far."""
    if not state_file.exists():
        return 0, 0.0
    state = torch.load(state_file, weights_only=True)
    if state.get("of") != of or shapes(state["net"]) != shapes(net.state_dict()):
        raise UserError(f"{state_file} is of other data, another network or other flags; "
                        "remove it to start this stage again")
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["minutes"]


def shapes(state):
    return {name: value.shape for name, value in state.items()}


# ---------------------------------------------------------------- (a) the autoencoder


def new_vae():
    """AutoencoderDC: factor 8 and a continuous latent like Stable Diffusion's AutoencoderKL, but
    pixels are folded into channels around every change of resolution (arXiv 2410.10733), so that it
    starts from something linear and learns several times as fast at this size. 32 channels, for an
    edge in a picture of 128 pixels is a larger part of it. Its normalisation looks at one cell
    alone: it takes any size."""
    widths = (32, 32, 64, 128)
    return AutoencoderDC(
        in_channels=3, latent_channels=CHANNELS, attention_head_dim=32,
        encoder_block_types="ResBlock", encoder_block_out_channels=widths,
        encoder_layers_per_block=(0, 1, 1, 1), encoder_qkv_multiscales=((),) * 4,
        downsample_block_type="pixel_unshuffle",
        decoder_block_types="ResBlock", decoder_block_out_channels=widths,
        decoder_layers_per_block=(0, 2, 2, 2), decoder_qkv_multiscales=((),) * 4,
        upsample_block_type="pixel_shuffle", decoder_norm_types="rms_norm",
        decoder_act_fns="silu")


def reconstruction(y, x):
    """Terms for pictures y, x [B, 3, H, W] in [-1, 1]: L1 keeps edges, the gradient term sharpens
    them, and L1 between 8-pixel means keeps the colour of a surface under its grain."""
    return mae(y, x) + mae(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8)) + 0.5 * gradient_matching(y, x)


def map_reconstruction(y, x):
    """L1 and gradients of disparity maps; far pixels weigh more, as in AbsRel."""
    weight = 1 / ((x + 1) / 2 + 0.25)
    return ((y - x).abs() * weight).mean() + gradient_matching(y, x)


def train_vae(a):
    """Reconstructs whole pictures and, as often, disparity maps (decoded as grey pictures). A
    little noise and a pull to zero, which is the KL term of a posterior of fixed width, keep the
    latent space smooth."""
    pictures, maps = vae_frames(a, a.vae_frames)
    torch.manual_seed(0)
    vae = new_vae()

    def loss_of(g, batch):
        rgb = to_float(draw(pictures, batch // 2, g))
        depth = draw(maps, batch // 2, g).repeat(1, 3, 1, 1)
        z = vae.encode(torch.cat([rgb, depth])).latent
        noisy = z + 0.05 * torch.randn(z.shape, generator=g)
        y_rgb, y_depth = vae.decode(noisy).sample.float().chunk(2)
        return {"rgb": reconstruction(y_rgb, rgb), "depth": map_reconstruction(y_depth, depth),
                "kl": 1e-4 * z.float().square().mean()}

    minutes = fit("vae", vae, loss_of, a, [used(a, folder, a.vae_frames) for folder in WITH_DEPTH])
    vae.eval()
    with torch.no_grad():  # latents of unit variance, as the generator's noise schedule expects
        z = torch.cat([vae.encode(to_float(rgb[:256])).latent for rgb in pictures])
    vae.register_to_config(scaling_factor=round(float(1 / z.std()), 4))
    vae.save_pretrained(a.work / "vae")
    card(a, "vae", minutes, a.vae_steps, vae, round_trip(vae, a))


def read_vae(folder):
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} is not there; first: python nano/pretrain.py vae decoder")
    return load_vae(str(folder), None, {"low_cpu_mem_usage": False})


def best_vae(a):
    """With the decoder that train_decoder made, if it made one for these latents; without a state
    in --work, the shipped autoencoder."""
    if not (a.work / "vae").exists() and (a.out / "generator/vae").exists():
        return read_vae(a.out / "generator/vae")
    vae, folder = read_vae(a.work / "vae"), a.work / "vae_tuned"
    tuned = read_vae(folder) if folder.exists() else vae
    return tuned if latent_space(tuned) == latent_space(vae) else vae


def train_decoder(a):
    """The decoder alone, on whole frames, disparity maps mostly, from latents without noise.
    Latents stay as they are, so this may come before, beside or after the generator (Stable
    Diffusion's decoder was tuned alone, too)."""
    pictures, maps = vae_frames(a, a.decoder_frames)
    vae = read_vae(a.work / "vae")

    def loss_of(g, batch):
        few = batch // 4
        rgb = to_float(draw(pictures, few, g))
        depth = draw(maps, batch - few, g).repeat(1, 3, 1, 1)
        with torch.no_grad():
            z = vae.encode(torch.cat([rgb, depth])).latent
        y_rgb, y_depth = vae.decode(z).sample.float().split([len(rgb), len(depth)])
        return {"rgb": 0.25 * reconstruction(y_rgb, rgb),
                "depth": map_reconstruction(y_depth, depth)}

    minutes = fit("decoder", vae.decoder, loss_of, a, [
        latent_space(vae), *(used(a, folder, a.decoder_frames) for folder in WITH_DEPTH)])
    vae.eval().save_pretrained(a.work / "vae_tuned")
    card(a, "decoder", minutes, a.decoder_steps, vae.decoder, round_trip(vae, a))
    made = a.out / "generator/vae"
    if made.exists() and latent_space(read_vae(made).half()) == latent_space(vae.half()):
        vae.save_pretrained(made)  # the generator was made before, for these latents


def vae_frames(a, count):
    """-> pictures and disparity maps, of the clean and of the labelled wild set."""
    return tuple(zip(*(load_frames(a.data / folder, True, count)
                       for folder in WITH_DEPTH)))


def draw(stores, n, g):
    """n random frames (one less where n is odd), as many from each of the two stores
    -> float [n, C, H, W]"""
    each = max(1, n // len(stores))
    return torch.cat([array[torch.randint(len(array), (each,), generator=g)].float()
                      for array in stores])


def round_trip(vae, a, n=128):
    """Scores of held-out wild disparity maps after encode and decode, no network between."""
    def predict(sample):
        return vae.decode(vae.encode(sample.depth[None]).latent).sample.mean((0, 1))

    return held_out_scores(lambda sample: (predict(sample).clamp(-1, 1).numpy() + 1) / 2, a, n)


@torch.no_grad()
def held_out_scores(predict, a, n=256):
    """predict: data.Sample -> disparity map [H, W]; means over held-out wild frames."""
    frames = FrameSet("nano", a.data / "wild/test")
    scores = [score(predict(frames.named(frames.sample, i, False)), *frames.read(i)[1:],
                    "disparity", frames.layout.near, frames.layout.far)
              for i in range(min(n, len(frames)))]
    error, share, f1 = np.nanmean(scores, 0).tolist()
    return {"abs_rel_percent": round(100 * error, 2), "delta1_percent": round(100 * share, 2),
            "boundary_f1": round(f1, 3)}


# ---------------------------------------------------------------- (b) the generator


def new_unet(prompt_width=32):
    """UNet of Stable Diffusion's class, 3.3 million parameters: attention only at the coarsest
    level and with one head, for many small heads halve the speed of a CPU."""
    return UNet2DConditionModel(
        in_channels=CHANNELS, out_channels=CHANNELS, block_out_channels=(64, 88, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=1, cross_attention_dim=prompt_width, norm_num_groups=8,
        use_linear_projection=True)


def new_generator(a):
    vae, unet = best_vae(a), new_unet()
    # two tokens that mean nothing
    prompt = torch.randn(1, 2, unet.config.cross_attention_dim,
                         generator=torch.Generator().manual_seed(0))
    size = max(FrameSet("nano", a.data / "clean/train", cap=1).size)
    info = {"target": "disparity", "size": size, "base": "nano/pretrain.py", "flags": {}}
    return FiffDepth(unet, vae,
                     DDPMScheduler(**SD_SCHEDULE, prediction_type="v_prediction"), prompt, info)


def train_generator(a):
    """v-prediction (Eq. 3 with b_0 = x_0) on the latents of
    clean and wild pictures, computed once."""
    torch.manual_seed(0)
    model = new_generator(a)
    latents = latent_store(a, model)

    def loss_of(g, batch):
        x0 = latents[torch.randint(len(latents), (batch,), generator=g)].float()
        t = torch.randint(1, len(model.alphas_cumprod), (batch,), generator=g)
        eps = torch.randn(x0.shape, generator=g)
        a_bar = model.alpha_bar(t)
        v = model.eps_hat(add_noise(x0, eps, a_bar), t)
        return {"v": F.mse_loss(v.float(), velocity(x0, eps, a_bar))}

    minutes = fit("generator", model.unet, loss_of, a, [
        latent_space(model.vae), *(used(a, folder, a.generator_frames) for folder in PICTURES)],
        muon=True, early=max(1, a.generator_steps // 32))
    model.vae = best_vae(a)  # its decoder may have been trained meanwhile
    model.save_pretrained(a.out / "generator", torch.float16)
    (a.out / "generator/recipe.json").write_text(json.dumps(RECIPE, indent=1) + "\n")
    log = [json.loads(line)["v"] for line in (a.work / "generator.jsonl").read_text().splitlines()]
    card(a, "generator", minutes, a.generator_steps, model.unet,
         {"v_loss": round(float(np.mean(log[-5:])), 4)})
    draw_samples(a)


def latent_store(a, model):
    """Latents of the first --generator_frames pictures of each set, [N, CHANNELS, h, w] float16,
    kept in --work for this encoder and these pictures."""
    of = [number for folder in PICTURES for number in used(a, folder, a.generator_frames)]
    file = a.work / "latents_{}_{}_{}_{}_{}.pt".format(latent_space(model.vae)[:12], *of)
    if not file.exists():
        chunks = tqdm(training_pictures(a, a.generator_frames).split(16), desc="encoding")
        latents = torch.cat([model.encode(to_float(chunk)).half() for chunk in chunks])
        torch.save(latents, f"{file}.tmp")
        os.replace(f"{file}.tmp", file)
    return torch.load(file, weights_only=True)


def draw_samples(a, n=16):
    """Pictures that the finished generator draws from noise, above pictures that it learned from as
    the autoencoder returns them: does it know its world? -> assets/samples.png"""
    model, early = (FiffDepth.from_pretrained(a.out / "generator") for _ in range(2))
    file = a.work / "generator_early.pt"
    state = torch.load(file, weights_only=True) if file.exists() else {}
    if shapes(state) != shapes(early.unet.state_dict()):
        raise UserError(f"{file} is not there, or of another network; a generator writes it after a "
                        f"32nd of its steps: remove {a.work / 'generator.pt'} and run "
                        "python nano/pretrain.py generator")
    early.unet.load_state_dict(state)
    learned = model.encode(to_float(training_pictures(a, n // 2)))
    rgb = torch.cat([model.decode_image(z).clamp(-1, 1)
                     for z in (sample_latents(model, early, learned.shape), learned)])
    a.assets.mkdir(exist_ok=True, parents=True)
    save_sheet([torch.cat(list(row), 2) for row in rgb.split(8)], a.assets / "samples.png")


@torch.no_grad()
def sample_latents(model, early, shape, guidance=0.5, steps=250):
    """Latents of the given shape from noise, by DDIM with eta = 1: fresh noise in each step mends
    what earlier ones got wrong. Each velocity is pushed away from what the same network said early
    in its training (autoguidance, arXiv 2406.02507): where the two differ, the later one knows
    better."""
    # offset 1: it ends at t = 1, for t = 0 is Eq. 1's and was never trained
    sampler = DDIMScheduler.from_config(model.scheduler.config, steps_offset=1)
    sampler.set_timesteps(steps)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=g)
    for t in tqdm(sampler.timesteps, desc="sampling"):
        v = model.eps_hat(x, t)
        v = v + guidance * (v - early.eps_hat(x, t))
        x = sampler.step(v, t, x, eta=1.0, generator=g).prev_sample
    return x


# ---------------------------------------------------------------- (c) the teacher


def new_teacher():
    """DPT-hybrid (convolutions, then a transformer over 16 cells, then DPT's neck and head) of 2.4
    million parameters, from random weights, that looks at 64x64 pixels: soft by nature. It learns
    several times as fast on two cores as DINOv2 + DPT, the paper's class."""
    from transformers import BitConfig, DPTConfig, DPTForDepthEstimation

    widths, size = [128, 192, 256], 64
    cells = size // 16
    backbone = BitConfig(
        hidden_sizes=widths, depths=[1, 2, 3], embedding_size=32, layer_type="bottleneck",
        num_groups=8, global_padding="same", embedding_dynamic_padding=True,
        out_features=["stage1", "stage2", "stage3"])
    config = DPTConfig(
        is_hybrid=True, backbone_config=backbone, image_size=size, patch_size=16, hidden_size=128,
        num_hidden_layers=4, num_attention_heads=2, intermediate_size=256,
        backbone_out_indices=[0, 1, 1, 3], neck_ignore_stages=[0, 1], readout_type="project",
        neck_hidden_sizes=[*widths, widths[-1]], reassemble_factors=[1, 1, 1, 0.5],
        backbone_featmap_shape=[1, widths[-1], cells, cells], fusion_hidden_size=48)
    preprocessing = {
        "image_processor_type": "DPTImageProcessor", "do_resize": True,
        "size": {"height": size, "width": size}, "keep_aspect_ratio": False,
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    return Teacher(DPTForDepthEstimation(config), preprocessing)


def train_teacher(a):
    """Labelled wild frames only; its targets are blurred, so that it is right on the whole and soft
    at edges, as Depth Anything V2 is beside a diffusion model."""
    torch.manual_seed(0)
    teacher = Teacher.from_pretrained(a.teacher_base) if a.teacher_base else new_teacher()
    earlier = gone_on_from(a, "teacher", a.teacher_base, "model.safetensors")
    teacher.net.requires_grad_(True).train()

    def shrink(rgb, disparity):
        """To the network's size, the target blurred before."""
        size = teacher.resized(*rgb.shape[-2:])
        rgb = F.interpolate(rgb[None], size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
        soft = blur(disparity[None], a.teacher_blur)
        return rgb, F.interpolate(soft, size, mode="area")[0]

    pictures, maps = load_frames(a.data / "wild/labelled", True, a.teacher_frames, shrink)

    def loss_of(g, batch):
        i = torch.randint(len(pictures), (batch,), generator=g)
        flip = torch.rand(batch, 1, 1, 1, generator=g) < 0.5
        x, target = (torch.where(flip, m.flip(-1), m)
                     for m in (teacher.preprocess(to_float(pictures[i])),
                               (maps[i].float() + 1) / 2))
        tint = 1 + 0.1 * torch.randn(batch, 3, 1, 1, generator=g)
        out = teacher.net(x * tint).predicted_depth.float()[:, None]
        weight = 1 / (target + 0.25)  # far pixels weigh more, as in AbsRel
        return {"relative": ((out - target).abs() * weight).mean(),
                "edges": gradient_matching(out, target)}

    minutes = fit("teacher", teacher.net, loss_of, a,  # may go on with more data
                  [a.teacher_blur, str(a.teacher_base)], muon=a.teacher_optimizer == "muon")
    teacher.net.eval().half().save_pretrained(a.out / "teacher")
    (a.out / "teacher/preprocessor_config.json").write_text(
        json.dumps(teacher.config, indent=1) + "\n")
    card(a, "teacher", minutes, a.teacher_steps, teacher.net, teacher_scores(a), earlier=earlier)


def blur(x, sigma):
    """Gaussian blur of [B, 1, H, W]; sigma in pixels."""
    if sigma <= 0:
        return x
    radius = int(3 * sigma + 0.5)
    k = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    k = k / k.sum()
    x = F.pad(x, (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(x, k.view(1, 1, 1, -1)), k.view(1, 1, -1, 1))


def teacher_scores(a):
    teacher = Teacher.from_pretrained(a.out / "teacher")
    return held_out_scores(lambda sample: teacher(sample.rgb[None])[0].numpy(), a)


# --------------------------------------------------------- (d) what train.py made, as it is shipped


def ship(a):
    """--run -> fiffdepth/ in --out, in half precision and without the paths of this machine. A run
    that went on from the weights that it now replaces goes on in the card, too."""
    root, run = Path(__file__).resolve().parent.parent, a.run
    if not (run / "log.jsonl").exists():
        raise UserError(f"{run} holds no run; first: python train.py")
    model = FiffDepth.from_pretrained(run)
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    if len(steps) < model.info["flags"]["steps"]:
        raise UserError(f"{run} is at step {len(steps)} of {model.info['flags']['steps']}; "
                        "finish it: python train.py --resume")
    flags = model.info["flags"]
    words = "".join(f" --{k}" if v is True else f" --{k} {' '.join(v) if type(v) is list else v}"
                    for k, v in changed_flags(flags).items()).replace(f"{root}/", "")
    n = model.info["processes"]
    command = f"torchrun --nproc_per_node {n} train.py{words}" if n > 1 else f"python train.py{words}"
    pictures = flags["batch"] / (2 if flags["no_teacher"] else 1)
    minutes = sum(pictures / line["pictures_per_second"] for line in steps) / 60
    earlier = gone_on_from(a, "fiffdepth", Path(flags["base"]),
                           "unet/diffusion_pytorch_model.safetensors")
    model.info = json.loads(json.dumps(model.info).replace(f"{root}/", ""))
    model.save_pretrained(a.out / "fiffdepth", torch.float16)
    last = {k: v for k, v in log[-1].items() if k.startswith("val_")}
    card(a, "fiffdepth", minutes, len(steps), model.unet, last, command, flags["seed"], earlier)
    a.assets.mkdir(exist_ok=True, parents=True)
    for sheet in sorted(run.glob("preview_*.png"))[-1:]:
        Image.open(sheet).save(a.assets / "preview.png")


def changed_flags(flags):
    """Those that a run's command named: neither defaults nor in the recipe of its base."""
    base = [] if flags["base"] == str(Path(__file__).resolve().parent / "weights/generator") else [
        "--base", flags["base"]]
    usual = vars(read_flags(base)[0]) | {"base": read_flags([])[0].base}
    return {k: v for k, v in flags.items() if k not in ("out", "resume") and v != usual[k]}


# ---------------------------------------------------------------- the command


def card(a, stage, minutes, steps, net, scores, command=None, seed=0, earlier=None):
    """Adds a stage to nano/weights/card.json: how it was made and what came out. `earlier` is the
    card of the weights that it went on from."""
    flags = {k: v for k, v in vars(a).items() if k.startswith(f"{stage}_")}
    changed = "".join(f" --{k} {v}" for k, v in flags.items() if v != a.defaults[k])
    command = command or f"python nano/pretrain.py {stage}{changed}"
    file = a.out / "card.json"
    a.out.mkdir(parents=True, exist_ok=True)
    cards = json.loads(file.read_text()) if file.exists() else {}
    before = cards.get(stage, {})
    if earlier:
        command = f"{earlier['command']}; {command}"
        minutes, steps = minutes + earlier["minutes"], steps + earlier["steps"]
    elif before.get("command", "").endswith(f"; {command}"):  # once more: what went before it stays
        command, minutes, steps = (before[k] for k in ("command", "minutes", "steps"))
    flags = {k: str(v) if isinstance(v, Path) else v for k, v in flags.items()}
    cards[stage] = {"command": command, "steps": steps, "seed": seed, "minutes": round(minutes, 1),
                    "parameters": sum(p.numel() for p in net.parameters()), **flags, **scores}
    file.write_text(json.dumps(cards, indent=1) + "\n")
    print(stage, cards[stage])


def gone_on_from(a, stage, base, file):
    """The card of a stage when `base` holds the weights, in half precision, that are now in --out
    and are about to be replaced; else None."""
    files = [folder / file for folder in (base, a.out / stage)] if base else []
    if not files or not all(f.exists() for f in files):
        return None
    before, now = map(load_file, files)
    same = shapes(before) == shapes(now) and all(
        torch.equal(before[k].half(), now[k].half()) for k in now)
    return read_json(a.out / "card.json")[stage] if same else None


STAGES = {"vae": train_vae, "decoder": train_decoder, "generator": train_generator,
          "teacher": train_teacher, "samples": draw_samples, "ship": ship}


def main(argv=None):
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("stages", nargs="*", default=["vae", "decoder", "generator", "teacher"],
        help="vae, decoder, generator, teacher; samples draws the generator's picture again; "
             "ship puts what train.py made into --out")
    add("--data", type=Path, default=here / "data", help="folder that nano/scenes.py wrote")
    add("--out", type=Path, default=here / "weights", help="finished weights")
    add("--work", type=Path, default=here.parent / "runs/pretrain",
        help="states to resume from, and logs")
    add("--run", type=Path, default=here.parent / "runs/fiffdepth",
        help="what ship takes: a finished run of train.py")
    add("--assets", type=Path, default=here.parent / "assets",
        help="where the generator's samples are drawn")
    for stage, steps, batch, lr, frames in (("vae", 8000, 8, 1e-3, 8000),
                                            ("decoder", 1000, 8, 4e-4, 8000),
                                            ("generator", 6000, 64, 2e-3, 12000),
                                            ("teacher", 32000, 64, 1.5e-3, 64000)):
        add(f"--{stage}_steps", type=int, default=steps, help="optimiser steps")
        add(f"--{stage}_batch", type=int, default=batch, help="pictures a step")
        add(f"--{stage}_lr", type=float, default=lr, help="peak learning rate")
        add(f"--{stage}_frames", type=int, default=frames, help="frames used of each set")
    add("--teacher_base", type=Path,
        help="weights for the teacher to go on from; random ones without it")
    add("--teacher_optimizer", default="adamw", choices=("adamw", "muon"),
        help="muon gains more a step and takes half as long again")
    add("--teacher_blur", type=float, default=1.5,
        help="sigma, in pixels, of the blur of the teacher's targets")
    a = parser.parse_args(argv)
    a.defaults = vars(parser.parse_args([]))
    for stage in a.stages:
        if stage not in STAGES:
            parser.error(f"unknown stage {stage}: choose from {', '.join(STAGES)}")
    for name, value in vars(a).items():
        if name.endswith(("_steps", "_batch", "_frames")) and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    try:
        for stage in a.stages:
            STAGES[stage](a)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the state of at most two minutes ago",
              file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
