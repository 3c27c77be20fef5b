"""Table 3: seconds a picture and FLOPs of FiffDepth, Marigold, Depth Anything V2-L and Depth Pro.

    python benchmarks/speed.py                                  # at most about 20 minutes
    python benchmarks/speed.py --weights fiffdepth=runs/sd2 --images 100 --minutes 60

Every method runs from its public class with its own resizing, batch 1, in float32 and in the
device's half precision. Weights that are not on this machine are random, at the public size: the
speed is the same. Nothing is downloaded. A row is printed as soon as it is measured, and is kept in
--out: the same command on the same machine does not measure it again.

Read top to bottom: sizes -> networks without their weights -> the methods -> FLOPs -> seconds ->
the table -> the command.
"""
import argparse
import gc
import platform
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.report import published, table  # noqa: E402
from data import (HelpFormatter, UserError, add_line, command, explain,  # noqa: E402
                  read_lines)
from infer import predict_image  # noqa: E402
from model import (AUTHORS_INFO, SD_SCHEDULE, FiffDepth, Teacher, choose_device,  # noqa: E402
                   cpu_speedup)

EXAMPLE = Path(__file__).resolve().parents[1] / "examples/wild_room.jpg"
EMULATED = 0.2  # of float32's speed: what is slower has no instructions for it on this CPU
HEAD = ("method", "weights", "precision", "pictures", "seconds, mean ± sd", "TFLOP",
        "published seconds (Titan RTX)")

# ---------------------------------------------------------------- the public sizes
# What is not given is the class's own default. From the config files of Stable Diffusion 2,
# Marigold v1.1 (its steps and resolution), Depth Anything V2-L and Depth Pro, some of them read in
# copies.

SD2_UNET = {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024,
            "use_linear_projection": True, "sample_size": 96}
SD_VAE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "sample_size": 768,
          "down_block_types": ("DownEncoderBlock2D",) * 4,
          "up_block_types": ("UpDecoderBlock2D",) * 4}
STABLE_DIFFUSION = {"unet": SD2_UNET, "vae": SD_VAE}
MARIGOLD = {"unet": SD2_UNET | {"in_channels": 8}, "vae": SD_VAE,  # picture and depth latents
            "default_denoising_steps": 4, "default_processing_resolution": 768, "steps": None}
VIT_L = {"model_type": "dinov2", "hidden_size": 1024, "num_attention_heads": 16,
         "num_hidden_layers": 24}
DEPTH_ANYTHING = {
    "network": {"backbone_config": VIT_L | {"image_size": 518, "out_indices": [5, 12, 18, 24],
                                            "reshape_hidden_states": False},
                "reassemble_hidden_size": 1024, "neck_hidden_sizes": [256, 512, 1024, 1024],
                "fusion_hidden_size": 256},
    "processor": {"size": {"height": 518, "width": 518}, "keep_aspect_ratio": True,
                  "ensure_multiple_of": 14, "image_mean": [0.485, 0.456, 0.406],
                  "image_std": [0.229, 0.224, 0.225]}}
# Three ViT-L. DepthProConfig's own default is smaller than the public network: ViT-B of patch 14,
# and no field of view.
DEPTH_PRO = {"use_fov_model": True} | {
    f"{part}_model_config": VIT_L | {"image_size": 384, "patch_size": 16, "use_mask_token": False}
    for part in ("image", "patch", "fov")}


class Method(NamedTuple):
    name: str                 # of --weights
    title: str
    published: str            # its row of published.csv; "" without one
    build: Callable           # (source or None, settings, dtype, device) -> Timed
    settings: dict            # configs of the networks
    hub: tuple | None = None  # hub id, and a file that is in the cache when the weights are


class Timed(NamedTuple):
    run: Callable    # uint8 [H, W, 3] -> map [H, W]
    nets: list       # all networks with weights
    count: Callable  # size of the picture -> {part: [calls, FLOPs a call]}; nets on "meta" by then
    weights: str     # what the table says of them


