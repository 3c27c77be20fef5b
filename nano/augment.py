"""Labelled frames as another camera and another light would show them, for the small world's
teacher: the stronger, the less it learns by heart of a ray-caster, and the more holds for
photographs.
"""
import torch
import torch.nn.functional as F


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
