"""The losses of FiffDepth: Eq. 2, 3, 5 and 6 of the paper, a function for each line of them.

Everything here happens in the latent space of the autoencoder, on tensors [B, C, h, w]; the three
losses, trajectory_loss, mae and gradient_matching, return a scalar. d is a prediction and d_star
its target (the prose under Eq. 5 swaps the two; both losses are symmetric, so nothing changes).
Eq. 1 and 4, the two network calls, are model.FiffDepth.predict and .filter; Eq. 7, the weighted
sum, is train.training_step. Read this file first.
"""
import torch
import torch.nn.functional as F


# ------------------------------------------------------- Sec. 3.2: keeping the diffusion trajectory


def blend(x0, d0_star, gamma):
    """Eq. 2, first line: b_0 = γ x_0 + (1−γ) d_0*, a mixture of image and depth, the same
    at every t.

    x0, d0_star, result [B, C, h, w]. The paper writes d_0; it is the latent of the true depth here,
    not the prediction: a target must not move (README, "Where the paper is silent").
    """
    return gamma * x0 + (1 - gamma) * d0_star


def add_noise(b0, eps, a_bar):
    """Eq. 2, second line: b_t = √ᾱ_t b_0 + √(1−ᾱ_t) ε.

    b0, eps, result [B, C, h, w]; a_bar: see signal_noise
    """
    signal, noise = signal_noise(a_bar, b0)
    return signal * b0 + noise * eps


def velocity(b0, eps, a_bar):
    """Eq. 3, first line: v_t = √ᾱ_t ε − √(1−ᾱ_t) b_0.

    b0, eps, result [B, C, h, w]; a_bar: see signal_noise
    b_t and v_t are the same pair (b_0, ε) turned by an angle, so that
    b_0 = √ᾱ_t b_t − √(1−ᾱ_t) v_t.
    """
    signal, noise = signal_noise(a_bar, b0)
    return signal * eps - noise * b0


def signal_noise(a_bar, like):
    """√ᾱ_t and √(1−ᾱ_t) as [B, 1, 1, 1] in the dtype of `like`; a_bar is a number, [B] or
    [B, 1, 1, 1]."""
    a_bar = torch.as_tensor(a_bar, device=like.device).reshape(-1, 1, 1, 1)
    return a_bar.sqrt().to(like.dtype), (1 - a_bar).sqrt().to(like.dtype)


def trajectory_loss(v_hat, b0, eps, a_bar):
    """Eq. 3, second line: L_k = mean (v_t − ε̂_θ(b_t, t))², the generator's own task on blended
    latents.

    v_hat  the network's answer ε̂_θ(b_t, t) to b_t = add_noise(b0, eps, a_bar), for t in 1..999
           (0 is the clean step of Eq. 1 and never drawn);  b0, eps, v_hat [B, C, h, w];
           a_bar: see signal_noise
    The norm is read as a mean over cells and channels, so that λ_k does not depend on the picture's
    size.
    No mask: invalid pixels of the depth in b0 hold the far value.
    """
    return (velocity(b0, eps, a_bar) - v_hat).square().mean()


# ---------------------------------------------------------- Sec. 3.4: depth losses, in latent space


def mae(d, d_star, mask=None):
    """Eq. 5: L_MAE = 1/M Σ |d − d*|, over the valid latent cells and all channels.

    d, d_star [B, C, h, w]; mask, bool, of that shape or broadcastable to it; M the number of cells
    and channels it leaves. 0 if nothing is valid.
    """
    residual, valid = masked_residual(d, d_star, mask)
    return mean_where(residual.abs(), valid)


def gradient_matching(d, d_star, mask=None):
    """Eq. 6: L_GM = 1/M Σ |∇x R| + |∇y R| with R = d − d*: edges where they belong, whatever the
    offset.

    Differences of neighbouring cells at one scale (Eq. 6 shows no pyramid); a pair counts when both
    of its cells are valid, and each direction is averaged over its own pairs. Shapes as in mae.
    """
    residual, valid = masked_residual(d, d_star, mask)
    along_x = mean_where((residual[..., 1:] - residual[..., :-1]).abs(),
                         valid[..., 1:] & valid[..., :-1])
    along_y = mean_where((residual[..., 1:, :] - residual[..., :-1, :]).abs(),
                         valid[..., 1:, :] & valid[..., :-1, :])
    return along_x + along_y


def block_mean(d, cells=4):
    """Coarse depth, without its detail: means over blocks of cells x cells latent cells.
    [B, C, h, w] -> [B, C, ⌈h/cells⌉, ⌈w/cells⌉]; blocks at the border may be smaller. Not in the
    paper: for --lambda_low, which trusts a soft teacher with coarse depth.
    """
    return F.avg_pool2d(d, cells, ceil_mode=True)


def masked_residual(d, d_star, mask):
    """R = d − d*, 0 where invalid, and the mask at R's shape. torch.where drops a NaN in an
    invalid cell; a product with the mask would keep it."""
    if d.shape != d_star.shape:
        raise ValueError(
            f"prediction {tuple(d.shape)} and target {tuple(d_star.shape)} differ in shape")
    residual = d - d_star
    if mask is None:
        return residual, torch.ones_like(residual, dtype=torch.bool)
    mask = mask.to(torch.bool).broadcast_to(residual.shape)
    return torch.where(mask, residual, torch.zeros_like(residual)), mask


def mean_where(values, valid):
    """Mean over the valid elements; 0, not NaN, if there are none. Invalid values are 0 already or
    straddle the mask's border, and are dropped here."""
    return torch.where(valid, values, torch.zeros_like(values)).sum() / valid.sum().clamp(min=1)