# ---------------------------------------------------------------- networks without their weights


def cached(hub_id, file):
    """Is this file of the hub in the local cache? Asks no network."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(hub_id, file), str)


def random_net(make, dtype, device):
    """A network of make()'s shape with random weights, in seconds for a thousand million of them.

    The classes' own initialisation takes minutes, so it happens on "meta", where it costs nothing.
    The weights keep the variance of what passes: constants would make a GPU faster than it is,
    values that grow overflow half precision, values that vanish are slow on a CPU.
    """
    with torch.device("meta"):
        net = torch.nn.Module.to(make(), dtype)  # diffusers' own .to warns, of nothing
    if any(True for _ in net.buffers()):  # computed in __init__, and lost on "meta"
        raise ValueError(f"{type(net).__name__} has buffers, which random_net cannot fill")
    net = net.to_empty(device=device).eval().requires_grad_(False)
    for name, p in net.named_parameters():
        if p.ndim > 1:
            p.normal_(std=p[0].numel() ** -0.5)
        else:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
    return net


def random_unet_and_vae(settings, dtype, device):
    return (random_net(lambda: UNet2DConditionModel.from_config(settings["unet"]), dtype, device),
            random_net(lambda: AutoencoderKL.from_config(settings["vae"]), dtype, device))


def prompt_for(unet):
    """The empty prompt's shape [1, 2, width]: two tokens, begin and end."""
    return torch.randn(1, 2, unet.config.cross_attention_dim, dtype=unet.dtype)


def real_or_random(source):
    return "real" if source else "random"


# ---------------------------------------------------------------- the methods


def build_fiffdepth(source, settings, dtype, device):
    """Ours. With settings["tiny"], an AutoencoderTiny takes the place of the full autoencoder."""
    weights = real_or_random(source)
    if source:
        model = FiffDepth.from_pretrained(source, dtype=dtype)
    else:
        unet, vae = random_unet_and_vae(settings, dtype, device)
        model = FiffDepth(unet, vae, DDPMScheduler(**SD_SCHEDULE), prompt_for(unet), AUTHORS_INFO)
    if "tiny" in settings:
        vae, vae_weights = tiny_vae(settings, dtype, device)
        weights += "" if vae_weights == weights else f", VAE {vae_weights}"
        model = FiffDepth(model.unet, vae, model.scheduler, model.prompt, model.info)
    model.eval().to(device)
    return Timed(lambda picture: predict_image(model, picture, size=max(picture.shape[:2])),
                 [model], lambda size: latent_flops(model.vae, model.unet, size, 1), weights)


def tiny_vae(settings, dtype, device):
    """-> an AutoencoderTiny and which weights it has."""
    if cached(*settings["tiny_hub"]):
        return AutoencoderTiny.from_pretrained(settings["tiny_hub"][0], torch_dtype=dtype,
                                               local_files_only=True), "real"
    net = random_net(lambda: AutoencoderTiny.from_config(settings["tiny"]), dtype, device)
    return net, "random"


def build_marigold(source, settings, dtype, device):
    """diffusers' pipeline at its own defaults; settings["steps"] may replace that of steps."""
    from diffusers import DDIMScheduler, MarigoldDepthPipeline

    if source:
        pipe = MarigoldDepthPipeline.from_pretrained(source, torch_dtype=dtype,
                                                     local_files_only=True)
    else:
        unet, vae = random_unet_and_vae(settings, dtype, device)
        pipe = MarigoldDepthPipeline(
            unet, vae, DDIMScheduler(prediction_type="v_prediction", **SD_SCHEDULE), None, None,
            prediction_type="depth",
            **{k: v for k, v in settings.items() if k.startswith("default_")})
        # without a text encoder; a real one runs once, before the clock
        pipe.empty_text_embedding = prompt_for(unet)
    pipe.to(device).set_progress_bar_config(disable=True)
    resize = pipe.image_processor.resize_to_max_edge  # no bfloat16 on a CPU: it is done in float32
    pipe.image_processor.resize_to_max_edge = lambda image, *how: resize(
        image.float(), *how).to(image.dtype)
    steps = settings["steps"] or pipe.default_denoising_steps
    generator = torch.Generator(device).manual_seed(0)

    def run(picture):
        result = pipe(Image.fromarray(picture), num_inference_steps=steps, generator=generator)
        return result.prediction[0, ..., 0]

    return Timed(run, [pipe.unet, pipe.vae], lambda _: latent_flops(
        pipe.vae, pipe.unet, pipe.default_processing_resolution, steps), real_or_random(source))


