"""What the paper takes for granted, made small: an autoencoder, a generator and a teacher.

    python nano/pretrain.py                      # all three stages, one after the other
    python nano/pretrain.py teacher --teacher_steps 500

Each stage is a function; each writes its state every two minutes to --work and goes on from there
when it is started again; finished weights go to --out as ordinary folders: generator/ (unet vae
scheduler empty_prompt) in diffusers' layout, like Stable Diffusion, and teacher/ in transformers'
layout, and how they were made to card.json.
Not needed to understand the paper. The frames: python nano/scenes.py --labelled 8000
"""
import argparse
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForDepthEstimation

sys.path[:0] = [str(Path(__file__).resolve().parents[k]) for k in (0, 1)]
from benchmarks.sets import TEST_SETS  # noqa: E402
from data import (SETS, FrameSet, HelpFormatter, UserError, add_line, command,  # noqa: E402
                  open_to_others, parse_sources, read_lines)
from evaluate import score  # noqa: E402
from losses import add_noise, gradient_matching, mae, velocity  # noqa: E402
from model import (SD_SCHEDULE, FiffDepth, Teacher, choose_device, choose_dtype,  # noqa: E402
                   load_vae)
from train import Muon, cut_log, latent_space, save_sheet  # noqa: E402
from teacher import NanoTeacher, NanoTeacherConfig  # noqa: E402
from teaching import (AlignedUNet, crop, new_teacher, recolour, relative_loss,  # noqa: E402
                      imagenet_features)

# so that this process may load its teacher from any --out
AutoConfig.register("nano_teacher", NanoTeacherConfig)
AutoModelForDepthEstimation.register(NanoTeacherConfig, NanoTeacher)

CHANNELS = 32  # of the latent space
SAMPLING_STEPS = 250
PHOTOS = Path(__file__).resolve().parent.parent / "assets/photos"  # never trained on


# ---------------------------------------------------------- data in memory, one loop for all stages


def load_frames(frames, count, read):
    """read(i) of the first `count` frames of a FrameSet -> its tensors, stacked."""
    indices = range(min(count, len(frames)))
    with ThreadPoolExecutor() as pool:
        samples = list(tqdm(pool.map(lambda i: frames.or_stop(read, i), indices), total=len(indices),
                            desc=f"reading {frames.path.parent.name}/{frames.path.name}"))
    return [torch.stack(column) for column in zip(*samples)]


def pictures_and_maps(a, count, views=1):
    """-> pictures uint8 [N, 3, H, W] of the clean, the labelled wild and the photographic set, of
    the last in as many views, and normalised disparity float16 [N, 1, H, W] of the first two."""
    pictures, maps = [], []
    sets = [FrameSet("nano", a.data / "clean/train")]
    sets.append(FrameSet("nano", a.labelled, size=sets[0].size))
    if a.photos:
        sets.append(FrameSet("photos", a.photos, size=sets[0].size, views=views))
    for frames in sets:
        def read(i, view, frames=frames):
            sample = frames.sample(i, False, view)
            rgb = ((sample.rgb + 1) * 127.5).round().to(torch.uint8)
            return (rgb,) if sample.label is None else (rgb, sample.label[:1].half())

        seen = [load_frames(frames, count, partial(read, view=k)) for k in range(frames.views)]
        pictures.append(torch.cat([columns[0] for columns in seen]))
        maps += seen[0][1:]
    return pictures, maps


