"""The small world's teacher, for transformers' AutoModelForDepthEstimation: relative disparity.

EfficientNet-Lite0 (Tan and Le, arXiv 1905.11946, without squeeze-and-excitation and with ReLU6),
its batch normalisation folded into the convolutions, and a decoder of DPT's kind (arXiv
2103.13413) that ends at a quarter of the resolution: right on the whole, soft at edges.
save_pretrained puts a copy of this file beside the weights, as transformers does with every class
that it does not hold itself.
"""
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, PretrainedConfig
from transformers.modeling_outputs import DepthEstimatorOutput

# kernel, stride, expansion, channels, repeats; what a row marked True gives feeds the decoder
STAGES = ((3, 1, 1, 16, 1, False), (3, 2, 6, 24, 2, True), (5, 2, 6, 40, 2, True),
          (3, 2, 6, 80, 3, False), (5, 1, 6, 112, 3, True), (5, 2, 6, 192, 4, False),
          (3, 1, 6, 320, 1, True))
WIDTHS = (48, 64, 96, 128)  # of the decoder at 1/4, 1/8, 1/16 and 1/32 of the resolution


class NanoTeacherConfig(PretrainedConfig):
    model_type = "nano_teacher"


class Conv(nn.Conv2d):
    """TensorFlow's "same" padding of an even picture: with stride 2 it is a pixel larger at the
    right and at the bottom. One filter a channel never computes in bfloat16 while training: its
    backward pass takes several times as long on a CPU."""

    def forward(self, x):
        pad = self.kernel_size[0] - self.stride[0]
        x = F.pad(x, (pad // 2, pad - pad // 2) * 2) if pad else x
        plain = self.groups == 1 or not self.training
        if plain or not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class Block(nn.Module):
    """Inverted residual: widen, one filter a channel, narrow."""

    def __init__(self, channels, kernel, stride, expansion, out):
        super().__init__()
        wide = channels * expansion
        self.expand = Conv(channels, wide, 1) if expansion > 1 else None
        self.depthwise = Conv(wide, wide, kernel, stride, groups=wide)
        self.project = Conv(wide, out, 1)
        self.residual = stride == 1 and channels == out

    def forward(self, x):
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.residual else y


class Fuse(nn.Module):
    """One step up: the coarser map, enlarged, plus the encoder's of this level, and a residual
    unit."""

    def __init__(self, coarse, skip, width):
        super().__init__()
        self.coarse = nn.Conv2d(coarse, width, 1) if coarse else None
        self.skip = nn.Conv2d(skip, width, 1)
        self.unit = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x, skip):
        y = self.skip(skip)
        if x is not None:
            y = y + F.interpolate(self.coarse(x), y.shape[-2:], mode="bilinear")
        return y + self.unit(y)


class NanoTeacher(PreTrainedModel):
    config_class = NanoTeacherConfig

    def __init__(self, config):
        super().__init__(config)
        self.stem, channels, skips = Conv(3, 32, 3, 2), 32, []
        self.blocks, self.taps = nn.ModuleList(), []
        for kernel, stride, expansion, out, repeats, tapped in STAGES:
            for i in range(repeats):
                self.blocks.append(Block(channels, kernel, stride if i == 0 else 1, expansion, out))
                channels = out
            if tapped:
                self.taps.append(len(self.blocks) - 1)
                skips.append(out)
        self.decoder = nn.ModuleList(Fuse(coarse, skip, width) for coarse, skip, width in
                                     zip((*WIDTHS[1:], None), skips, WIDTHS))
        self.head = nn.Sequential(nn.Conv2d(WIDTHS[0], 32, 3, padding=1), nn.ReLU(),
                                  nn.Conv2d(32, 1, 1))
        self.post_init()

    def _init_weights(self, module):
        """torch's own, as made"""

    def features(self, pixel_values):
        """The encoder's maps [B, 24 | 40 | 112 | 320, h, w] at 1/4, 1/8, 1/16 and 1/32"""
        x, maps = F.relu6(self.stem(pixel_values)), []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in self.taps:
                maps.append(x)
        return maps

    def forward(self, pixel_values):
        """pixel_values [B, 3, H, W], (x − 127) / 128 of 8-bit values, sides multiples of 32
        -> predicted_depth [B, H / 4, W / 4]: disparity above 0, scale and shift unknown"""
        x, maps = None, self.features(pixel_values)
        for fuse, skip in zip(reversed(self.decoder), reversed(maps)):
            x = fuse(x, skip)
        return DepthEstimatorOutput(predicted_depth=F.softplus(self.head(x))[:, 0])


NanoTeacherConfig.register_for_auto_class()
NanoTeacher.register_for_auto_class("AutoModelForDepthEstimation")