def build_depth_anything(source, settings, dtype, device):
    """The network of our teacher, with the teacher's resizing."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    if source:
        teacher = Teacher.from_pretrained(source, dtype=dtype).to(device)
    else:
        config = DepthAnythingConfig(**settings["network"])
        teacher = Teacher(random_net(lambda: DepthAnythingForDepthEstimation(config), dtype,
                                     device), settings["processor"])
    return Timed(lambda picture: teacher(to_tensor(picture, device))[0].cpu().numpy(),
                 [teacher.net],
                 lambda size: network_flops(teacher.net, teacher.resized(size, size)),
                 real_or_random(source))


def build_depth_pro(source, settings, dtype, device):
    """With its field of view. transformers' processor, which wants torchvision, in five lines."""
    from transformers import DepthProConfig, DepthProForDepthEstimation

    if source:
        net = DepthProForDepthEstimation.from_pretrained(source, dtype=dtype,
                                                         local_files_only=True).eval().to(device)
    else:
        config = DepthProConfig(**settings)
        net = random_net(lambda: DepthProForDepthEstimation(config), dtype, device)
    side = round(net.config.patch_size / net.config.scaled_images_ratios[0])  # 1536

    def run(picture):
        x = F.interpolate(to_tensor(picture, device), (side, side), mode="bilinear")
        out = net(x.to(dtype))
        width_by_focal_length = 2 * torch.tan(torch.deg2rad(out.field_of_view.float()) / 2)
        inverse = out.predicted_depth.float() * width_by_focal_length  # 1/m
        inverse = F.interpolate(inverse[:, None], picture.shape[:2], mode="bilinear")
        return (1 / inverse[0, 0].clamp(1e-4, 1e4)).cpu().numpy()

    return Timed(run, [net], lambda _: network_flops(net, (side, side)), real_or_random(source))


def to_tensor(picture, device):
    """uint8 [H, W, 3] -> [1, 3, H, W] in [-1, 1]"""
    return torch.tensor(picture, device=device).permute(2, 0, 1)[None].float() / 127.5 - 1


METHODS = (
    Method("fiffdepth", "FiffDepth", "FiffDepth (paper)", build_fiffdepth, STABLE_DIFFUSION),
    Method("fiffdepth", "FiffDepth, tiny VAE", "", build_fiffdepth, STABLE_DIFFUSION | {
        "tiny": {}, "tiny_hub": ("madebyollin/taesd", "diffusion_pytorch_model.safetensors")}),
    Method("marigold", "Marigold v1.1, default settings", "Marigold", build_marigold, MARIGOLD,
           ("prs-eth/marigold-depth-v1-1", "unet/diffusion_pytorch_model.safetensors")),
    Method("marigold", "Marigold v1.1, 1 step", "", build_marigold, MARIGOLD | {"steps": 1},
           ("prs-eth/marigold-depth-v1-1", "unet/diffusion_pytorch_model.safetensors")),
    Method("depth_anything", "Depth Anything V2-L", "Depth Anything v2-L", build_depth_anything,
           DEPTH_ANYTHING, ("depth-anything/Depth-Anything-V2-Large-hf", "model.safetensors")),
    Method("depth_pro", "Depth Pro", "Depth Pro", build_depth_pro, DEPTH_PRO,
           ("apple/DepthPro-hf", "model.safetensors")),
)


