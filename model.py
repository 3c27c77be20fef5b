"""FiffDepth's networks: a latent diffusion generator used as a feed-forward depth estimator.

FiffDepth = the generator's frozen autoencoder, its UNet (the ε̂_θ of the paper) and the stored
embedding of the empty prompt. Eq. 1 is predict, Eq. 4 is filter; at inference one call remains,
forward.
Teacher = a relative-depth network of transformers (the paper: Depth Anything V2-Large), Sec. 3.3.

    model = FiffDepth.from_pretrained("nano/weights/fiffdepth")  # or a hub id,
                                                                 # or Stable Diffusion 2
    depth = model(rgb)  # [B, 3, H, W] in [-1, 1] -> [B, 1, H, W]
"""
import json
import math
import os
import shutil
import time
from functools import lru_cache
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data import UserError, explain

PROMPT_FILE, INFO_FILE = "empty_prompt.safetensors", "fiffdepth.json"
# A folder without our JSON is read as the paper's authors lay theirs out: depth, not disparity, 768
# pixels.
AUTHORS_INFO = {"target": "depth", "size": 768}
# A folder without a scheduler (the authors' have none) gets Stable Diffusion's noise schedule.
SD_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
               "beta_schedule": "scaled_linear", "clip_sample": False}

# model_type of transformers' networks that always predict metres, where larger is farther.
METRIC_NETWORKS = {"depth_pro", "zoedepth", "prompt_depth_anything", "glpn"}