def draw(stores, n, g, device, *more):
    """n random frames (fewer where n is no multiple of the stores), as many from each store
    -> float [n, C, H, W]; with more stores that hold the same frames: a list, one of each"""
    each = max(1, n // len(stores))
    picked = [torch.randint(len(store), (each,), generator=g) for store in stores]
    drawn = [torch.cat([store[i].float() for store, i in zip(kind, picked)]).to(device)
             for kind in (stores, *more)]
    return drawn if more else drawn[0]


def to_float(rgb):
    """uint8 -> [-1, 1]"""
    return rgb.float() / 127.5 - 1


def fit(a, stage, net, loss_of, optimizer, of, average=None, watch=None):
    """Trains net on the terms of loss_of(generator, batch), with a short warm-up and a cosine to
    zero; resumable -> minutes. With more steps than a finished run had, it goes on, on the rest of
    a longer cosine.

    of       tells apart what it is trained on: a state of something else must not go on (it may
             with more frames)
    average  an AveragedModel of the net, brought up to date with every step
    watch    () -> scores for the log, ten times a run
    """
    steps, batch, lr = (getattr(a, f"{stage}_{flag}") for flag in ("steps", "batch", "lr"))
    state_file, log = a.work / f"{stage}.pt", a.work / f"{stage}.jsonl"
    a.work.mkdir(parents=True, exist_ok=True)
    parts = {"net": net, "optimizer": optimizer} | ({"average": average} if average else {})
    rates = [group["lr"] for group in optimizer.param_groups]  # before a state brings later ones
    of = json.dumps([batch, lr, of])
    first, spent, dtype = restore(state_file, of, parts)
    dtype = getattr(torch, dtype) if dtype else choose_dtype(a.dtype, a.device, training=True)
    if first > steps:
        raise UserError(f"{state_file} is at step {first}, past --{stage}_steps {steps}; "
                        "remove it to start this stage again")
    cut_log(log, first)
    print(f"{stage}: {sum(p.numel() for p in net.parameters()):,} parameters on {a.device} in "
          f"{str(dtype)[6:]}, from step {first} of {steps}")

    def save(step):
        state = {"of": of, "step": step, "minutes": spent + (time.time() - began) / 60,
                 "dtype": str(dtype)[6:]} | {k: part.state_dict() for k, part in parts.items()}
        torch.save(state, f"{state_file}.tmp")
        os.replace(f"{state_file}.tmp", state_file)
        return state["minutes"]

    began = saved = time.time()
    recent = []
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=stage)
    for step in bar:
        factor = min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * factor
        # every draw depends on the step alone
        generator = torch.Generator().manual_seed(step)
        with torch.autocast(torch.device(a.device).type, dtype, dtype != torch.float32):
            terms = loss_of(generator, batch)
        net.zero_grad()
        loss = sum(terms.values())
        if not torch.isfinite(loss):
            raise UserError(f"{stage}: the loss is {loss.item()} at step {step + 1}; lower "
                            f"--{stage}_lr")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if average:
            average.update_parameters(net)
        recent.append({k: float(v.detach()) for k, v in terms.items()})
        if step % 50 == 49 or step == steps - 1:
            mean = {k: round(float(np.mean([r[k] for r in recent])), 5) for k in recent[0]}
            line = {"step": step + 1, "minutes": round(spent + (time.time() - began) / 60, 2),
                    **mean}
            if watch and (step + 1) % max(50, steps // 10 // 50 * 50) == 0:
                line |= watch()
            add_line(log, line)
            bar.set_postfix(mean)
            recent = []
        if time.time() - saved > 120:
            save(step + 1)
            saved = time.time()
    return save(steps)


def restore(state_file, of, parts):
    """Loads the parts from where a stage was left -> step, minutes and precision so far."""
    if not state_file.exists():
        return 0, 0.0, None
    state = torch.load(state_file, weights_only=True, map_location="cpu")
    if state.get("of") != of or shapes(state["net"]) != shapes(parts["net"].state_dict()):
        raise UserError(f"{state_file} is of other data, another network or other flags; "
                        "remove it to start this stage again")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state["step"], state["minutes"], state["dtype"]


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
    pictures, maps = pictures_and_maps(a, a.vae_frames)
    torch.manual_seed(0)
    vae = load_vae(a.base / "generator", torch.float32) if a.base else new_vae()
    vae = vae.to(a.device)

    def loss_of(g, batch):
        rgb = to_float(draw(pictures, batch // 2, g, a.device))
        depth = draw(maps, batch // 2, g, a.device).repeat(1, 3, 1, 1)
        z = vae.encode(torch.cat([rgb, depth])).latent
        noisy = z + 0.05 * torch.randn(z.shape, generator=g).to(a.device)
        y_rgb, y_depth = vae.decode(noisy).sample.float().split([len(rgb), len(depth)])
        return {"rgb": reconstruction(y_rgb, rgb), "depth": map_reconstruction(y_depth, depth),
                "kl": 1e-4 * z.float().square().mean()}

    optimizer = torch.optim.AdamW(vae.parameters(), lr=a.vae_lr, betas=(0.9, 0.98),
                                  weight_decay=0.01)
    minutes = fit(a, "vae", vae, loss_of, optimizer, CHANNELS)
    vae.eval()
    with torch.no_grad():  # latents of unit variance, as the generator's noise schedule expects
        z = torch.cat([vae.encode(to_float(rgb[:256].to(a.device))).latent for rgb in pictures])
    vae.register_to_config(scaling_factor=round(float(1 / z.std()), 4))
    vae.save_pretrained(a.work / "vae")
    card(a, "vae", minutes, vae, round_trip(vae, a))


def round_trip(vae, a):
    """Scores of held-out wild disparity maps after encode and decode, no network between."""
    @torch.no_grad()
    def predict(sample):
        z = vae.encode(sample.label[None].to(a.device)).latent
        return (vae.decode(z).sample.mean((0, 1)).clamp(-1, 1) + 1) / 2

    return held_out_scores(predict, FrameSet("nano", a.data / "wild/test", cap=128))


def held_out_scores(predict, frames):
    """predict: data.Sample -> disparity map [H, W]; means over a set with depth."""
    scores = [score(predict(frames.or_stop(frames.sample, i, False)).cpu().numpy(),
                    *frames.read(i)[1:], "disparity", frames.layout.near,
                    frames.layout.far) for i in range(len(frames))]
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


def new_generator(a, size):
    """Around the autoencoder in --work, or else the shipped one."""
    folders = [f for f in (a.work / "vae", a.out / "generator/vae") if (f / "config.json").exists()]
    if not folders:
        raise UserError(f"{a.work}/vae is not there; first: python nano/pretrain.py vae")
    vae = load_vae(folders[0], torch.float32)
    unet = FiffDepth.from_pretrained(a.base / "generator").unet if a.base else new_unet()
    # two tokens that mean nothing
    prompt = torch.randn(1, 2, unet.config.cross_attention_dim,
                         generator=torch.Generator().manual_seed(0))
    info = {"target": "disparity", "size": size, "base": "nano/pretrain.py", "flags": {}}
    return FiffDepth(unet, vae,
                     DDPMScheduler(**SD_SCHEDULE, prediction_type="v_prediction"), prompt, info)


def train_generator(a):
    """v-prediction (Eq. 3 with b_0 = x_0) on the latents of clean pictures, wild ones and
    photographs, computed once, and alignment with ImageNet's features. Small t are drawn more
    often, where there is something to be recognised."""
    # first, before minutes of reading: its package may be missing
    encoder = new_teacher().net.eval().to(a.device, memory_format=torch.channels_last)
    torch.manual_seed(0)
    pictures, _ = pictures_and_maps(a, a.generator_frames, views=4)
    model = new_generator(a, max(pictures[0].shape[2:])).to(a.device)
    latents = [torch.cat([model.encode(to_float(chunk.to(a.device))).half()
                          for chunk in tqdm(rgb.split(16), desc="encoding")]) for rgb in pictures]
    features = list(zip(*(imagenet_features(encoder, rgb) for rgb in pictures)))  # of each level
    some = [torch.cat([m[:500] for m in maps]).float() for maps in features]
    scales = [[f(m, (0, 2, 3), keepdim=True).to(a.device) for f in (torch.mean, torch.std)]
              for m in some]
    net = AlignedUNet(model.unet.train()).to(a.device)

    def loss_of(g, batch):
        x0, *targets = draw(latents, batch, g, a.device, *features)
        last = len(model.alphas_cumprod) - 1
        t = (1 + last * torch.rand(len(x0), generator=g).square()).long().to(a.device)
        eps = torch.randn(x0.shape, generator=g).to(a.device)
        a_bar = model.alpha_bar(t)
        v = model.eps_hat(add_noise(x0, eps, a_bar), t)
        targets = [(z - mean) / std for z, (mean, std) in zip(targets, scales)]
        return {"v": F.mse_loss(v.float(), velocity(x0, eps, a_bar)), "align": net.loss(targets)}

    optimizer = Muon(net.parameters(), lr=a.generator_lr, weight_decay=0.01)
    minutes = fit(a, "generator", net, loss_of, optimizer, latent_space(model.vae))
    model.cpu().save_pretrained(a.out / "generator", torch.float16)
    log = read_lines(a.work / "generator.jsonl")[-5:]
    card(a, "generator", minutes, model.unet,
         {f"{k}_loss": round(float(np.mean([line[k] for line in log])), 4) for k in ("v", "align")})
    draw_samples(a, pictures[1][-4:])


@torch.no_grad()
def draw_samples(a, scenes):
    """Pictures that the finished generator draws from noise, above scenes that it learned from and
    photographs that it never saw, and what the autoencoder returns for them
    -> assets/samples.png"""
    model = FiffDepth.from_pretrained(a.out / "generator")
    photos = FrameSet("photos", PHOTOS, size=tuple(scenes.shape[2:]), cap=4)
    rgb = torch.cat([to_float(scenes), *(photos.sample(i, False).rgb[None] for i in range(4))])
    z, g = model.encode(rgb), torch.Generator().manual_seed(2)
    # DDIM with eta = 1: fresh noise in each step mends what earlier ones got wrong; offset 1: it
    # ends at t = 1, for t = 0 is Eq. 1's and was never trained
    sampler = DDIMScheduler.from_config(model.scheduler.config, steps_offset=1)
    sampler.set_timesteps(SAMPLING_STEPS)
    x = torch.randn(z.shape, generator=g)
    for t in tqdm(sampler.timesteps, desc="sampling"):
        x = sampler.step(model.eps_hat(x, t), t, x, eta=1.0, generator=g).prev_sample
    rows = [model.decode_image(x), rgb, model.decode_image(z)]
    a.assets.mkdir(exist_ok=True, parents=True)
    save_sheet([torch.cat(list(row.clamp(-1, 1)), 2) for row in rows], a.assets / "samples.png")


# ---------------------------------------------------------------- (c) the teacher


# [H, W] of a step's batch, one drawn each time: the network meets every shape of picture
SHAPES = ((160, 160), (160, 192), (160, 224), (192, 128))
FROZEN = ("stem", "blocks.0.", "blocks.1.", "blocks.2.")  # edges and colours are known already


def train_teacher(a):
    """Synthetic labels only, like the paper's teacher: wild frames under any light and any crop,
    and a loss that forgives scale and shift."""
    frames = FrameSet("nano", a.labelled)

    def read(i):
        rgb, depth, valid = frames.read(i)
        disparity = np.where(valid, 1 / np.maximum(depth, 1e-3), 0)  # the sky is infinitely far
        return torch.tensor(rgb).permute(2, 0, 1), torch.tensor(disparity)[None].half()

    pictures, maps = load_frames(frames, a.teacher_frames, read)
    torch.manual_seed(0)
    teacher = Teacher.from_pretrained(a.base / "teacher") if a.base else new_teacher()
    teacher = teacher.to(a.device)
    net = teacher.net.train().to(memory_format=torch.channels_last)
    parts = {"encoder": [], "decoder": []}
    for name, p in net.named_parameters():
        p.requires_grad_(not name.startswith(FROZEN))
        parts["encoder" if name.startswith(("stem", "blocks")) else "decoder"].append(p)
    optimizer = torch.optim.AdamW(
        [{"params": parts["encoder"], "lr": 0.1 * a.teacher_lr}, {"params": parts["decoder"]}],
        lr=a.teacher_lr, betas=(0.9, 0.98), weight_decay=0.01)
    # of the weights, over about a tenth of the steps so far and 500 at most
    average = AveragedModel(
        net, avg_fn=lambda old, new, n: old + (new - old) * (10 / (10 + n)).clamp(min=0.002))
    mean, std = (torch.tensor(teacher.config[f"image_{k}"]).reshape(3, 1, 1).to(a.device)
                 for k in ("mean", "std"))

    def loss_of(g, batch):
        i = torch.randint(len(pictures), (batch,), generator=g)
        shape = SHAPES[torch.randint(len(SHAPES), (1,), generator=g)]
        x, target = crop(pictures[i].to(a.device).float() / 255, maps[i].to(a.device).float(),
                         shape, g)
        x = ((recolour(x, g) - mean) / std).contiguous(memory_format=torch.channels_last)
        return relative_loss(net(x).predicted_depth.float()[:, None], target)

    rows = SETS + TEST_SETS
    sources = parse_sources(a.val or [f"nano={a.data}/wild/test"], (), rows, "--val")
    sets = [FrameSet(name, *source, cap=64, flag="--val", rows=rows)
            for name, source in sources.items()]

    def watch():
        teacher.net = average.module
        return {f"{s.name}_{k}": v for s in sets for k, v in held_out_scores(
            lambda sample: teacher(sample.rgb[None].to(a.device))[0], s).items()}

    minutes = fit(a, "teacher", net, loss_of, optimizer, SHAPES, average, watch=watch)
    scores = watch()
    average.module.eval().cpu().half().save_pretrained(a.out / "teacher")
    open_to_others(a.out / "teacher/model.safetensors")
    (a.out / "teacher/preprocessor_config.json").write_text(
        json.dumps(teacher.config, indent=1) + "\n")
    card(a, "teacher", minutes, net, scores)


# --------------------------------------------------------- (d) what train.py made, as it is shipped


def ship(a):
    """--run -> fiffdepth/ in --out, in half precision and without the paths of this machine."""
    root = Path(__file__).resolve().parent.parent
    if not (a.run / "log.jsonl").exists():
        raise UserError(f"{a.run} holds no run; first: python train.py")
    model = FiffDepth.from_pretrained(a.run)
    log = read_lines(a.run / "log.jsonl")
    steps, flags = [line for line in log if "loss" in line], model.info["flags"]
    if len(steps) < flags["steps"]:
        raise UserError(f"{a.run} is at step {len(steps)} of {flags['steps']}; "
                        "finish it: python train.py --resume")
    model.info = json.loads(json.dumps(model.info).replace(f"{root}/", ""))
    model.save_pretrained(a.out / "fiffdepth", torch.float16)
    pictures = flags["batch"] / (2 if flags["no_teacher"] else 1)
    minutes = sum(pictures / line["pictures_per_second"] for line in steps) / 60
    scores = {k: v for k, v in log[-1].items() if k.startswith("val_")}
    card(a, "fiffdepth", minutes, model.unet, scores, a.run / "log.jsonl",
         "python train.py, with the flags in fiffdepth/fiffdepth.json")
    a.assets.mkdir(exist_ok=True, parents=True)
    for sheet in sorted(a.run.glob("preview_*.png"))[-1:]:
        Image.open(sheet).save(a.assets / "preview.png")


# ---------------------------------------------------------------- the command


def card(a, stage, minutes, net, scores, log=None, command=None):
    """A stage's entry in card.json, how it was made and what came out, and its log beside it."""
    flags = {k: v for k, v in vars(a).items() if k.startswith(f"{stage}_")}
    changed = "".join(f" --{k} {v}" for k, v in {"base": a.base, **flags}.items()
                      if v != a.defaults[k] and (k != "base" or stage != "fiffdepth"))
    file = a.out / "card.json"
    (a.out / "logs").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(log or a.work / f"{stage}.jsonl", a.out / f"logs/{stage}.jsonl")
    cards = json.loads(file.read_text()) if file.exists() else {}
    cards[stage] = {"command": command or f"python nano/pretrain.py {stage}{changed}",
                    "minutes": round(minutes, 1),
                    "parameters": sum(p.numel() for p in net.parameters()), **flags, **scores}
    file.write_text(json.dumps(cards, indent=1) + "\n")
    print(stage, cards[stage])


STAGES = {"vae": train_vae, "generator": train_generator, "teacher": train_teacher, "ship": ship}


def main(argv=None):
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("stages", nargs="*", default=["vae", "generator", "teacher"],
        help="vae, generator, teacher; ship puts what train.py made into --out")
    add("--data", type=Path, default=here / "data", help="folder that nano/scenes.py wrote")
    add("--labelled", type=Path, help="labelled wild frames, of any size from that of --data up; "
        "without it wild/labelled in --data")
    add("--photos", type=Path, help="folder of photographs for the autoencoder and the generator")
    add("--base", type=Path, help="folder like --out: every stage goes on from the weights there, "
        "instead of from nothing")
    add("--val", nargs="+", metavar="NAME=PATH", help="sets with depth to watch the teacher on; "
        "without it nano, wild/test in --data")
    add("--out", type=Path, default=here / "weights", help="finished weights")
    add("--work", type=Path, default=here.parent / "runs/pretrain",
        help="states to resume from, and logs")
    add("--run", type=Path, default=here.parent / "runs/fiffdepth",
        help="what ship takes: a finished run of train.py")
    add("--assets", type=Path, default=here.parent / "assets",
        help="where the generator's samples are drawn")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first there is")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
        help="precision of the computation; auto: the faster one; a state keeps its own")
    for stage, steps, batch, lr, frames in (("vae", 8000, 8, 1e-3, 8000),
                                            ("generator", 6000, 64, 2e-3, 12000),
                                            ("teacher", 8000, 16, 4e-4, 64000)):
        add(f"--{stage}_steps", type=int, default=steps, help="optimiser steps")
        add(f"--{stage}_batch", type=int, default=batch, help="pictures a step")
        add(f"--{stage}_lr", type=float, default=lr, help="peak learning rate")
        add(f"--{stage}_frames", type=int, default=frames, help="frames used of each set")
    a = parser.parse_args(argv)
    a.defaults = vars(parser.parse_args([]))
    a.labelled = a.labelled or a.data / "wild/labelled"
    for stage in a.stages:
        if stage not in STAGES:
            parser.error(f"unknown stage {stage}: choose from {', '.join(STAGES)}")
    for name, value in vars(a).items():
        if name.endswith(("_steps", "_batch", "_frames")) and value < 1:
            parser.error(f"--{name} {value}: must be at least 1")
    a.device = choose_device(a.device)
    for stage in a.stages:
        STAGES[stage](a)


if __name__ == "__main__":
    sys.exit(command(main))