# ---------------------------------------------------------------- FLOPs
# torch's counter: a multiply-add is 2; products and convolutions only. On "meta", where nothing is
# computed, attention falls apart into the products that the counter knows; a fused kernel on a CPU
# would count as 0.


def latent_flops(vae, unet, size, calls):
    """-> {part: [calls, FLOPs a call]} of a picture [1, 3, size, size] through encoder, UNet,
    decoder."""
    blocks = vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels
    cells = -(-size // 2 ** (len(blocks) - 1))
    empty = {"device": "meta", "dtype": unet.dtype}
    picture = torch.empty(1, 3, size, size, **empty)
    latent, unet_latent = (torch.empty(1, channels, cells, cells, **empty) for channels in
                           (vae.config.latent_channels, unet.config.in_channels))
    prompt = prompt_for(unet).to("meta")
    return {"encoder": [1, flops(vae.encode, picture)],
            "UNet": [calls, flops(unet, unet_latent, 0, prompt)],
            "decoder": [1, flops(vae.decode, latent)]}


def network_flops(net, size):
    """-> {child of the network: [1, FLOPs]}; size: (H, W) of its input."""
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 3, *size, device="meta", dtype=net.dtype))
    counted = counter.get_flop_counts()

    def total(path, part):  # a list of modules is never called itself
        return sum(counted[path].values()) if path in counted else sum(
            total(f"{path}.{name}", child) for name, child in part.named_children())

    counts = {name: total(f"{type(net).__name__}.{name}", part)
              for name, part in net.named_children()}
    assert sum(counts.values()) == counter.get_total_flops(), "work outside the children"
    return {name: [1, n] for name, n in counts.items()}