class FiffDepth(nn.Module):
    """Frozen VAE, UNet and empty prompt. C latent channels, h = H / factor, w = W / factor.

    info  what inference needs to know: "target" (disparity or depth), "size" (training pixels of
          the longer side), "base", "teacher", "flags"; kept beside the weights as fiffdepth.json
    """

    def __init__(self, unet, vae, scheduler, prompt, info):
        super().__init__()
        self.unet, self.vae = unet, vae.requires_grad_(False).eval()
        self.scheduler, self.info = scheduler, dict(info)
        blocks = vae.config.get("block_out_channels") or vae.config.encoder_block_out_channels
        self.factor = 2 ** (len(blocks) - 1)  # pixels a latent cell; 8 in Stable Diffusion
        self.register_buffer("prompt", prompt, persistent=False)  # [1, L, width]
        self.register_buffer("alphas_cumprod", scheduler.alphas_cumprod.clone(),
                             persistent=False)  # [T]

    # ------------------------------------------------------------ the method

    def eps_hat(self, latent, t):
        """ε̂_θ(latent, t), the UNet's raw output.

        latent, result [B, C, h, w]; t int or [B], −1..T−1
        t goes to the time embedding as a plain number, which takes −1 as well as 999. It never
        indexes the noise schedule here: alphas_cumprod[−1] would silently be the noisiest step.
        """
        t = torch.as_tensor(t, device=latent.device).expand(len(latent))
        prompt = self.prompt.to(self.unet.dtype).expand(len(latent), -1, -1)
        return self.unet(latent.to(self.unet.dtype), t, encoder_hidden_states=prompt).sample

    def eps_hat_each(self, *calls):
        """Several (latent, t) -> their outputs; None stays None. Latents of one size share one UNet
        call, about a tenth faster forward and backward where they are small."""
        real = [call for call in calls if call is not None]
        if len({latent.shape[1:] for latent, _ in real}) == 1:
            t = torch.cat([torch.as_tensor(t, device=latent.device).expand(len(latent))
                           for latent, t in real])
            outputs = iter(self.eps_hat(torch.cat([latent for latent, _ in real]), t)
                           .split([len(x) for x, _ in real]))
        else:
            outputs = (self.eps_hat(*call) for call in real)
        return [None if call is None else next(outputs) for call in calls]

    def predict(self, x0):
        """Eq. 1: d_0 = ε̂_θ(x_0, t = 0).   x0 image latent -> d0 depth latent, [B, C, h, w] both

        The output is the depth latent itself: no sign flip, no conversion by a scheduler."""
        return self.eps_hat(x0, 0)

    def filter(self, d0):
        """Eq. 4: d_−1 = ε̂_θ(d_0, t = −1), d_0 at the teacher's level of detail; training only.

        No detach: the teacher's correction must pass through the filter and reach d_0."""
        return self.eps_hat(d0, -1)

    def alpha_bar(self, t):
        """ᾱ_t for t in 1..T−1 (long, [B]) -> [B, 1, 1, 1]. The table is 0-based; its entry 0
        already carries a little noise, and is left to the clean step t = 0, which has none."""
        if bool((t < 1).any()):
            raise ValueError("only t = 1..T-1 are noised; 0 is the clean step and -1 the filter")
        return self.alphas_cumprod[t].reshape(-1, 1, 1, 1)

    # ------------------------------------------------------------ pixels <-> latents

    @torch.no_grad()
    def encode(self, image):
        """Image or three-channel depth [B, 3, H, W] in [-1, 1] -> latent
        [B, C, ⌈H/factor⌉, ⌈W/factor⌉].

        The mean of the posterior, never a sample; no gradient; the precision of the VAE's own
        weights, for these latents are the targets. Odd sizes are padded at the right and bottom
        edge."""
        height, width = image.shape[-2:]
        image = F.pad(image, (0, -width % self.factor, 0, -height % self.factor), mode="replicate")
        with torch.autocast(image.device.type, enabled=False):
            coded = self.vae.encode(image.to(self.vae.dtype))
        latent = coded.latent_dist.mean if hasattr(coded, "latent_dist") else coded[0]
        return ((latent - (self.vae.config.get("shift_factor") or 0))
                * self.vae.config.scaling_factor)

    def decode_image(self, latent):
        """Latent [B, C, h, w] -> image [B, 3, h·factor, w·factor], about [-1, 1], not clamped."""
        latent = (latent.to(self.vae.dtype) / self.vae.config.scaling_factor
                  + (self.vae.config.get("shift_factor") or 0))
        with torch.autocast(latent.device.type, enabled=False):
            return self.vae.decode(latent).sample

    def decode(self, latent):
        """Depth latent [B, C, h, w] -> [B, 1, h·factor, w·factor] in [-1, 1]:
        the mean of three channels."""
        return self.decode_image(latent).mean(1, keepdim=True).clamp(-1, 1)

    @torch.no_grad()
    def forward(self, rgb):
        """rgb [B, 3, H, W] in [-1, 1], any size -> normalised depth or disparity [B, 1, H, W] in
        [-1, 1]."""
        return self.decode(self.predict(self.encode(rgb)))[..., : rgb.shape[-2], : rgb.shape[-1]]

    # ------------------------------------------------------------ folders

    @classmethod
    def from_pretrained(cls, path_or_id, vae=None, dtype=torch.float32):
        """Reads a checkpoint of ours, a generator in diffusers layout (Stable Diffusion 1.5, 2,
        2.1, ...), or the authors' layout (unet vae text_encoder tokenizer), from a folder or a hub
        id.

        vae    another autoencoder of the same latent space (e.g. an AutoencoderTiny), folder or hub
               id
        dtype  of the weights in memory; float32 for training
        """
        path = str(path_or_id)
        check_folder(path, "a checkpoint or generator (unet/, vae/)", "unet/config.json")
        keep = {"torch_dtype": dtype,
                "low_cpu_mem_usage": False}  # the latter wants another package
        unet = load(UNet2DConditionModel, path, subfolder="unet", **keep)
        scheduler = load_scheduler(path)
        prompt = read_prompt(path, unet.config.cross_attention_dim)
        if vae is None:
            autoencoder = load_vae(path, "vae", keep)
        else:
            # a whole pipeline, or a bare autoencoder
            beside = local_file(vae, "vae/config.json") is not None
            autoencoder = load_vae(str(vae), "vae" if beside else None, keep)
        channels = {unet.config.in_channels, unet.config.out_channels,
                    autoencoder.config.latent_channels}
        if len(channels) > 1:
            raise UserError(f"{path}: its UNet takes {unet.config.in_channels} channels and gives "
                            f"{unet.config.out_channels}, the autoencoder has "
                            f"{autoencoder.config.latent_channels}; choose a text-to-image "
                            "generator, or a --vae of the same latent space")
        info_file = local_file(path, INFO_FILE)
        info = read_json(info_file) if info_file else AUTHORS_INFO
        return cls(unet, autoencoder, scheduler, prompt.to(dtype), info).eval()

    def save_pretrained(self, path, dtype=None):
        """Writes unet/, vae/, scheduler/ (as v-prediction, which Eq. 3 makes of any base), the
        empty prompt and the JSON. Each file is written beside its place and renamed into it, the
        JSON last.
        dtype: store the weights at another precision, e.g. torch.float16."""
        path = Path(path)
        temporary = path / ".saving"  # inside: on the same file system, whatever path is
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, net in (("vae", self.vae), ("unet", self.unet)):
            state = None if dtype is None else {k: v.to(dtype) for k, v in net.state_dict().items()}
            save_network(net, temporary / name, state)
        DDPMScheduler.from_config(
            self.scheduler.config, prediction_type="v_prediction"
        ).save_pretrained(temporary / "scheduler")
        save_file({"prompt": self.prompt.float().cpu().contiguous()}, temporary / PROMPT_FILE)
        (temporary / INFO_FILE).write_text(json.dumps(self.info, indent=1) + "\n")
        for file in sorted(temporary.rglob("*"), key=lambda f: (f.name == INFO_FILE, str(f))):
            if file.is_file():
                target = path / file.relative_to(temporary)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
        shutil.rmtree(temporary)


class Teacher(nn.Module):
    """The source of pseudo-labels (Sec. 3.3): rgb -> relative disparity, larger is nearer, no
    gradient.

    A relative-depth network that transformers' AutoModelForDepthEstimation loads. Its preprocessing
    is a resize and a normalisation, done here on tensors with the numbers of the folder's own
    preprocessor_config.json.
    """

    def __init__(self, net, config):
        super().__init__()
        self.net, self.config = net.requires_grad_(False).eval(), config

    @classmethod
    def from_pretrained(cls, path_or_id, dtype=torch.float32):
        # slow to import, and only training needs it
        from transformers import AutoModelForDepthEstimation
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        path = str(path_or_id)
        check_folder(path, "a teacher", "config.json")
        # a class that lies beside its weights is a program: it runs from this repository alone
        ours = Path(path).is_dir() and Path(path).resolve().is_relative_to(
            Path(__file__).resolve().parent)
        net = load(AutoModelForDepthEstimation, path, dtype=dtype, trust_remote_code=ours)
        file = local_file(path, "preprocessor_config.json")
        if file is None:
            raise UserError(f"{path}: no preprocessor_config.json; --teacher wants a depth model "
                            "saved with its image processor")
        config = read_json(file)
        if (net.config.model_type in METRIC_NETWORKS
                or getattr(net.config, "depth_estimation_type", "relative") != "relative"):
            raise UserError(f"{path}: predicts metric depth; --teacher wants relative disparity")
        size = config.get("size")
        if not isinstance(size, dict) or not {"height", "width"} <= set(size):
            raise UserError(f"{path}: its preprocessor_config.json has no size by height and width")
        if not {"image_mean", "image_std"} <= set(config):
            raise UserError(f"{path}: its preprocessor_config.json has no image_mean and image_std")
        return cls(net, config)

    def resized(self, height, width):
        """The size the network sees: near config["size"], aspect kept by the smaller change of
        scale, each side a multiple of the patch (transformers' DPTImageProcessor rule)."""
        size, multiple = self.config["size"], self.config.get("ensure_multiple_of") or 1
        sy, sx = size["height"] / height, size["width"] / width
        if self.config.get("keep_aspect_ratio"):
            sy = sx = sx if abs(1 - sx) < abs(1 - sy) else sy
        return tuple(max(multiple, round(side * s / multiple) * multiple)
                     for side, s in ((height, sy), (width, sx)))

    def preprocess(self, rgb):
        """rgb [B, 3, H, W] in [-1, 1] -> what the network expects, [B, 3, H', W']"""
        x = (rgb.float() + 1) / 2
        if self.config.get("do_resize", True):
            x = F.interpolate(x, self.resized(*x.shape[-2:]), mode="bicubic",
                              antialias=True).clamp(0, 1)
        mean, std = (torch.tensor(self.config[k], device=x.device).reshape(3, 1, 1)
                     for k in ("image_mean", "image_std"))
        return (x - mean) / std

    @torch.no_grad()
    def forward(self, rgb):
        """rgb [B, 3, H, W] in [-1, 1] -> relative disparity [B, H, W],
        at least 0, scale and shift unknown"""
        disparity = self.net(self.preprocess(rgb).to(self.net.dtype)).predicted_depth.float()
        return F.interpolate(disparity[:, None], rgb.shape[-2:], mode="bilinear",
                             align_corners=True)[:, 0]


# ---------------------------------------------------------------- device and precision


def choose_device(name):
    """--device: "auto" is cuda, then mps, then cpu; another name is tried out."""
    if name == "auto":
        accelerators = [("cuda", torch.cuda), ("mps", torch.backends.mps)]
        return next((n for n, library in accelerators if library.is_available()), "cpu")
    try:
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name} cannot be used here ({explain(error)}); "
                        "without the flag the best there is will be taken") from None
    return name


def choose_dtype(name, device, training=False):
    """--dtype: a name, or "auto", the fastest precision that is safe -> torch.dtype.

    training  the precision of autocast over float32 weights: float32 or bfloat16
    On a CPU it depends on the processor: bfloat16 is emulated on one (a hundred times slower) and
    several times faster than float32 on the next, so "auto" measures it.
    """
    if name != "auto":
        return getattr(torch, name)
    if device.startswith("cuda"):
        if not training:
            return torch.float16
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    faster = device == "cpu" and cpu_speedup(torch.bfloat16) > 1.2
    return torch.bfloat16 if faster else torch.float32