def flops(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


# ---------------------------------------------------------------- seconds


def seconds_of(run, size, images, warm_up, device, end=float("inf"), title=""):
    """-> seconds of each picture (numpy arrays in memory to a map in memory), and the last map.

    end    on time.monotonic's clock: a picture that would not be done by then is not begun, and the
           first is stopped with OutOfTime. Where no warm-up was possible, its seconds count.
    title  of the progress bar
    """
    pictures, seconds = np.random.default_rng(0), []
    for _ in tqdm(range(warm_up + images), desc=title, unit="picture", leave=False,
                  disable=not title, mininterval=0.1 if sys.stderr.isatty() else 30):
        if seconds and time.monotonic() + seconds[-1] > end:
            break
        picture = pictures.integers(0, 256, (size, size, 3), np.uint8)
        synchronize(device)
        began = time.perf_counter()
        with time_limit(end) if not seconds else nullcontext():
            values = run(picture)
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds[warm_up:] or seconds[-1:], values


class OutOfTime(Exception):
    pass


@contextmanager
def time_limit(end):
    """Raises OutOfTime before the first layer, of any network, that begins after `end`."""
    def check(*_):
        if time.monotonic() > end:
            raise OutOfTime

    hook = torch.nn.modules.module.register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        hook.remove()


def synchronize(device):
    if device.split(":")[0] in ("cuda", "mps"):
        getattr(torch, device.split(":")[0]).synchronize()


def time_one(method, source, precision, device, size, images, warm_up, end, title=""):
    """One method in one precision -> what its row says. Its networks are gone afterwards."""
    timed = method.build(source, method.settings, getattr(torch, precision), device)
    seconds, values = seconds_of(timed.run, size, images, warm_up, device, end, title)
    assert values.shape == (size, size), f"{method.title}: a map of {values.shape}"
    for net in timed.nets:
        net.to("meta")
    remark = "" if np.isfinite(values).all() else ", map not finite"
    return {"weights": timed.weights + remark, "pictures": len(seconds),
            "mean": float(np.mean(seconds)),
            "sd": float(np.std(seconds, ddof=1)) if len(seconds) > 1 else None,
            "flops": timed.count(size)}


def measure(device, images, warm_up=1, size=512, precisions=("float32",), minutes=18.0,
            sources=None, methods=METHODS, finished=None):
    """Yields a dict for each method and precision, which json can store.

    minutes   for all of them; each gets an equal share of what is left
    sources   {name: folder or hub id} of weights to take instead of those in the hub's cache
    finished  {key: dict} of an earlier run, yielded as they are
    """
    end = time.monotonic() + 60 * minutes
    emulated = {p for p in precisions if device == "cpu" and p != "float32"
                and cpu_speedup(getattr(torch, p)) < EMULATED}
    rows, waiting = [], 0
    for method in methods:
        source = (sources or {}).get(method.name)
        for p in precisions:
            key = " | ".join(map(str, (method.title, p, source, size, images, minutes,
                                       machine_name(device))))
            rows.append((key, method, p, source))
            waiting += p not in emulated and key not in (finished or {})
    for key, method, precision, source in rows:
        if key in (finished or {}):
            yield finished[key]
            continue
        result = {"key": key, "method": method.title, "precision": precision, "error": None,
                  "published": seconds_published().get(method.published)}
        now = time.monotonic()
        if precision in emulated:
            result["error"] = "emulated on this CPU, not timed"
        elif now > end:
            result["error"] = f"not timed: the {minutes:g} --minutes are over"
        else:
            title = (f"{method.title}, {precision}; {waiting} to go, at most "
                     f"{(end - now) / 60:.0f} min")
            result |= try_one(method, source, precision, device, size, images, warm_up,
                              now + (end - now) / waiting, title)
        waiting -= precision not in emulated
        yield result


def try_one(method, source, precision, device, *how):
    """time_one, or the error: whatever it is, the others are still to be measured."""
    source = source or (method.hub[0] if method.hub and cached(*method.hub) else None)
    try:
        with torch.inference_mode():
            return time_one(method, source, precision, device, *how)
    except OutOfTime:
        return {"error": "longer than its share of --minutes"}
    except Exception as error:
        return {"error": f"failed: {explain(error)}"}
    finally:
        gc.collect()  # pipelines refer to themselves
        if device.startswith("cuda"):
            torch.cuda.empty_cache()


def machine_name(device):
    """All that seconds depend on, beside the method: with another name they are measured anew."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return (f"{device} ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), "
            f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")


# ---------------------------------------------------------------- the table


def seconds_published():
    """{row of published.csv: seconds, as printed}"""
    return {row["method"]: row["seconds"] for row in published() if row["seconds"]}


def row_of(r):
    head, last = [r["method"], r.get("weights", ""), r["precision"]], r["published"] or ""
    if r["error"]:
        return [*head, "", r["error"], "", last]
    spread = "" if r["sd"] is None else f" ± {r['sd']:.2g}"
    parts = " + ".join(f"{name} {f'{calls} x ' if calls > 1 else ''}{n / 1e12:.2f}"
                       for name, (calls, n) in r["flops"].items())
    total = sum(calls * n for calls, n in r["flops"].values()) / 1e12
    return [*head, r["pictures"], f"{r['mean']:.3g}{spread}", f"{total:.2f} = {parts}", last]


def lines_of(results, device, images, warm_up, size, minutes):
    """Yields the lines of the Markdown table, each as soon as it is measured."""
    yield (f"{machine_name(device)}; pictures of {size}x{size}, up to {images} after {warm_up} in "
           f"{minutes:g} minutes for all, batch 1, resizing included; a multiply-add is 2 FLOP")
    yield ""
    yield from table(HEAD, map(row_of, results))
    yield ""
    absent = seconds_published().keys() - {method.published for method in METHODS}
    yield ("Published and not run here: " + ", ".join(
        f"{name} {seconds}" for name, seconds in seconds_published().items() if name in absent)
        + ". Marigold's 103 s are those of its settings when the paper was written, not of v1.1.")


@torch.inference_mode()
def difference(source, picture, size, device):
    """How far a bfloat16 map lies from the float32 map of the same network (FiffDepth, of Stable
    Diffusion 2's size and random without a source) -> largest and mean, as shares of the range."""
    torch.manual_seed(0)
    model, = build_fiffdepth(source, STABLE_DIFFUSION, torch.float32, device).nets
    full = predict_image(model, picture, size)
    half = predict_image(model.to(torch.bfloat16), picture, size)
    apart = np.abs(full - half) / np.ptp(full)
    return float(apart.max()), float(apart.mean())


# ---------------------------------------------------------------- the command


def run(a):
    names = sorted({method.name for method in METHODS})
    sources = dict(word.partition("=")[::2] for word in a.weights)
    if not set(sources) <= set(names) or not all(sources.values()):
        raise UserError(f"--weights {' '.join(a.weights)}: NAME=DIR with a NAME of "
                        f"{', '.join(names)}")
    device = choose_device(a.device)
    if a.difference:
        largest, mean = difference(sources.get("fiffdepth"), EXAMPLE, a.size, device)
        print(f"bfloat16 against float32, {a.size} pixels: at most {largest:.2%} of the map's "
              f"range apart, {mean:.2%} on average")
        return 0
    on_gpu = device.startswith("cuda")
    images = (100 if on_gpu else 3) if a.images is None else a.images
    for flag, value in (("--images", images), ("--size", a.size)):
        if value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if not 0 < a.minutes < float("inf"):
        raise UserError(f"--minutes {a.minutes:g}: must be more than 0")
    a.out.parent.mkdir(parents=True, exist_ok=True)
    kept = read_lines(a.out)
    if a.out.exists() and a.out.stat().st_size and not all("key" in r for r in kept or [{}]):
        raise UserError(f"--out {a.out}: not a file of speed.py; choose another name")
    finished = {r["key"]: r for r in kept}
    warm_up, precisions = 3 if on_gpu else 1, a.dtype or ["float32",
                                                          "float16" if on_gpu else "bfloat16"]

    def results():
        for r in measure(device, images, warm_up, a.size, precisions, a.minutes, sources, METHODS,
                         finished):
            if not r["error"] and r["key"] not in finished:
                add_line(a.out, r)
            yield r

    for line in lines_of(results(), device, images, warm_up, a.size, a.minutes):
        print(line, flush=True)
    return 0


def flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--images", type=int, metavar="N", help="pictures timed for each method, or as many as its "
        "share of --minutes allows; without it, 100 on CUDA and 3 elsewhere")
    add("--minutes", type=float, default=18.0, help="for the whole table; a method whose first "
        "picture takes longer than its share of what is left is stopped, and its row says so")
    add("--size", type=int, default=512, metavar="PIXELS", help="sides of the pictures")
    add("--weights", nargs="+", action="extend", default=[], metavar="NAME=DIR|HUB_ID",
        help="weights: " + ", ".join(sorted({method.name for method in METHODS}))
        + "; without it, those in the hub's cache, or random ones")
    add("--dtype", nargs="+", choices=("float32", "float16", "bfloat16"), help="precisions; "
        "without it, float32 and float16 on CUDA, float32 and bfloat16 elsewhere")
    add("--difference", action="store_true", help="instead of the table: how far FiffDepth's "
        "bfloat16 map of an example lies from its float32 map")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), one of them, or cuda:1")
    add("--out", type=Path, default=Path("runs/speed.jsonl"), metavar="FILE.jsonl",
        help="what was measured; what is there already is not measured again")
    return parser


def main(argv=None):
    return run(flags().parse_args(argv))


if __name__ == "__main__":
    sys.exit(command(main))