@lru_cache
def cpu_speedup(dtype):
    """How many times faster than in float32 this CPU computes a small convolution and a matrix
    product, the lesser of the two gains. Below 1 it is slower; far below, it emulates `dtype`."""
    def seconds(function, *arguments):
        began = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - began

    gains = []
    with torch.inference_mode():
        for function, *shapes in ((F.conv2d, (1, 64, 16, 16), (64, 64, 3, 3)),
                                  (torch.matmul, (128, 256), (256, 256))):
            inputs = {kind: [torch.ones(s, dtype=kind) for s in shapes]
                      for kind in (torch.float32, dtype)}
            best = dict.fromkeys(inputs, math.inf)
            for _ in range(25):  # alternating, so that other work on the machine disturbs both
                for kind, tensors in inputs.items():
                    best[kind] = min(best[kind], seconds(function, *tensors))
                if best[dtype] > 10 * best[torch.float32]:
                    break  # emulated: no need to wait for more
            gains.append(best[torch.float32] / best[dtype])
    return min(gains)


# --------------------------------------------------------- reading and writing, folders and hub ids


def local_file(path, name):
    """The path of a file in a folder, or in a hub repository (downloaded);
    None where there is none."""
    if Path(path).is_dir():
        return Path(path) / name if (Path(path) / name).exists() else None
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (EntryNotFoundError, HfHubHTTPError, HFValidationError,
                                        LocalEntryNotFoundError)

    try:
        return hf_hub_download(str(path), name)
    except LocalEntryNotFoundError:  # no network, and not in the cache
        if try_to_load_from_cache(str(path), name) is _CACHED_NO_EXIST:
            return None  # known from an earlier run with a network
        raise UserError(
            f"{path}: no such folder, and the hub cannot be reached for {name}") from None
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"{path}: neither a folder nor a hub id that can be read "
                        f"({explain(error)})") from None


def read_json(file):
    """The object, a dict, in a JSON file."""
    try:
        content = json.loads(Path(file).read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} is damaged (no JSON object); fetch it again")
    return content


def check_folder(path, what, needed):
    """One sentence for the commonest mistakes: a wrong path, a wrong folder."""
    if local_file(path, needed) is None:
        found = ""
        if Path(path).is_dir():
            inside = sorted(f.name for f in Path(path).iterdir())[:8]
            found = f" (found: {', '.join(inside) or 'nothing'})"
        raise UserError(f"{path} is not {what}: no {needed} in it{found}")


def load(network, path, **options):
    try:
        return network.from_pretrained(path, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        where = "/".join(filter(None, [path, options.get("subfolder")]))
        raise UserError(f"{where}: cannot be loaded as {network.__name__} "
                        f"({explain(error)})") from None


def load_vae(path, subfolder, keep):
    name = "/".join(filter(None, [subfolder, "config.json"]))
    file = local_file(path, name)
    if file is None:
        raise UserError(f"{path}: no autoencoder in it ({name} is missing)")
    kind = read_json(file).get("_class_name")
    if kind not in ("AutoencoderTiny", "AutoencoderDC"):
        kind = "AutoencoderKL"
    return load(getattr(diffusers, kind), path, subfolder=subfolder, **keep)


def load_scheduler(path):
    """The generator's noise schedule, whichever sampler class it was saved for."""
    file = local_file(path, "scheduler/scheduler_config.json")
    config = read_json(file) if file else SD_SCHEDULE
    known = DDPMScheduler().config.keys()
    return DDPMScheduler.from_config({k: v for k, v in config.items()
                                      if k in known and not k.startswith("_")})


def read_prompt(path, width):
    """The embedding of the empty prompt [1, L, width]: stored, or computed once by the text encoder
    from two tokens (begin, end), not padded to 77, as the paper's authors do."""
    file = local_file(path, PROMPT_FILE)
    if file is not None:
        try:
            prompt = load_file(file)["prompt"]
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{file} is damaged ({error}); fetch it again") from None
    elif local_file(path, "text_encoder/config.json") is None:
        raise UserError(f"{path}: neither {PROMPT_FILE} nor text_encoder/ and tokenizer/ "
                        "to make the empty prompt from")
    else:
        from transformers import CLIPTextModel, CLIPTokenizer

        tokens = load(CLIPTokenizer, path, subfolder="tokenizer")(
            "", padding="do_not_pad", return_tensors="pt")
        with torch.no_grad():
            prompt = load(CLIPTextModel, path, subfolder="text_encoder")(tokens.input_ids)[0]
    if prompt.shape[-1] != width:
        raise UserError(f"{path}: the empty prompt has width {prompt.shape[-1]}, "
                        f"the UNet expects {width}")
    return prompt


def save_network(net, folder, state):
    """save_pretrained of diffusers, with the weights optionally replaced by `state`
    (another precision)."""
    if state is None:
        return net.save_pretrained(folder)
    net.register_to_config(_name_or_path="")  # where it was read from is nobody's business
    net.save_config(folder)
    save_file({k: v.contiguous() for k, v in state.items()},
              folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
